"""The command line: parse, call, print. Everything heavy is imported inside the commands, so that `--help` is quick."""

from specattn_jax.cli.process import importing, prepare_process


def main() -> None:
    """Entry of the `specattn` command."""
    prepare_process()
    with importing():
        from specattn_jax.cli.app import app
    app()
