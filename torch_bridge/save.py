"""A torch module written as a Hugging Face checkpoint folder: float weights as they are, or real block-scaled FP8."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from minimax_jax.errors import ConfigError, LayoutError, NumericError, Problem, raise_if
from minimax_jax.io.folder import appearing
from minimax_jax.io.jsonfile import write_json_atomic
from minimax_jax.io.shards import DEFAULT_SHARD_BYTES, TensorOut, lay_out
from minimax_jax.io.writer import Writer
from minimax_jax.jobs.quantize import quantize_leaf
from minimax_jax.jobs.run import Report
from minimax_jax.jobs.team import uninterrupted
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.specs import Entry, specs
from minimax_jax.layout.table import SCALE_SUFFIX, Row
from minimax_jax.progress import Progress, Ticker
from torch_bridge import experts, memory, ranks
from torch_bridge.arrays import TORCH_NAMES, as_numpy
from torch_bridge.homes import Home, find_homes

Scales: TypeAlias = Mapping[str, Any]
HostArray: TypeAlias = np.ndarray[Any, Any]

_PIECE_BYTES = 2**26
"""Most bytes of a module's tensor that are taken at a time, where it can be split."""

_RETURN_BYTES = 2**23
"""Pieces of this size leave enough behind to give it back to the system."""

_FP8 = "F8_E4M3"


