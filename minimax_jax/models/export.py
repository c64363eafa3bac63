"""A model written as a Hugging Face checkpoint, a few experts at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from minimax_jax.dtypes import NAMES
from minimax_jax.errors import LayoutError, raise_if
from minimax_jax.io.folder import appearing, workshop_of
from minimax_jax.io.jsonfile import write_json_atomic
from minimax_jax.io.shards import DEFAULT_SHARD_BYTES, ShardLayout, TensorOut, lay_out
from minimax_jax.io.writer import Writer
from minimax_jax.jobs.quantize import quantize_leaf
from minimax_jax.jobs.run import Report
from minimax_jax.jobs.source import batches
from minimax_jax.jobs.team import present_team, uninterrupted
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.specs import Entry, specs, total_bytes
from minimax_jax.layout.table import SCALE_SUFFIX
from minimax_jax.leaves import Leaf, emit, scale_problems
from minimax_jax.models.assign import native_tree
from minimax_jax.models.minimax import MiniMaxForCausalLM
from minimax_jax.models.stack import is_stacked, stacked_entries
from minimax_jax.models.weights import check_weights
from minimax_jax.ops.checks import Array
from minimax_jax.ops.fp8 import FP8
from minimax_jax.ops.rounding import bits_of
from minimax_jax.ops.scaled import BlockScaled
from minimax_jax.progress import Progress, Ticker

HostArray: TypeAlias = np.ndarray[Any, Any]

_PIECE_BYTES = 2**26
"""Most bytes of weights on the host in one piece of work, unless one expert is larger."""


def save_model(
    model: MiniMaxForCausalLM,
    path: str | Path,
    *,
    quantization: bool = False,
    scales: Mapping[str, Array] | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Write a model as a Hugging Face checkpoint: safetensors files, their index, and config.json.

    The folder appears whole, by rename, or not at all. Tensors are taken from the devices a few experts at a time. With
    several processes all of them call this, and the first of them writes.

    Args:
        model: a model, its layers stacked or not, its weights sharded or not.
        path: a folder that does not exist yet, or is empty.
        quantization: write block-scaled weights as FP8. Those that are FP8 pass byte for byte, others are quantised.
            Without it, FP8 weights are dequantised to bfloat16, and all others keep their dtypes.
        scales: source scales by native scale name, as `source_scales` gives them. A weight that they reproduce exactly
            keeps them, so that a frozen weight comes back byte for byte; any other gets scales by amax.
        shard_bytes: most bytes of tensors in one file.
        progress: called in the process that writes, after each piece of work.

    Returns:
        What was written; in a process that does not write, what it would say of nothing quantised.

    Raises:
        LayoutError: weights, or scales, that are not those of the model's config.
        NumericError: a weight to be quantised holds NaN or infinity.
        JobError: the destination is taken, the disk too small, a write failed; another process failed, or was stopped.

    Examples:
        >>> mj.synthesize("MiniMax-M2")
        >>> report = mj.save_model(mj.load_model("MiniMax-M2", dtype=None), "m2-saved", quantization=True)
        >>> mj.verify("MiniMax-M2", "m2-saved", by="bytes").good
        True
    """
    weights = native_tree(model)
    check_weights(weights, model.config, stacked=is_stacked(weights, model.config))
    leaves = tuple(_leaves(weights, model.config))
    raise_if(scale_problems(scales or {}, [leaf.entry for leaf in leaves]), LayoutError)
    job = _Job(leaves, model.config, quantization=quantization, scales=scales or {}, shard_bytes=shard_bytes)
    ticker = Ticker(sum(leaf.nbytes for leaf in leaves), progress)
    pieces = (piece for leaf in leaves for piece in leaf.pieces())
    team = present_team()
    ours = job.writing(Path(path)) if team.leads else nullcontext()
    with team.standing_together(workshop_of(path)), ours as writer:
        team.wait()  # the destination is free
        for piece in pieces:  # the other processes take part in fetching what is spread over all of them
            if writer is not None:
                job.write(piece, writer, ticker)
            team.wait()
    return job.report(Path(path), ticker.seconds)


@dataclass(frozen=True, kw_only=True)
class _Leaf:
    """One native leaf of the model.

    Attributes:
        entry: which.
        held: the array that holds it.
        layer: where on the leading axis of `held` it is; None where `held` is the leaf itself.
    """

    entry: Entry
    held: Leaf
    layer: int | None

    @property
    def nbytes(self) -> int:
        """Bytes on the devices."""
        size: int = sum(array.nbytes for array in jax.tree.leaves(self.held))
        return size if self.layer is None else size // self.held.shape[0]

    def pieces(self) -> Iterator[tuple[Entry, int, Leaf]]:
        """Some experts at a time: the entry narrowed to them, the first of them, and their weights on the host."""
        for some, first in batches(self.entry, self.nbytes, _PIECE_BYTES):
            start, count = (first, some.experts) if some.row.grouped else (0, None)
            fetch = functools.partial(_fetch, layer=self.layer, start=start, count=count)
            with uninterrupted():
                fetched = jax.tree.map(fetch, self.held)
            yield some, first, fetched


