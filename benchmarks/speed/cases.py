"""What is converted: one layer of the published shapes, and what has to come out of it, by numpy and ml_dtypes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import minimax_jax as mj
from benchmarks.speed.rounds import NotTheSameBits
from minimax_jax import synthetic
from minimax_jax.layout.specs import Entry
from minimax_jax.ops.workspace import empty

Array = np.ndarray[Any, Any]
BLOCK = 128
FP8, BF16 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Case:
    """A checkpoint of one layer on the disk.

    Attributes:
        path: its folder.
        experts: how many it has.
    """

    path: Path
    experts: int

    @classmethod
    def make(cls, path: Path, experts: int, layers: int = 1) -> Case:
        """Write it."""
        synthetic.synthesize(path, synthetic.config(real=True, layers=layers, experts=experts, vocab_size=1024))
        return cls(path, experts)

    @functools.cached_property
    def config(self) -> mj.MiniMaxConfig:
        """Its config."""
        return mj.MiniMaxConfig.from_pretrained(self.path)

    @functools.cached_property
    def entries(self) -> tuple[Entry, ...]:
        """Its expert tensors in the native layout."""
        return tuple(entry for entry in mj.specs(self.config).entries if entry.row.grouped)

    @functools.cached_property
    def whole(self) -> dict[str, Array]:
        """All its tensors, in memory."""
        return {name: np.array(leaf) for name, leaf in mj.read_tree(self.path).items()}

    @functools.cached_property
    def tree(self) -> dict[str, Array]:
        """Codes and scales of its experts, in memory."""
        keys = {spec.key for entry in self.entries for spec in entry.hf_specs("F8_E4M3")}
        return {key: leaf for key, leaf in self.whole.items() if key in keys}

    @functools.cached_property
    def native(self) -> dict[str, Array]:
        """What its experts are in the native layout, bfloat16 `[experts, cols, parts*rows]`.

        It lies in memory as a job's, or a jax array's, does: from the beginning of a line of the cache on.
        """
        made = {}
        for entry in self.entries:
            made[entry.native] = empty((entry.experts, *next(self._grouped(entry)).shape), BF16)
            for place, expert in zip(made[entry.native], self._grouped(entry), strict=True):
                place[:] = expert
        return made

    @functools.cached_property
    def weights(self) -> dict[str, Array]:
        """Other weights in the form of `native`: normal, as those of a trained model nearly are.

        Those of `native` are not: their codes are random, and one in ten is below the smallest normal code.
        """
        made, rng = {}, np.random.default_rng(0)
        for name, leaf in self.native.items():
            made[name] = empty(leaf.shape, BF16)
            for expert in made[name]:
                expert[:] = rng.standard_normal(expert.shape, np.float32) * np.float32(0.02)
        return made

    @functools.cached_property
    def quantized(self) -> dict[str, Array]:
        """Codes and scales by amax of `weights`, by Hugging Face name."""
        return self._quantized(self.weights)

    @functools.cached_property
    def requantized(self) -> dict[str, Array]:
        """Those of `native`."""
        return self._quantized(self.native)

    @property
    def fp8_bytes(self) -> int:
        """Bytes of its experts' codes and scales."""
        return sum(leaf.nbytes for leaf in self.tree.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(leaf.nbytes for leaf in self.whole.values())

    @property
    def files(self) -> list[Path]:
        """Its files of weights."""
        return sorted(self.path.glob("*.safetensors"))

    def _quantized(self, native: Mapping[str, Array]) -> dict[str, Array]:
        made: dict[str, Array] = {}
        for entry in self.entries:
            for keys, weights in zip(entry.keys, native[entry.native], strict=True):
                for key, part in zip(keys, np.split(weights, len(keys), axis=1), strict=True):
                    made[key], made[key + "_scale_inv"] = quantize(part.T)
        return made

    def _grouped(self, entry: Entry) -> Iterator[Array]:
        for keys in entry.keys:
            matrices = [dequantize(self.tree[key], self.tree[key + "_scale_inv"]) for key in keys]
            yield np.ascontiguousarray(np.concatenate(matrices).T)


def dequantize(codes: Array, scales: Array) -> Array:
    """bfloat16 of float32(code) * scale."""
    return (codes.astype(np.float32) * _spread(scales)).astype(BF16)


def quantize(weights: Array) -> tuple[Array, Array]:
    """Codes of weight / scale, rounded to even, with scale = amax / 448 of each block."""
    blocks = weights.astype(np.float32).reshape(weights.shape[0] // BLOCK, BLOCK, weights.shape[1] // BLOCK, BLOCK)
    amax = np.abs(blocks).max(axis=(1, 3))
    scales = np.where(amax == 0, np.float32(1), amax / np.float32(448))
    return np.ascontiguousarray(weights.astype(np.float32) / _spread(scales)).astype(FP8), scales


def _spread(scales: Array) -> Array:
    return scales.repeat(BLOCK, 0).repeat(BLOCK, 1)


def require_same(got: Mapping[str, Any], want: Mapping[str, Array], who: str) -> None:
    """Raise NotTheSameBits unless all of `want` stands in `got`, bit for bit."""
    for name, expected in want.items():
        found = np.asarray(got[name]) if name in got else None
        if found is None or found.shape != expected.shape or found.dtype.itemsize != expected.dtype.itemsize:
            raise NotTheSameBits(f"{who}: {name} is missing, or of another form")
        if not np.array_equal(bits(found), bits(expected)):
            raise NotTheSameBits(f"{who}: {name} has other bits than the oracle's")


def bits(array: Array) -> Array:
    """The bytes of an array, in row-major order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
