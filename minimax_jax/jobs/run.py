"""Runs a plan: reads, converts and writes units on several threads, inside the plan's memory."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import JobError, Problem
from minimax_jax.io.checkpoint import side_files
from minimax_jax.io.files import io_errors
from minimax_jax.io.folder import appearing
from minimax_jax.io.jsonfile import write_json_atomic
from minimax_jax.io.reader import Reader
from minimax_jax.io.writer import Writer
from minimax_jax.jobs.heap import give_back
from minimax_jax.jobs.plan import Convert, Copy, GroupScales, Plan, Unit
from minimax_jax.jobs.quantize import quantize_leaf
from minimax_jax.jobs.source import SIDECAR_STEM, Source
from minimax_jax.layout.specs import Entry
from minimax_jax.layout.table import SCALE_SUFFIX
from minimax_jax.leaves import Leaf, emit, group_scales, load, native_leaf, recast
from minimax_jax.ops.checks import Array
from minimax_jax.ops.scaled import BlockScaled
from minimax_jax.progress import Progress, Ticker

HostArray: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a conversion did.

    Attributes:
        destination: the folder that was written.
        tensors: how many tensors it holds, the sidecar's apart.
        read_bytes: bytes of tensors read.
        written_bytes: bytes of files written, side files apart.
        seconds: wall-clock time.
        kept_scales: weights that were quantised with their source scales, byte for byte what they were.
        fresh_scales: names of weights that were quantised with scales by amax.
    """

    destination: Path
    tensors: int
    read_bytes: int
    written_bytes: int
    seconds: float
    kept_scales: int
    fresh_scales: tuple[str, ...]


def run(plan: Plan, destination: str | Path, *, progress: Callable[[Progress], None] | None = None) -> Report:
    """Run a plan. The destination appears whole, by rename, or not at all.

    Args:
        plan: what to do.
        destination: a folder that does not exist yet, or is empty.
        progress: called on the calling thread after each unit.

    Raises:
        JobError: the destination is taken, the disk too small, a write failed.
        FormatError: the source changed or ends too early while it is read.
        NumericError: a weight to be quantised holds NaN or infinity.
    """
    ticker = Ticker(plan.read_bytes, progress)
    with appearing(destination) as folder:
        _require_disk(folder, plan.write_bytes)
        _copy_side_files(plan, folder)
        write_json_atomic(folder / "config.json", plan.config.to_dict())
        with contextlib.ExitStack() as stack:
            worker = _Worker(plan, folder, stack)
            pool = stack.enter_context(ThreadPoolExecutor(plan.workers, thread_name_prefix="convert"))
            stack.callback(pool.shutdown, cancel_futures=True)  # the first error stops the rest
            futures = {pool.submit(worker.do, unit): unit.read_bytes for unit in plan.units}
            for future in as_completed(futures):
                future.result()
                ticker.tick(futures[future])
            worker.finish()
    return Report(
        destination=Path(destination),
        tensors=sum(len(shard.tensors) for shard in plan.shards),
        read_bytes=plan.read_bytes,
        written_bytes=plan.write_bytes,
        seconds=ticker.seconds,
        kept_scales=worker.kept_scales,
        fresh_scales=tuple(sorted(worker.fresh_scales)),
    )


def read_leaf(source: Source, reader: Reader, entry: Entry, first: int, dtype: np.dtype[Any] | None = None) -> Leaf:
    """Some experts of an entry (`first` is the first of them) as a native leaf.

    `dtype` is what FP8 weights are dequantised to; None keeps them.
    """
    if source.survey.layout == "hf":
        tensors = {spec.key: reader.read(source.checkpoint.tensors[spec.key]) for spec in source.specs(entry)}
        return load(entry, tensors, dtype)
    infos, rows = source.checkpoint.tensors, _rows(entry, first)
    return native_leaf(entry, {spec.key: reader.read(infos[spec.key], *rows) for spec in source.specs(entry)})