class _Job:
    """What is written, and how."""

    def __init__(
        self,
        leaves: tuple[_Leaf, ...],
        config: MiniMaxConfig,
        *,
        quantization: bool,
        scales: Mapping[str, Array],
        shard_bytes: int,
    ):
        self._quantization, self._scales = quantization, scales
        self._kept: list[str] = []
        self._fresh: list[str] = []
        first = next(leaf for leaf in leaves if not leaf.entry.row.scaled)
        block = config.block if quantization else None
        self._config = config.replace(dtype=str(first.held.dtype), weight_block_size=block)
        self._read_bytes = sum(leaf.nbytes for leaf in leaves)
        outputs = (spec for leaf in leaves for spec in leaf.entry.hf_specs(self._dtype(leaf)))
        self._tensors = [TensorOut(key=spec.key, dtype=spec.dtype, shape=spec.shape) for spec in outputs]
        self._shards: tuple[ShardLayout, ...] = lay_out(self._tensors, shard_bytes=shard_bytes)

    @contextmanager
    def writing(self, path: Path) -> Iterator[Writer]:
        """A writer of all pieces; when the block ends well they are a checkpoint at `path`, else nothing is."""
        with appearing(path) as folder, Writer(folder, self._shards) as writer:
            yield writer
            writer.finish()
            write_json_atomic(folder / "config.json", self._config.to_dict())

    def write(self, piece: tuple[Entry, int, Leaf], writer: Writer, ticker: Ticker) -> None:
        """Write one piece."""
        for key, array in self._encoded(*piece).items():
            writer.write(key, np.asarray(array))
        ticker.tick(sum(array.nbytes for array in jax.tree.leaves(piece[-1])))

    def report(self, path: Path, seconds: float) -> Report:
        """What was done."""
        return Report(
            destination=path,
            tensors=len(self._tensors),
            read_bytes=self._read_bytes,
            written_bytes=total_bytes(self._tensors),
            seconds=seconds,
            kept_scales=len(self._kept),
            fresh_scales=tuple(sorted(self._fresh)),
        )

    def _dtype(self, leaf: _Leaf) -> str:
        if leaf.entry.row.scaled and self._quantization:
            return NAMES[np.dtype(FP8)]
        return "BF16" if isinstance(leaf.held, BlockScaled) else NAMES[np.dtype(leaf.held.dtype)]

    def _encoded(self, entry: Entry, first: int, leaf: Leaf) -> dict[str, Array]:
        if not self._quantization and isinstance(leaf, BlockScaled):
            return emit(entry, leaf, jax.numpy.bfloat16)
        if self._quantization and entry.row.scaled and not isinstance(leaf, BlockScaled):
            source = self._scales.get(entry.native + SCALE_SUFFIX)
            rows = slice(first, first + entry.experts) if entry.row.grouped else slice(None)
            leaf, kept = quantize_leaf(entry, leaf, None if source is None else np.asarray(source)[rows])
            for key, same in kept.items():
                (self._kept if same else self._fresh).append(key)
        return emit(entry, leaf, None)


def _leaves(weights: Mapping[str, Leaf], config: MiniMaxConfig) -> Iterator[_Leaf]:
    """The native leaves of a model, in the order of a checkpoint."""
    homes: dict[str, tuple[str, int | None]] = {}
    if is_stacked(weights, config):
        for name, group in stacked_entries(config).items():
            if group[0].row.per_layer:
                homes |= {entry.native: (name, layer) for layer, entry in enumerate(group)}
    for entry in specs(config).entries:
        name, layer = homes.get(entry.native, (entry.native, None))
        yield _Leaf(entry=entry, held=weights[name], layer=layer)


def _fetch(held: Array, *, layer: int | None, start: int, count: int | None) -> HostArray:
    """Rows of an array, or of one layer of it, on the host of every process.

    By their bits: from an array that is spread over devices XLA takes rows by adding zeros, and -0 + 0 is 0.
    """
    array = jax.numpy.asarray(held)
    everywhere = None
    if isinstance(array.sharding, NamedSharding) and not array.is_fully_addressable:
        everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())  # type: ignore[no-untyped-call]
    bits = fetch_rows(array, layer, start, count=count, layered=layer is not None, everywhere=everywhere)
    return np.asarray(bits).view(held.dtype)


@functools.partial(jax.jit, static_argnames=("count", "layered", "everywhere"))
def fetch_rows(
    array: jax.Array,
    layer: int | None,
    start: int,
    *,
    count: int | None,
    layered: bool,
    everywhere: NamedSharding | None,
) -> jax.Array:
    """The bits of rows `start` to `start + count` of an array, all without `count`; of one layer where it is `layered`.

    `everywhere` puts them on all devices of a mesh, for processes that hold only a part of them.
    """
    bits = bits_of(array)
    if layered:
        bits = lax.dynamic_index_in_dim(bits, layer, 0, keepdims=False)
    if count is not None:
        bits = lax.dynamic_slice_in_dim(bits, start, count)
    return bits if everywhere is None else lax.with_sharding_constraint(bits, everywhere)  # type: ignore[no-untyped-call]
