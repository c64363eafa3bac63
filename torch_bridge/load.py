"""A checkpoint folder streamed into the storage of a torch module, at the memory of the module and a budget."""

from __future__ import annotations

import functools
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import JobError, LayoutError, Problem, raise_if
from minimax_jax.jobs.budget import FOR_A_CALL, over_budget, require_workers, share_bytes
from minimax_jax.jobs.left_out import LeftOut
from minimax_jax.jobs.source import Source, open_source, require_own_layout
from minimax_jax.layout.table import SCALE_SUFFIX
from torch_bridge import experts, fp8, memory
from torch_bridge.arrays import TORCH, to_torch
from torch_bridge.boxes import Boxes
from torch_bridge.experts import Filling, Part
from torch_bridge.homes import Home, Slot, find_homes

DEFAULT_MEMORY_BYTES = 2**30
DEFAULT_WORKERS = 2

_PIECE_BYTES = 2**26
"""Most memory of one piece of work, where it can be split: larger ones are no faster."""

_RETURN_BYTES = 2**23
"""Pieces of this size leave enough behind to give it back to the system."""

_FP8 = "F8_E4M3"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What `load_into` did on this rank.

    Attributes:
        tensors: tensors of the module that were filled.
        read_bytes: bytes read of the checkpoint's tensors.
        seconds: wall-clock time.
        left_out: tensors in the checkpoint's files that are not the model's, and that nothing read.
    """

    tensors: int
    read_bytes: int
    seconds: float
    left_out: tuple[LeftOut, ...] = ()


def load_into(
    model: nn.Module,
    path: str | Path,
    device_mesh: DeviceMesh | None = None,
    *,
    max_memory_bytes: int = DEFAULT_MEMORY_BYTES,
    workers: int = DEFAULT_WORKERS,
    partial: bool = False,
    narrow: bool = False,
    ignore: Collection[str] = (),
    leave_out: Collection[str] = (),
) -> Loaded:
    """Stream a checkpoint into the storage of a module, each rank what it holds.

    FP8 weights are dequantised on the module's device, to the dtype that the module has for them, wherever a shard
    begins. Of experts and rows that other ranks hold nothing is read; of a matrix that is cut by columns, short rows
    are read whole. No collectives: ranks do not wait for each other.

    Args:
        model: NeMo AutoModel's `MiniMaxM2ForCausalLM`, transformers', or any module with the names and shapes of one of
            them; plain tensors and DTensors, with memory. Parameters that are frozen are filled like any other.
        path: a Hugging Face checkpoint, FP8 or float, or a native one; a folder or one safetensors file.
        device_mesh: see `homes.find_homes`.
        max_memory_bytes: for everything beside the module itself.
        workers: pieces of work at a time.
        partial: whether the module may lack tensors of the checkpoint, as one stage of a pipeline does.
        narrow: round tensors that the module has in a smaller dtype than the checkpoint: norms, embeddings and the
            float32 router, of which a choice of experts may hang. Block-scaled weights need no permission.
        ignore: attributes of config.json to leave unread.
        leave_out: what the names of tensors to leave out begin with; as in `minimax_jax.jobs.source.open_source`.

    Raises:
        CheckpointError: as `minimax_jax.jobs.source.open_source`.
        LayoutError: everything about module and checkpoint that does not fit; nothing has been written then.
        JobError: a budget below what one piece of work takes.
        FormatError: the checkpoint changed while it was read; the module is filled in part then.
    """
    started = time.monotonic()
    source = open_source(path, ignore=ignore, leave_out=leave_out)
    require_own_layout(source)
    homes = find_homes(model, source.survey.specs.entries, device_mesh=device_mesh, partial=partial)
    raise_if(() if narrow else _narrowed(homes, source), LayoutError)
    require_workers(workers)
    pieces = list(_pieces(homes, source, max_memory_bytes, workers))
    with source.reader() as reader:
        filler = _Filler(source, Boxes(reader))
        _run(filler, pieces, workers)
    return Loaded(
        tensors=len(homes),
        read_bytes=filler.boxes.read_bytes,
        seconds=time.monotonic() - started,
        left_out=source.left_out,
    )


def _run(filler: _Filler, pieces: list[Home], workers: int) -> None:
    pool = ThreadPoolExecutor(workers, thread_name_prefix="load")
    try:
        for done in as_completed([pool.submit(filler.fill, piece) for piece in pieces]):
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)  # the first error stops the rest


def _narrowed(homes: Iterable[Home], source: Source) -> Iterator[Problem]:
    """A problem for each tensor whose bits the module cannot hold."""
    for home in homes:
        stored, held = TORCH[source.survey.dtypes[home.entry.native]], home.local.dtype
        if not home.entry.row.scaled and torch.promote_types(stored, held) != held:
            remedy = "keep it wide in the module, or allow rounding with narrow=True"
            got = f"{held} in the module"
            yield Problem(what="a tensor would be rounded", key=home.name, expected=str(stored), got=got, remedy=remedy)


def _pieces(homes: Iterable[Home], source: Source, max_memory_bytes: int, workers: int) -> Iterator[Home]:
    """What to fill, in pieces of which `workers` at a time keep to the budget."""
    most_bytes = share_bytes(max_memory_bytes, workers)
    problems: list[Problem] = []
    for home in homes:
        needed_bytes = _row_bytes(home, source)
        if home.local.numel():
            problems += over_budget(needed_bytes, max_memory_bytes, workers, key=home.name, remedy=FOR_A_CALL)
        yield from home.batches(max(1, min(_PIECE_BYTES, most_bytes) // needed_bytes))
    raise_if(problems, JobError)


def _row_bytes(home: Home, source: Source) -> int:
    """Peak memory for one row, or one expert: what is read and its device copy, the output and two like it."""
    elements = int(np.prod(home.entry.shape[1:]))
    read = elements * DTYPES[source.survey.dtypes[home.entry.native]].itemsize
    return 2 * read + 3 * elements * home.local.itemsize


class _Filler:
    """Fills homes from one checkpoint; safe to call from several threads."""

    def __init__(self, source: Source, boxes: Boxes):
        self.source = source
        self.boxes = boxes

    def fill(self, home: Home) -> None:
        """Read, dequantise and write one piece."""
        if not home.entry.row.grouped:
            self._fill_plain(home)
        elif home.turned and home.whole_parts and self._is_hf:
            fillings = (Filling(home.local[at], self._parts(home, at)) for at in range(len(home.local)))
            experts.fill(home.local, fillings, home.entry.block)
        else:
            for at in range(len(home.local)):
                for slot, part in zip(home.slots(at), self._parts(home, at), strict=True):
                    _place(slot.place, _weights(part, home))
        if home.local.nbytes >= _RETURN_BYTES:
            memory.return_freed()

    @property
    def _is_hf(self) -> bool:
        return self.source.survey.layout == "hf"

    def _fill_plain(self, home: Home) -> None:
        key = home.entry.keys[0][0] if self._is_hf else home.entry.native
        offset = tuple(part.start for part in home.region)
        if self._stored(home) == _FP8:
            part = Part(self._box(home, key, home.region), self._scales(home, key), (offset[0], offset[1]))
            home.local.copy_(_weights(part, home))
        else:
            home.local.copy_(self._box(home, key, home.region))

    def _parts(self, home: Home, at: int) -> tuple[Part, ...]:
        """The matrices of the expert at `at` of a grouped home, as far as it holds them."""
        slots, expert = list(home.slots(at)), home.region[0][at]
        if self._is_hf:
            return tuple(self._hf_part(home, slot, home.entry.keys[expert][slot.part]) for slot in slots)
        return self._native_parts(home, slots, expert)

    def _hf_part(self, home: Home, slot: Slot, key: str) -> Part:
        values = self._box(home, key, (slot.rows, slot.cols))
        scale_inv = self._scales(home, key) if self._stored(home) == _FP8 else None
        return Part(values, scale_inv, (slot.rows.start, slot.cols.start))

    def _native_parts(self, home: Home, slots: list[Slot], expert: int) -> tuple[Part, ...]:
        key, one = home.entry.native, range(expert, expert + 1)
        values = self._box(home, key, (one, home.cols, home.span))[0].T
        grids: tuple[torch.Tensor | None, ...] = (None,) * home.entry.parts
        if self._stored(home) == _FP8:
            _, cols, rows = home.entry.grid
            grouped = self._box(home, key + SCALE_SUFFIX, (one, range(cols), range(rows)))
            grids = tuple(grid.T for grid in grouped[0].chunk(home.entry.parts, dim=1))
        first = home.span.start
        return tuple(
            Part(values[start : start + len(slot.rows)], grids[slot.part], (slot.rows.start, slot.cols.start))
            for slot in slots
            for start in [slot.part * home.entry.part_shape[0] + slot.rows.start - first]
        )

    def _scales(self, home: Home, key: str) -> torch.Tensor:
        return self._box(home, key + SCALE_SUFFIX, [range(size) for size in home.entry.part_grid])

    def _box(self, home: Home, key: str, region: Iterable[range]) -> torch.Tensor:
        array = self.boxes.read(self.source.checkpoint.tensors[key], tuple(region))
        return to_torch(array).to(home.local.device)

    def _stored(self, home: Home) -> str:
        return self.source.survey.dtypes[home.entry.native]


def _weights(part: Part, home: Home) -> torch.Tensor:
    """The weights of a part, `[rows, cols]`, in the dtype of the home if they were FP8."""
    values, scale_inv, offset = part
    if scale_inv is None:
        return values
    dequantize = functools.partial(fp8.dequantize, dtype=home.local.dtype)
    if values.stride(1) == 1:
        return dequantize(values, scale_inv, block=home.entry.block, offset=offset)
    # As the codes lie in memory, so that nothing is transposed that need not be.
    return dequantize(values.T, scale_inv.T, block=home.entry.block[::-1], offset=offset[::-1]).T


def _place(place: torch.Tensor, weights: torch.Tensor) -> None:
    """Copy weights to their place; transposed by the fast way where the two lie across each other."""
    if place.stride(1) == 1 and weights.stride(1) != 1:
        weights = experts.contiguous(weights)
    place.copy_(weights)
