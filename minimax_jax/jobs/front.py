"""The jobs by path: what the package exports as `inspect`, `plan` and `convert`; `after` has what comes then.

What needs jax is imported where it is called: looking at a checkpoint and planning answer without it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimax_jax.io.folder import require_apart
from minimax_jax.io.shards import DEFAULT_SHARD_BYTES
from minimax_jax.jobs import inspect as inspecting
from minimax_jax.jobs import plan as planning
from minimax_jax.jobs.budget import workers_within
from minimax_jax.jobs.plan import DEFAULT_MEMORY_BYTES, Plan
from minimax_jax.jobs.source import open_source
from minimax_jax.jobs.streamed import StreamedPlan, goes_on, load_planner, load_target, streamed_targets
from minimax_jax.jobs.targets import require_certifiable, require_known, target
from minimax_jax.progress import Progress

if TYPE_CHECKING:
    from minimax_jax.jobs.records import Check
    from minimax_jax.jobs.run import Report


def inspect(
    path: str | Path, *, ignore: Collection[str] = (), leave_out: Collection[str] = ()
) -> inspecting.Inspection:
    """What a checkpoint is, from its headers; takes and raises what `open_source` does.

    Examples:
        >>> mj.synthesize("MiniMax-M2")
        >>> seen = mj.inspect("MiniMax-M2")
        >>> seen.layout, seen.total.tensors, list(seen.by_dtype)
        ('hf', 79, ['BF16', 'F8_E4M3', 'F32'])
    """
    return inspecting.inspect(open_source(path, ignore=ignore, leave_out=leave_out))


def plan(
    path: str | Path,
    *,
    to: str = "native",
    dtype: str | None = None,
    max_memory_bytes: int = DEFAULT_MEMORY_BYTES,
    workers: int | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    ignore: Collection[str] = (),
    leave_out: Collection[str] = (),
) -> Plan | StreamedPlan:
    """What a conversion would do, from headers alone.

    Args:
        path: the checkpoint to convert.
        to: `native`, `hf`, `hf-fp8`, or `transformers-v5`: the state dict of transformers' module, experts fused; or
            `orbax`, `dcp`: native in the files of Orbax or of torch.distributed.checkpoint; or `maxtext`,
            `maxtext-unscanned`: MaxText's params in the files of Orbax. Of these four the plan is in numbers alone.
        dtype: of block-scaled weights in the output: `bf16` (the default but for hf-fp8), `f32`, `fp8`.
        max_memory_bytes: budget over what the process has at the start.
        workers: threads; one for each core where it is None, at most 8 and as many as the budget holds, at least 2.
        shard_bytes: most bytes of tensor data in one output file; of targets in safetensors.
        ignore: attributes of config.json to leave unread.
        leave_out: what the names of tensors to leave out begin with; as in `open_source`.

    Raises:
        CheckpointError: as `open_source`; JobError where the budget is too small; RequestError where the target makes
            no sense, or does not know what is asked for.

    Examples:
        >>> mj.synthesize("MiniMax-M2")
        >>> planned = mj.plan("MiniMax-M2", to="native", dtype="fp8")
        >>> planned.read_bytes, planned.write_bytes
        (921120, 925408)
    """
    chosen = target(to, dtype)
    workers = workers_within(max_memory_bytes) if workers is None else workers
    if to in streamed_targets():
        require_known(to, shard_bytes=shard_bytes)
        planner, source = load_planner(to), open_source(path, ignore=ignore, leave_out=leave_out)
        return planner(source, dtype=chosen.dtype, max_memory_bytes=max_memory_bytes, workers=workers)
    return planning.plan(
        open_source(path, ignore=ignore, leave_out=leave_out),
        chosen,
        max_memory_bytes=max_memory_bytes,
        workers=workers,
        shard_bytes=shard_bytes,
    )


def convert(
    path: str | Path,
    destination: str | Path,
    *,
    to: str = "native",
    dtype: str | None = None,
    max_memory_bytes: int = DEFAULT_MEMORY_BYTES,
    workers: int | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    check: Check | None = None,
    restart: bool = False,
    certify: bool = False,
    distributed: bool = False,
    ignore: Collection[str] = (),
    leave_out: Collection[str] = (),
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Convert a checkpoint out of core: `plan`, then run.

    The destination appears whole, by rename, or not at all; the same call again goes on with what a failed or killed
    one has done. A float native output carries the block scales of an FP8
    source in `source_scales.safetensors`, with which a later `hf-fp8` returns unchanged weights byte for byte.

    Args:
        path: the checkpoint to convert.
        destination: a folder that does not exist yet, or is empty.
        to: as in `plan`. `orbax`, `dcp`, `maxtext` and `maxtext-unscanned` take neither `distributed` nor
            `shard_bytes`.
        dtype: as in `plan`.
        max_memory_bytes: as in `plan`.
        workers: as in `plan`.
        shard_bytes: as in `plan`.
        check: which units to read back from the disk at the end: `none`, `sample` (the default), `all`.
        restart: throw away the unfinished work of an earlier run instead of going on with it.
        certify: read all of the output again at the end, and leave `certificate.json` in it, and a card that names it;
            the command line does so unless it is told not to.
        distributed: share the work with the other processes of `jax.distributed`; see `jobs.team.distributed_team`.
        ignore: as in `plan`.
        leave_out: as in `plan`.
        progress: called as the work goes on.

    Raises:
        CheckpointError: as `plan`; JobError where the destination is taken or within the source, the disk too small, a
            write fails; RequestError as `plan`; NumericError where a weight to be quantised holds NaN or infinity.

    Examples:
        >>> mj.synthesize("MiniMax-M2")
        >>> mj.convert("MiniMax-M2", "m2-native").tensors
        27
        >>> report = mj.convert("m2-native", "m2-back", to="hf-fp8")
        >>> report.kept_scales, report.fresh_scales
        (32, ())
    """
    chosen = target(to, dtype)
    workers = workers_within(max_memory_bytes) if workers is None else workers
    if certify:
        require_certifiable(to)
    require_apart(path, destination)
    if to in streamed_targets():
        write = load_target(to)
        asked: dict[str, Any] = {"check": check, "restart": restart}
        require_known(to, shard_bytes=shard_bytes, distributed=distributed, goes_on=goes_on(write), **asked)
        source = open_source(path, ignore=ignore, leave_out=leave_out)
        how: dict[str, Any] = asked | {"check": check or "sample"} if goes_on(write) else {}
        how |= {"certify": True} if certify else {}
        how |= {"max_memory_bytes": max_memory_bytes, "workers": workers, "progress": progress}
        return write(source, Path(destination), dtype=chosen.dtype, **how)
    from minimax_jax.jobs.run import run
    from minimax_jax.jobs.team import SOLO, distributed_team

    team = distributed_team() if distributed else SOLO
    planned = planning.plan(
        open_source(path, ignore=ignore, leave_out=leave_out),
        chosen,
        max_memory_bytes=max_memory_bytes,
        workers=workers,
        shard_bytes=shard_bytes,
    )
    how = {"check": check or "sample", "restart": restart, "certify": certify}
    return run(planned, destination, team=team, progress=progress, **how)