def save_hf(
    model: nn.Module,
    path: str | Path,
    device_mesh: DeviceMesh | None = None,
    *,
    quantization: bool = False,
    scales: Scales | None = None,
    config: MiniMaxConfig | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Write a module as a Hugging Face checkpoint: safetensors files, their index, and config.json.

    The folder appears whole, by rename, or not at all. Beside the module there are a few matrices in memory, on the
    rank that writes. Where torch is distributed this is a collective of all ranks: the module must be alike on all of
    them, rank 0 writes, and the others send it their parts of DTensors, an expert at a time.

    Args:
        model: as in `load_into`.
        path: a folder that does not exist yet, or is empty.
        device_mesh: see `homes.find_homes`.
        quantization: write block-scaled weights as FP8 with real scales. Without it all tensors keep their dtypes.
        scales: block scales of the FP8 source by native scale name, as `minimax_jax.source_scales` gives them. A weight
            that they reproduce exactly keeps them, any other is scaled by amax.
        config: of the model; None reads the module's own `config`.
        shard_bytes: most bytes of tensors in one file.
        progress: called on the rank that writes, after each piece.

    Returns:
        What was written; the same on every rank.

    Raises:
        ConfigError: a config that is missing or not supported.
        LayoutError: everything about the module, or about `scales`, that does not fit.
        NumericError: NaN or infinity in weights to be quantised, of all of them.
        JobError: the destination is taken, the disk too small, a write failed.
    """
    config = _config_of(model) if config is None else config
    table = specs(config)
    raise_if(_wrong_scales(scales or {}, table.entries), LayoutError)
    homes = find_homes(model, table.entries, device_mesh=device_mesh)
    job = _Job(homes, config, quantization, scales or {}, shard_bytes)
    ticker = Ticker(sum(home.nbytes for home in homes), progress if ranks.writes() else None)
    pieces = _pieces(homes, quantization)
    all_ranks = ranks.Together()
    with all_ranks.standing():
        with job.writing(Path(path)) if ranks.writes() else contextlib.nullcontext() as writer:
            all_ranks.require_all_well()  # the destination is free
            for piece in pieces:
                if piece is not None and writer is not None:
                    job.write(piece, writer, ticker)
                all_ranks.require_all_well()
        all_ranks.require_all_well()
    return ranks.agree(job.report(Path(path), ticker.seconds), None)


def _config_of(model: nn.Module) -> MiniMaxConfig:
    own: Any = getattr(model, "config", None)
    if not hasattr(own, "to_diff_dict"):
        expected, remedy = "a config of transformers", "pass config=..."
        raise ConfigError(Problem(what="the module has no config", expected=expected, got=repr(own), remedy=remedy))
    return MiniMaxConfig.from_dict(own.to_diff_dict())


def _wrong_scales(scales: Scales, entries: Iterable[Entry]) -> Iterator[Problem]:
    grids = {entry.native + SCALE_SUFFIX: entry.grid for entry in entries if entry.row.scaled}
    for name, grid in scales.items():
        if tuple(grid.shape) != grids.get(name):
            expected = None if name not in grids else str(list(grids[name]))
            got = str(list(grid.shape))
            yield Problem(what="not the source scales of a native tensor", key=name, expected=expected, got=got)


def _pieces(homes: Iterable[Home], quantization: bool) -> Iterator[Home | None]:
    """Every tensor whole, some rows or experts at a time, on the rank that writes; None on the others."""
    for home in homes:
        rows = home.shape[0]
        row_bytes = home.nbytes // rows
        one_piece = quantization and home.entry.row.scaled and not home.entry.row.grouped
        at_once = rows if one_piece else max(1, _PIECE_BYTES // row_bytes)
        for start in range(0, rows, at_once):
            box = (range(start, min(start + at_once, rows)), *map(range, home.shape[1:]))
            with uninterrupted():
                local = ranks.gather(home, box)
            whole = None if local is None else local.cpu()
            yield None if whole is None else dataclasses.replace(home, layout=None, region=box, local=whole)


class _Job:
    """The work of the rank that writes."""

    def __init__(self, homes: list[Home], config: MiniMaxConfig, quantization: bool, scales: Scales, shard_bytes: int):
        self._quantization = quantization
        self._scales = scales
        self._kept: list[str] = []
        self._fresh: list[str] = []
        self._problems: list[Problem] = []
        self._read_bytes = sum(home.nbytes for home in homes)
        dtype = str(homes[0].local.dtype).removeprefix("torch.")
        self._config = config.replace(dtype=dtype, weight_block_size=config.block if quantization else None)
        self._tensors = [
            TensorOut(key=spec.key, dtype=spec.dtype, shape=spec.shape)
            for home in homes
            for spec in home.entry.hf_specs(self._dtype(home))
        ]
        self._shards = lay_out(self._tensors, shard_bytes=shard_bytes)

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[Writer]:
        """A writer of all pieces; when the block ends well they are a checkpoint at `path`, else nothing is."""
        with appearing(path) as folder:
            with Writer(folder, self._shards) as writer:
                yield writer
                raise_if(self._problems, NumericError)
                writer.finish()
            write_json_atomic(folder / "config.json", self._config.to_dict())

    def write(self, piece: Home, writer: Writer, ticker: Ticker) -> None:
        """Write one piece."""
        self._write_piece(piece, writer)
        ticker.tick(piece.local.nbytes)
        if piece.local.nbytes >= _RETURN_BYTES:
            memory.return_freed()

    def _dtype(self, home: Home) -> str:
        return _FP8 if self._quantization and home.entry.row.scaled else TORCH_NAMES[home.local.dtype]

    def _write_piece(self, piece: Home, writer: Writer) -> None:
        for key, tensor, offset_bytes, source in _stored(piece, self._source(piece)):
            array = as_numpy(tensor)
            if self._dtype(piece) != _FP8:
                writer.write(key, array, offset_bytes)
                continue
            poisoned = tensor.numel() - int(torch.isfinite(tensor).sum())
            if poisoned:
                what, got = "NaN or infinity in a weight to be quantised", f"{poisoned} such values"
                self._problems.append(Problem(what=what, key=key, got=got, remedy="repair it, or save without FP8"))
                continue
            scaled, kept = quantize_leaf(_matrix_entry(key, array, piece.entry), array, source)
            (self._kept if kept[key] else self._fresh).append(key)
            writer.write(key, np.asarray(scaled.values))
            writer.write(key + SCALE_SUFFIX, np.asarray(scaled.scale_inv))

    def _source(self, piece: Home) -> HostArray | None:
        """The source scales of a piece, if there are any."""
        grid = self._scales.get(piece.entry.native + SCALE_SUFFIX)
        if grid is None:
            return None
        held = as_numpy(grid.cpu()) if isinstance(grid, torch.Tensor) else np.asarray(grid)
        return held[piece.region[0].start : piece.region[0].stop] if piece.entry.row.grouped else held

    def report(self, path: Path, seconds: float) -> Report:
        """What was done."""
        return Report(
            destination=path,
            tensors=len(self._tensors),
            read_bytes=self._read_bytes,
            written_bytes=sum(shard.file_bytes for shard in self._shards),
            seconds=seconds,
            kept_scales=len(self._kept),
            fresh_scales=tuple(sorted(self._fresh)),
        )


class _Stored(NamedTuple):
    """A tensor to be written, or some rows of it, and the source scales of a weight."""

    key: str
    tensor: torch.Tensor
    offset_bytes: int
    source: HostArray | None


def _stored(piece: Home, source: HostArray | None) -> Iterator[_Stored]:
    entry, first = piece.entry, piece.region[0].start
    if not entry.row.grouped:
        local = piece.local.contiguous()
        yield _Stored(entry.keys[0][0], local, first * local.nbytes // len(local), source)
        return
    for at, keys in enumerate(entry.keys[first : piece.region[0].stop]):
        grids = [None] * entry.parts if source is None else np.split(source[at], entry.parts, axis=1)
        for slot, grid in zip(piece.slots(at), grids, strict=True):
            own = None if grid is None else np.ascontiguousarray(grid.T)
            yield _Stored(keys[slot.part], experts.contiguous(slot.place), 0, own)


def _matrix_entry(key: str, matrix: HostArray, like: Entry) -> Entry:
    """An entry for one weight by itself."""
    row = Row(native=key, parts=(key,), axes=("rows", "cols"), dtype=_FP8)
    return Entry(row=row, native=key, layer=like.layer, keys=((key,),), part_shape=matrix.shape, block=like.block)
