"""What one core makes of the pieces of the kernels, on a panel that is in its cache: what bounds them, memory aside."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from benchmarks.speed.cases import BLOCK
from minimax_jax.ops import kernels_numba as kernels

_TIMES, _ROUNDS = 50, 20
_COLS = 256


@numba.njit(nogil=True)
def _amax(weights: Any, scales: Any) -> None:
    for _ in range(_TIMES):
        kernels._scale_panel(weights, 0, BLOCK, 0, _COLS, BLOCK, scales)


@numba.njit(nogil=True)
def _encode(weights: Any, spread: Any, codes: Any) -> None:
    for _ in range(_TIMES):
        for row in range(BLOCK):
            kernels._encode_row(weights[row], spread, codes[row])


@numba.njit(nogil=True)
def _decode(codes: Any, spread: Any, weights: Any) -> None:
    for _ in range(_TIMES):
        for row in range(BLOCK):
            kernels._decode_row(codes[row], spread, weights[row])


@numba.njit(nogil=True)
def _transpose(codes: Any, turned: Any) -> None:
    for _ in range(_TIMES):
        kernels._transpose_tile(codes, turned, _COLS)


def pieces() -> dict[str, float]:
    """Billions of elements a second of each piece, by one core: the best of several runs."""
    weights = (np.random.default_rng(0).standard_normal((BLOCK, _COLS), np.float32).view(np.uint32) >> 16).astype("u2")
    codes, turned = np.zeros((BLOCK, _COLS), np.uint8), np.zeros((_COLS, BLOCK), np.uint8)
    spread, scales = np.ones(_COLS, np.float32), np.ones(_COLS // BLOCK, np.float32)
    return {
        "amax of blocks": _rate(lambda: _amax(weights, scales)),
        "encode": _rate(lambda: _encode(weights, spread, codes)),
        "decode": _rate(lambda: _decode(codes, spread, weights)),
        "transpose bytes": _rate(lambda: _transpose(codes, turned)),
    }


def _rate(work: Callable[[], None]) -> float:
    work()  # compiles
    seconds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return _TIMES * BLOCK * _COLS / min(seconds) / 1e9
