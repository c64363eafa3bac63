"""Made-up values for the tensors of a checkpoint, each from a random stream of its own.

Values depend on the seed, the tensor's name, its shape and the block size alone, so the same tensor has the same bytes
in every checkpoint that holds it, whatever its shards, its order or its number of experts. They are built from raw
generator bits, whose streams numpy keeps stable over versions (NEP 19).

FP8 weights use every finite code. About a quarter of their blocks stay below the largest code, 448. Where a projection
or a matrix of the first expert has several blocks, the last one is all zeros, of both signs. Weights have a standard
deviation of about 0.02, so that a model made of them gives finite logits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import LayoutError, Problem
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.specs import Place, specs
from minimax_jax.layout.table import SCALE_SUFFIX

Array: TypeAlias = npt.NDArray[Any]
Scaled: TypeAlias = Literal["F8_E4M3", "BF16", "F32"]

_SCALES = (1.2e-4, 3.0e-4)
_RANGES: Mapping[tuple[str, int], tuple[float, float]] = {
    ("BF16", 1): (0.75, 1.25),  # norms
    ("BF16", 2): (-0.0346, 0.0346),  # embedding and head: standard deviation 0.02
    ("F32", 1): (-0.05, 0.05),  # router biases
    ("F32", 2): (-0.0346, 0.0346),  # router weights
}
"""Least and largest value of what is not block-scaled, by published dtype and number of axes."""

_ALL, _BELOW_448, _ZERO = 0xFF, 0xF7, 0x80
"""Bits that a block keeps of its codes; without 0x08 the largest code is 240."""

_CODE_VALUES = np.arange(256, dtype=np.uint8).view(DTYPES["F8_E4M3"]).astype(np.float32)
_BAND_ELEMENTS = 2**18  # a band and its temporaries stay in the cache


def values(key: str, config: MiniMaxConfig, *, seed: int = 0, scaled: Scaled = "F8_E4M3") -> Array:
    """One tensor of a synthetic checkpoint.

    Args:
        key: its Hugging Face name; that of a weight's scales gives the scales, whatever `scaled` is.
        config: the checkpoint's config.
        seed: a non-negative integer; another seed gives another checkpoint.
        scaled: dtype of block-scaled weights. `BF16` and `F32` are `dtype(float32(code) * scale)` of the same codes.

    Returns:
        A fresh array in the tensor's shape and dtype.

    Raises:
        LayoutError: the config has no such tensor.
    """
    shape, dtype = _stored(_place(key, config), scaled)
    array = np.empty(shape, dtype)
    row = 0
    for band in bands(key, config, seed=seed, scaled=scaled):
        array[row : row + len(band)] = band
        row += len(band)
    return array


def bands(key: str, config: MiniMaxConfig, *, seed: int = 0, scaled: Scaled = "F8_E4M3") -> Iterator[Array]:
    """The same as `values`, as consecutive groups of rows `[rows, ...]`, so that a large tensor needs little memory."""
    place = _place(key, config)
    if place.is_scale:
        return iter((_scales(place, _stream(seed, key)),))
    if not place.entry.row.scaled:
        return _plain_bands(place, _stream(seed, key))
    codes = _code_bands(place, _stream(seed, key))
    if scaled == "F8_E4M3":
        return (band.view(DTYPES[scaled]) for band in codes)
    scales = _over_columns(_scales(place, _stream(seed, key + SCALE_SUFFIX)), place)
    return (_times(*pair).astype(DTYPES[scaled], copy=False) for pair in zip(codes, scales, strict=True))


def _place(key: str, config: MiniMaxConfig) -> Place:
    place = specs(config).places.get(key)
    if place is None:
        raise LayoutError(Problem(what="the config has no such tensor", key=key))
    return place


def _stored(place: Place, scaled: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of a tensor."""
    if place.is_scale:
        return place.entry.part_grid, DTYPES["F32"]
    return place.entry.part_shape, DTYPES[place.entry.dtype(scaled)]


def _plain_bands(place: Place, stream: np.random.BitGenerator) -> Iterator[Array]:
    row = place.entry.row
    rows, *rest = place.entry.part_shape
    for height in _heights(rows, max(1, _BAND_ELEMENTS // math.prod(rest))):
        floats = _floats(stream, (height, *rest), *_RANGES[row.dtype, len(row.axes)])
        yield floats.astype(DTYPES[row.dtype], copy=False)


def _scales(place: Place, stream: np.random.BitGenerator) -> npt.NDArray[np.float32]:
    return _floats(stream, place.entry.part_grid, *_SCALES)


def _times(codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """`float32(code) * scale` of one row of blocks: codes `[rows, cols]`, the scale of each column `[cols]`."""
    return np.take(_CODE_VALUES, codes) * scales


def _code_bands(place: Place, stream: np.random.BitGenerator) -> Iterator[npt.NDArray[np.uint8]]:
    """Codes, one row of blocks at a time."""
    rows, cols = place.entry.part_shape
    keeps = _over_columns(_kept_bits(place, stream), place)
    for height, keep in zip(_heights(rows, place.entry.block[0]), keeps, strict=True):
        codes = _random(stream, np.uint8, (height, cols))
        codes -= ((codes & 0x7F) + 1) >> 7  # 0x7f and 0xff are NaN; the codes below them are 448 and -448
        codes &= keep
        yield codes


def _kept_bits(place: Place, stream: np.random.BitGenerator) -> npt.NDArray[np.uint8]:
    """Which bits each block keeps of its codes, `[block rows, block cols]`."""
    draws = _random(stream, np.uint8, place.entry.part_grid)
    keep = np.where(draws < 64, np.uint8(_BELOW_448), np.uint8(_ALL))
    if place.expert == 0 and keep.size > 1:
        keep[-1, -1] = _ZERO
    return keep


def _over_columns(grid: Array, place: Place) -> Array:
    """`grid [block rows, block cols]` repeated to `[block rows, cols]`."""
    return np.repeat(grid, place.entry.block[1], axis=1)[:, : place.entry.part_shape[1]]


def _heights(rows: int, height: int) -> Iterator[int]:
    return (min(height, rows - start) for start in range(0, rows, height))


def _floats(stream: np.random.BitGenerator, shape: tuple[int, ...], low: float, high: float) -> npt.NDArray[np.float32]:
    """Uniform float32 whose last mantissa bit is set: no power of two, and a trip through bfloat16 changes it."""
    unit = (_random(stream, np.uint32, shape) >> 8).astype(np.float32) * np.float32(2**-24)
    floats = unit * np.float32(high - low) + np.float32(low)
    floats.view(np.uint32)[...] |= 1
    return floats


def _random(stream: np.random.BitGenerator, dtype: type[np.unsignedinteger[Any]], shape: tuple[int, ...]) -> Array:
    """Unsigned integers of random bits."""
    count = math.prod(shape)
    words = stream.random_raw(-(-count * np.dtype(dtype).itemsize // 8))
    return words.view(dtype)[:count].reshape(shape)


def _stream(seed: int, key: str) -> np.random.BitGenerator:
    """The tensor's own stream of random bits."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return np.random.SFC64([seed, int.from_bytes(digest, "little")])
