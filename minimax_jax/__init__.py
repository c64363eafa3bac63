"""Exact, fast, bounded-memory conversion of MiniMax-M2 checkpoints.

Names resolve on first use, so that importing the package (and `minimax-jax --help`) does not import jax.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
