"""Checkpoints in the exact published layout, of any size, with made-up values: for tests, demos and benchmarks."""

from minimax_jax.synthetic.checkpoint import synthesize
from minimax_jax.synthetic.noise import bands, values
from minimax_jax.synthetic.sizes import REAL, TINY, config

__all__ = ["REAL", "TINY", "bands", "config", "synthesize", "values"]
