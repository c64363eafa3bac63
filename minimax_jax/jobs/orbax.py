"""Checkpoints in the files of Orbax: streamed from any checkpoint; native trees saved from memory, and read back.

    write(open_source("MiniMax-M2"), Path("m2-orbax"), dtype="BF16")  # what `convert --to orbax` does
    read("m2-orbax", shardings=shardings(config, mesh))  # the native tree, each leaf where it belongs
    ocp.load("m2-orbax")  # by Orbax alone, as stored

The folder is an Orbax checkpoint of one flat tree, with config.json and the files of the tokenizer beside it. Names are
native; an FP8 weight is its codes under its own name and its block scales, float32, under the name with
`layout.table.SCALE_SUFFIX` behind it, which `read` joins to a `BlockScaled`.

MaxText's trees are nested, and hold no FP8; the folder of the item inside is what it calls `load_parameters_path`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Sharding, SingleDeviceSharding

from minimax_jax.errors import LayoutError, Problem, raise_if
from minimax_jax.io import orbax
from minimax_jax.io.folder import appearing, workshop_of
from minimax_jax.io.header import TensorInfo
from minimax_jax.io.journal import has_records
from minimax_jax.io.jsonfile import write_json_atomic
from minimax_jax.jobs.budget import DEFAULT_WORKERS
from minimax_jax.jobs.card import add_side_files, require_side_files
from minimax_jax.jobs.certifying import certify_unnamed
from minimax_jax.jobs.left_out import require_found, warn_of
from minimax_jax.jobs.orbax_fill import fill
from minimax_jax.jobs.orbax_plan import plan
from minimax_jax.jobs.orbax_source import open_orbax
from minimax_jax.jobs.plan import DEFAULT_MEMORY_BYTES
from minimax_jax.jobs.records import Check, quantised
from minimax_jax.jobs.run import Report
from minimax_jax.jobs.scales import scale_remarks
from minimax_jax.jobs.source import Source
from minimax_jax.jobs.team import present_team
from minimax_jax.layout.check import Survey, survey
from minimax_jax.layout.config import CONFIG_NAME, MiniMaxConfig
from minimax_jax.layout.forms import Layout
from minimax_jax.layout.table import SCALE_SUFFIX
from minimax_jax.leaves import Leaf, native_blocks, native_leaf, stored
from minimax_jax.ops.scaled import BlockScaled
from minimax_jax.paths import path_of
from minimax_jax.progress import Progress, Ticker


def write(
    source: Source,
    destination: Path,
    *,
    dtype: str = "BF16",
    max_memory_bytes: int = DEFAULT_MEMORY_BYTES,
    workers: int = DEFAULT_WORKERS,
    layout: Layout = "native",
    check: Check = "sample",
    restart: bool = False,
    certify: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Convert a checkpoint of any layout to native (or MaxText's) in an Orbax checkpoint, some experts at a time.

    The destination appears whole, by rename, or not at all. When it fails or is killed, what was done is kept beside
    the destination, and the same job goes on from there, as `jobs.run.run` does.

    Weights that were FP8 are dequantised exactly, or stay FP8 byte for byte; float weights become FP8 with the source
    scales beside them where those reproduce them, else with scales by amax. Source scales are not kept beside float
    weights.

    Args:
        source: an opened checkpoint.
        destination: a folder that does not exist yet, or is empty.
        dtype: stored dtype of block-scaled weights (`F8_E4M3`, `BF16`, `F32`); other tensors keep theirs.
        max_memory_bytes: budget over what the process has at the start; no grouped leaf is ever in memory whole.
        workers: threads.
        layout: `native`, or a layout of `layout.forms.NESTED`, whose arrays are one nested tree.
        check: which units to read back from the disk before the destination takes its name.
        restart: throw away what an earlier run left, instead of going on with it.
        certify: read all of it again at the end, and leave a certificate in it.
        progress: called on the calling thread after each piece of work.

    Raises:
        JobError: no such dtype, the budget is too small, the destination is taken, a write failed, or Orbax is not
            installed; the unfinished work of another job stands in the way; what was read back is not what was written.
        FormatError: the source changed or ends too early while it is read.
        NumericError: a weight to be quantised holds NaN or infinity.
    """
    orbax.require()
    planned = plan(source, dtype, max_memory_bytes=max_memory_bytes, workers=workers, layout=layout)
    ticker = Ticker(planned.read_bytes, progress)
    form = "orbax" if layout == "native" else layout
    with appearing(destination, worth=has_records, restart=restart) as folder:
        require_side_files(source, folder.parent)
        records = fill(planned, folder, form, check, ticker)
        add_side_files(source, folder, form=form, dtype=dtype)
        write_json_atomic(folder / CONFIG_NAME, planned.config.to_dict())
        seconds = ticker.seconds
        how: dict[str, Any] = {"ignore": source.config.extra, "workers": planned.workers, "progress": progress}
        certified = certify_unnamed(folder, destination, **how) if certify else None
    kept, fresh = quantised(records)
    return Report(
        destination=destination,
        tensors=len(planned.specs),
        read_bytes=planned.read_bytes,
        written_bytes=planned.write_bytes,
        seconds=seconds,
        kept_scales=kept,
        fresh_scales=fresh,
        read_tensors=len(source.checkpoint.tensors),
        remarks=tuple(scale_remarks(source, dtype, beside=False, all_fresh=bool(fresh) and not kept)),
        left_out=source.left_out,
        left_behind=source.left_behind,
        certified=certified,
    )


write_maxtext = functools.partial(write, layout="maxtext")
"""As `write`, to what MaxText loads: its params with scanned layers."""

