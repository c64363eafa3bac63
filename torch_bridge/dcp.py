"""Native tensors to and from folders of `torch.distributed.checkpoint`."""

from __future__ import annotations

import contextlib
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from minimax_jax.errors import CheckpointError, FormatError, JobError, LayoutError, Problem, raise_if
from minimax_jax.io.files import io_errors
from minimax_jax.io.folder import appearing
from minimax_jax.io.journal import Journal, has_records
from minimax_jax.io.jsonfile import write_json_atomic
from minimax_jax.jobs.budget import peak_bytes, require_workers
from minimax_jax.jobs.card import add_side_files, require_side_files
from minimax_jax.jobs.certifying import certify_unnamed
from minimax_jax.jobs.records import Check, noted, quantised
from minimax_jax.jobs.run import Report
from minimax_jax.jobs.scales import scale_remarks
from minimax_jax.jobs.source import Source, require_own_layout
from minimax_jax.jobs.stamp import stamp
from minimax_jax.jobs.streamed import StreamedPlan
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.nearby import did_you_mean
from minimax_jax.paths import path_of
from minimax_jax.progress import Progress, Ticker
from torch_bridge import ranks
from torch_bridge.chunks import Maker, Unit, plan_units
from torch_bridge.dcp_items import Items, Spot, chunks_by_file
from torch_bridge.dcp_reader import Reader
from torch_bridge.dcp_writer import Files, Nameless, Planner

_CONFIG, _METADATA = "config.json", ".metadata"


def save(tensors: Mapping[str, torch.Tensor], path: str | Path, config: MiniMaxConfig) -> None:
    """Write native tensors, plain or DTensors, as a folder that appears whole, by rename, or not at all.

    Where torch is distributed this is a collective of all ranks, which must see the same file system.

    Args:
        tensors: by native name; not changed.
        path: a folder that does not exist yet, or is empty.
        config: of the model; stands beside the tensors as config.json.

    Raises:
        JobError: the destination is taken, or a write failed; on every rank.
    """
    with ranks.appearing_for_all(path) as folder:
        with _quiet(), _own_errors(JobError, "checkpoint cannot be written", folder):
            state_dict_saver.save(dict(tensors), storage_writer=Nameless(folder))
        if ranks.writes():
            write_json_atomic(folder / _CONFIG, config.to_dict())


