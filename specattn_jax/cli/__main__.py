"""`python -m specattn_jax.cli`."""

from specattn_jax.cli import main

main()
