"""The harness' own command, which knows the model `specattn`."""

from lm_eval.__main__ import cli_evaluate

# Importing it registers the model.
import specattn_jax.evaluation.tasks.harness  # noqa: F401

if __name__ == "__main__":
    cli_evaluate()