def load(tensors: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Read a folder into native tensors, plain or DTensors, in place; sharded in any way, whatever wrote it.

    Unlike `torch.distributed.checkpoint.load`, which casts in silence and leaves unread what it is not asked for.

    Args:
        tensors: by native name.
        path: a folder written by `save`, by `write`, or by torch itself.

    Raises:
        FormatError: no such checkpoint, or one that cannot be read.
        LayoutError: all tensors that only one side has, or of another shape or dtype; nothing has been read then.
    """
    path = path_of(path)
    with _own_errors(FormatError, "no checkpoint can be opened here", path):
        metadata = Reader(path).read_metadata()
    raise_if(_misfits(tensors, metadata, path), LayoutError)
    with _quiet(), _own_errors(FormatError, "checkpoint cannot be read", path):
        state_dict_loader.load(dict(tensors), storage_reader=Reader(path))


def plan(source: Source, *, dtype: str, max_memory_bytes: int, workers: int) -> StreamedPlan:
    """What `write` would do with the same arguments, from headers alone.

    Raises:
        LayoutError: the source is in a layout that is not read here.
        JobError: the budget is too small.
        RequestError: no workers.
    """
    require_workers(workers)
    require_own_layout(source)
    units = plan_units(source, dtype, max_memory_bytes=max_memory_bytes, workers=workers)
    return StreamedPlan(
        source=source,
        to="dcp",
        dtype=dtype,
        units=len(units),
        tensors=_tensors(units),
        read_bytes=sum(unit.read_bytes for unit in units),
        write_bytes=_written_bytes(units),
        peak_bytes=peak_bytes(units, workers + 1),  # one is handed over to be written
        workers=workers,
    )


def write(
    source: Source,
    destination: Path,
    *,
    dtype: str,
    max_memory_bytes: int,
    workers: int,
    check: Check = "sample",
    restart: bool = False,
    certify: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Convert an opened checkpoint to a folder of native tensors, a few experts at a time.

    The folder appears whole, by rename, or not at all. When it fails or is killed, what was done is kept beside it, and
    the same job goes on from there, as `minimax_jax.convert` does for other targets. Another version of torch is
    another job.

    It holds config.json and the side files too, and any number of ranks read it, with any sharding.

    Args:
        source: what is read, in either layout.
        destination: a folder that does not exist yet, or is empty.
        dtype: format name of the dtype of block-scaled weights: `BF16`, `F32`, or `F8_E4M3`, whose block scales stand
            beside it by native scale name. Other tensors keep theirs.
        max_memory_bytes: peak memory.
        workers: conversions at a time.
        check: which units to read back from the disk before the folder takes its name.
        restart: throw away what an earlier run left, instead of going on with it.
        certify: read all of it again at the end, and leave a certificate in it.
        progress: called on the calling thread as each unit is handed over to be written.

    Raises:
        JobError: the destination is taken, the budget or the disk too small, a write failed; the unfinished work of
            another job stands in the way; what was read back is not what was written.
        FormatError: the source changed or ends too early while it is read.
        NumericError: a weight to be quantised holds NaN or infinity.
    """
    require_workers(workers)
    require_own_layout(source)
    units = plan_units(source, dtype, max_memory_bytes=max_memory_bytes, workers=workers)
    ticker = Ticker(sum(unit.read_bytes for unit in units), progress)
    mine = _stamp(source, units, dtype)
    with appearing(destination, worth=has_records, restart=restart) as folder:
        found = noted(folder, mine)
        _require_disk(folder, _written_bytes(units))
        require_side_files(source, folder)
        (folder / _METADATA).unlink(missing_ok=True)
        with source.reader() as reader, Journal(folder.parent, mine) as journal:
            items = Items(folder, units, journal, found)

            def written() -> list[Spot]:
                spots = items.write(Maker(source, reader, dtype), workers, ticker, check)
                reader.require_unchanged()
                return spots

            with _quiet(), _own_errors(JobError, "checkpoint cannot be written", folder):
                state_dict_saver.save({}, storage_writer=Files(folder, written), planner=Planner(units), no_dist=True)
        written_bytes = sum(file.stat().st_size for file in (folder / _METADATA, *folder.glob(f"*{DEFAULT_SUFFIX}")))
        add_side_files(source, folder, form="dcp", dtype=dtype)
        write_json_atomic(folder / _CONFIG, _config(source, dtype).to_dict())
        seconds = ticker.seconds
        how: dict[str, Any] = {"ignore": source.config.extra, "workers": workers, "progress": progress}
        certified = certify_unnamed(folder, Path(destination), **how) if certify else None
    kept, fresh = quantised(items.records)
    return Report(
        destination=Path(destination),
        tensors=_tensors(units),
        read_bytes=sum(unit.read_bytes for unit in units),
        written_bytes=written_bytes,
        seconds=seconds,
        kept_scales=kept,
        fresh_scales=fresh,
        read_tensors=len(source.checkpoint.tensors),
        remarks=tuple(scale_remarks(source, dtype, beside=False, all_fresh=bool(fresh) and not kept)),
        left_out=source.left_out,
        left_behind=source.left_behind,
        certified=certified,
    )


def _tensors(units: list[Unit]) -> int:
    return len({chunk.whole.key for unit in units for chunk in unit.chunks})


def _written_bytes(units: list[Unit]) -> int:
    return sum(chunk.nbytes for unit in units for chunk in unit.chunks)


def _misfits(tensors: Mapping[str, torch.Tensor], metadata: Metadata, path: Path) -> Iterator[Problem]:
    stored, file = metadata.state_dict_metadata, str(path)
    for name, tensor in tensors.items():
        there = stored.get(name)
        expected = f"{tensor.dtype} {list(tensor.shape)}"
        if not isinstance(there, TensorStorageMetadata):
            yield Problem(what="the checkpoint has no such tensor", file=file, key=name, expected=expected)
        elif (there.properties.dtype, there.size) != (tensor.dtype, tensor.shape):
            got = f"{there.properties.dtype} {list(there.size)}"
            yield Problem(what="another tensor than asked for", file=file, key=name, expected=expected, got=got)
    for name in stored:
        if name not in tensors:
            yield Problem(what="a tensor that nobody asked for", file=file, key=name, remedy="ask for all of them")


def _require_disk(folder: Path, needed_bytes: int) -> None:
    with io_errors(JobError, "free disk cannot be told", folder):
        free_bytes = shutil.disk_usage(folder).free
        needed_bytes -= sum(file.stat().st_size for file in folder.iterdir())  # what an earlier run left
    if free_bytes < needed_bytes:
        expected, got = f"{needed_bytes:,} bytes", f"{free_bytes:,} bytes free"
        what, remedy = "not enough disk", "free some space, or choose a destination on another disk"
        raise JobError(Problem(what=what, file=str(folder), expected=expected, got=got, remedy=remedy))


def _config(source: Source, dtype: str) -> MiniMaxConfig:
    """The config of what is written."""
    return source.config.replace(weight_block_size=source.config.block if dtype == "F8_E4M3" else None)


def _stamp(source: Source, units: Sequence[Unit], dtype: str) -> dict[str, str]:
    """Which job it is: one is torch's as well, which makes bytes of tensors."""
    files = "\n".join(map(str, chunks_by_file(units))).encode()
    of_all = stamp(source, target=f"dcp {dtype}", config=_config(source, dtype), division={"files": files})
    return of_all | {"torch": torch.__version__}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that there is one process: that is what one process wants."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


_UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    ImportError,
    AttributeError,
    ValueError,
    IndexError,
    KeyError,
    TypeError,
)
"""What Python's pickle says of damaged metadata."""


@contextlib.contextmanager
def _own_errors(kind: type[CheckpointError], what: str, path: Path) -> Iterator[None]:
    """Turn what torch makes of an error back into it; any other becomes `kind`."""
    try:
        yield
    except (CheckpointException, OSError, *_UNREADABLE) as error:
        causes = [pair[0] for pair in getattr(error, "failures", {}).values()] or [error]
        for cause in causes:
            if isinstance(cause, CheckpointError) or not isinstance(cause, Exception):
                raise cause from error
        got = f"{type(causes[0]).__name__}: {causes[0]}"
        remedy = did_you_mean(path) if kind is FormatError else None
        raise kind(Problem(what=what, file=str(path), got=got, remedy=remedy)) from error