def _rows(entry: Entry, first: int) -> tuple[int, int] | tuple[None, None]:
    """The rows of a native tensor that hold some experts of an entry; all of one that does not group."""
    return (first, first + entry.experts) if entry.row.grouped else (None, None)


class _Worker:
    """Executes units; safe to call from several threads."""

    def __init__(self, plan: Plan, folder: Path, stack: contextlib.ExitStack):
        self.plan = plan
        self.reader = stack.enter_context(Reader(plan.source.readable))
        outputs = [(plan.sidecar, SIDECAR_STEM), (plan.shards, "model")]
        self.writers = [stack.enter_context(Writer(folder, shards, stem=stem)) for shards, stem in outputs if shards]
        self.writer_of = {key: writer for writer in self.writers for shard in writer.shards for key in shard.tensors}
        self.kept_scales = 0
        self.fresh_scales: list[str] = []
        self._lock = threading.Lock()

    def do(self, unit: Unit) -> None:
        """Read, convert and write one unit."""
        match unit:
            case Copy():
                self._copy(unit)
            case Convert():
                self._convert(unit)
            case GroupScales():
                self._group_scales(unit)
        give_back(unit.memory_bytes)

    def finish(self) -> None:
        """Make the files whole."""
        for writer in self.writers:
            writer.finish()

    def _copy(self, unit: Copy) -> None:
        buffer = np.empty(unit.read_bytes, np.uint8)
        self.reader.read_into(unit.info.file, unit.info.start + unit.start, buffer)
        self._write(unit.key, buffer, unit.start)

    def _convert(self, unit: Convert) -> None:
        entry, target = unit.entry, self.plan.target
        keep = target.layout == "hf" or target.dtype == "F8_E4M3"
        dtype = DTYPES[target.dtype]
        leaf = read_leaf(self.plan.source, self.reader, entry, unit.first, None if keep else dtype)
        if target.dtype == "F8_E4M3" and not isinstance(leaf, BlockScaled):
            leaf = self._quantize(unit, leaf)
        out = (emit if target.layout == "hf" else recast)(entry, leaf, dtype)
        for spec in self.plan.written(entry):
            offset_bytes = unit.first * spec.nbytes // entry.experts if target.layout == "native" else 0
            self._write(spec.key, np.asarray(out[spec.key]), offset_bytes)

    def _quantize(self, unit: Convert, leaf: Array) -> BlockScaled:
        scaled, kept = quantize_leaf(unit.entry, leaf, self._source_scales(unit))
        with self._lock:
            self.kept_scales += sum(kept.values())
            self.fresh_scales += [key for key, same in kept.items() if not same]
        return scaled

    def _group_scales(self, unit: GroupScales) -> None:
        entry, infos = unit.entry, self.plan.source.checkpoint.tensors
        scales = {spec.key: self.reader.read(infos[spec.key]) for spec in entry.scale_specs()}
        grouped = np.asarray(group_scales(entry, scales))
        self._write(entry.native + SCALE_SUFFIX, grouped, unit.first * grouped.nbytes // entry.experts)

    def _source_scales(self, unit: Convert) -> HostArray | None:
        info = self.plan.source.sidecar.get(unit.entry.native + SCALE_SUFFIX)
        return None if info is None else self.reader.read(info, *_rows(unit.entry, unit.first))

    def _write(self, key: str, data: HostArray, offset_bytes: int) -> None:
        self.writer_of[key].write(key, data, offset_bytes)


def _require_disk(folder: Path, needed_bytes: int) -> None:
    with io_errors(JobError, "free disk cannot be told", folder):
        free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        expected, got = f"{needed_bytes:,} bytes", f"{free_bytes:,} bytes free"
        what, remedy = "not enough disk", "free some space, or choose a destination on another disk"
        raise JobError(Problem(what=what, file=str(folder.parent), expected=expected, got=got, remedy=remedy))


def _copy_side_files(plan: Plan, folder: Path) -> None:
    for file in side_files(plan.source.path):
        with io_errors(JobError, "side file cannot be copied", file):
            shutil.copyfile(file, folder / file.name)