write_maxtext_unscanned = functools.partial(write, layout="maxtext-unscanned")
"""As `write_maxtext`, with arrays for each layer."""


def save(native: Mapping[str, Leaf], config: MiniMaxConfig, folder: str | Path) -> None:
    """Save a native tree that is in memory; read it again with `read`. Every process calls it, for its own shards.

    The folder appears whole, config.json and all, by rename, or not at all; when this returns, it is there for all
    processes, which have to see the same files.

    Args:
        native: leaves by native name: arrays, or `BlockScaled`s. Not changed.
        config: the checkpoint's config; where weights are FP8, with their block size.
        folder: does not exist yet, or is empty.

    Raises:
        LayoutError: what is missing, unexpected, or of a wrong shape, dtype or block.
        JobError: the folder is taken, a write failed, another process failed, or Orbax is not installed.
    """
    path = path_of(folder)
    tensors = {name: part for key, leaf in native.items() for name, part in stored(key, leaf).items()}
    checked = survey({key: orbax.stored_as(path, key, x) for key, x in tensors.items()}, config, layout="native")
    raise_if(_block_problems(native, checked), LayoutError)
    is_fp8 = "F8_E4M3" in checked.dtypes.values()
    told = config.replace(weight_block_size=config.block if is_fp8 else None)
    team = present_team()
    ours = appearing(path) if team.leads else nullcontext(workshop_of(path) / path.resolve().name)
    with team.standing_together(workshop_of(path)), ours as folder:
        if team.leads:
            folder.rmdir()  # Orbax makes it
        team.wait()
        orbax.save(folder, tensors)
        if team.leads:
            write_json_atomic(folder / CONFIG_NAME, told.to_dict())


def read(
    path: str | Path,
    *,
    shardings: Sharding | Mapping[str, Any] | None = None,
    ignore: Collection[str] = (),
    leave_out: Collection[str] = (),
) -> dict[str, Leaf]:
    """Read a native tree from an Orbax checkpoint that `write` or `save` has made, after a check of all of it.

    Args:
        path: the folder.
        shardings: one for all arrays, or one for each by native name, two as a `BlockScaled` where weights are FP8
            (what `models.sharding.shardings` gives). Each process reads the bytes of its own shards. None puts whole
            arrays on the first device of this process.
        ignore: attributes of config.json to leave unread.
        leave_out: what the names of arrays to leave out begin with; as in `open_source`.

    Returns:
        New JAX arrays by native name, FP8 weights as `BlockScaled`.

    Raises:
        ConfigError: config.json is missing, malformed or describes something unsupported.
        FormatError: not a whole Orbax checkpoint, or a damaged one.
        LayoutError: the arrays are not those that the config asks for, or shardings are missing or do not fit.
        JobError: Orbax is not installed.
    """
    folder = path_of(path)
    source = open_orbax(folder, ignore=ignore, leave_out=leave_out)
    require_found(leave_out, source.left_out)
    warn_of(source.left_out)
    if source.survey.layout != "native":
        what, remedy = "not a native tree", "read it by Orbax, or convert it to native first"
        raise LayoutError(
            Problem(what=what, file=str(path), expected="native", got=source.survey.layout, remedy=remedy)
        )
    arrays, checked = source.checkpoint.tensors, source.survey
    placed = _placed(shardings, checked)
    raise_if(_sharding_problems(placed, arrays), LayoutError)
    like = {
        key: jax.ShapeDtypeStruct(array.shape, array.np_dtype, sharding=placed[key])  # type: ignore[no-untyped-call]
        for key, array in arrays.items()
    }
    restored = orbax.restore(folder, like)
    return {entry.native: native_leaf(entry, restored) for entry in checked.entries}


def _placed(shardings: Sharding | Mapping[str, Any] | None, checked: Survey) -> dict[str, Sharding]:
    """The sharding of each stored array, as far as it is given."""
    everywhere = SingleDeviceSharding(jax.local_devices()[0]) if shardings is None else shardings
    placed: dict[str, Sharding] = {}
    for entry in checked.entries:
        given = everywhere if isinstance(everywhere, Sharding) else everywhere.get(entry.native)
        if isinstance(given, BlockScaled):
            placed |= zip((entry.native, entry.native + SCALE_SUFFIX), given.tree_flatten()[0], strict=True)
        elif given is not None:
            placed[entry.native] = given
            if isinstance(everywhere, Sharding):
                placed[entry.native + SCALE_SUFFIX] = given
    return placed


def _sharding_problems(placed: Mapping[str, Sharding], arrays: Mapping[str, TensorInfo]) -> Iterator[Problem]:
    for key, array in arrays.items():
        if key not in placed:
            expected = "one for every array, a BlockScaled of two where weights are FP8"
            yield Problem(what="no sharding is given", key=key, expected=expected)
            continue
        try:
            placed[key].shard_shape(array.shape)
        except (ValueError, IndexError) as error:  # the latter where it has more axes than the array
            yield Problem(what="sharding does not fit", key=key, expected=str(list(array.shape)), got=str(error))


def _block_problems(native: Mapping[str, Leaf], checked: Survey) -> Iterator[Problem]:
    """A grid of scales may have the right shape and yet be that of other blocks, or of other parts."""
    for key, leaf in native.items():
        expected = native_blocks(checked.specs.by_native[key])
        if isinstance(leaf, BlockScaled) and (leaf.block, leaf.parts) != expected:
            want, got = (f"block {block}, parts {parts}" for block, parts in (expected, (leaf.block, leaf.parts)))
            yield Problem(what="wrong blocks of scales", key=key, expected=want, got=got)
