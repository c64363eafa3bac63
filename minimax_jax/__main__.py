"""`python -m minimax_jax`: the command line."""

from minimax_jax.cli import main

main()
