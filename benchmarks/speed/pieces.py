"""What one core makes of the pieces of the kernels, on a panel that is in its cache: what bounds them, memory aside."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from benchmarks.speed.cases import BLOCK
from minimax_jax.ops import kernels_numba as kernels
from minimax_jax.ops.workspace import empty

_TIMES, _ROUNDS = 50, 20
_COLS = 256


@numba.njit(nogil=True)
def _amax(weights: Any) -> Any:
    total = np.float32(0)
    for _ in range(_TIMES):
        for col in range(0, _COLS, BLOCK):
            total += kernels._scale(weights[:, col : col + BLOCK])
    return total


@numba.njit(nogil=True)
def _encode(weights: Any, room: Any, codes: Any) -> None:
    for _ in range(_TIMES):
        for col in range(0, _COLS, BLOCK):
            kernels._encode_block(weights[:, col : col + BLOCK], np.float32(0.01), room, codes[:, col : col + BLOCK], 0)


@numba.njit(nogil=True)
def _decode(codes: Any, spread: Any, weights: Any) -> None:
    for _ in range(_TIMES):
        kernels._decode_rows(codes, spread, weights)


@numba.njit(nogil=True)
def _decode_turned(codes: Any, scales: Any, spread: Any, table: Any, weights: Any) -> None:
    for _ in range(_TIMES):
        kernels._decode_tile(codes, scales, BLOCK, spread, table, weights)


@numba.njit(nogil=True)
def _transpose(codes: Any, turned: Any) -> None:
    for _ in range(_TIMES):
        kernels._transpose_tile(codes, turned)


def pieces() -> dict[str, float]:
    """Billions of elements a second of each piece, by one core: the best of several runs."""
    normal = np.random.default_rng(0).standard_normal((BLOCK, _COLS), np.float32)
    weights, codes = empty(normal.shape, np.uint16), empty(normal.shape, np.uint8)
    weights[:], codes[:] = normal.view(np.uint32) >> 16, normal.view(np.uint8)[:, ::4] & 0x7E
    turned, turned_weights = empty((_COLS, BLOCK), np.uint8), empty((_COLS, BLOCK), np.uint16)
    spread, scales = np.ones(_COLS, np.float32), np.ones(1, np.float32)
    room = np.empty(17, np.uint16), np.empty(BLOCK, np.float32), np.empty(17, np.uint8)
    table = np.empty(256, np.uint8)
    return {
        "amax of blocks": _rate(lambda: _amax(weights)),
        "encode": _rate(lambda: _encode(weights, room, codes)),
        "decode": _rate(lambda: _decode(codes, spread, weights)),
        "decode and transpose": _rate(lambda: _decode_turned(codes, scales, spread, table, turned_weights)),
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
