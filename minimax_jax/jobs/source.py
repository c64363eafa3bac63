"""A checkpoint opened for work: its files, its config, and the proof that they fit each other."""

from __future__ import annotations

import dataclasses
import errno
import functools
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from minimax_jax.errors import ConfigError, FormatError, LayoutError, Problem, raise_if
from minimax_jax.io import source as places
from minimax_jax.io.beside import LeftBehind, left_behind
from minimax_jax.io.checkpoint import Checkpoint, open_checkpoint
from minimax_jax.io.dcp import is_dcp
from minimax_jax.io.header import TensorInfo
from minimax_jax.io.jsonfile import shown
from minimax_jax.io.location import Location, locate
from minimax_jax.io.orbax import is_orbax
from minimax_jax.io.reader import Reader
from minimax_jax.jobs.left_out import LeftOut, require_found, set_aside
from minimax_jax.layout.arrangement import arrange
from minimax_jax.layout.check import Survey, survey
from minimax_jax.layout.config import CONFIG_NAME, MOST_CONFIG_BYTES, MiniMaxConfig, is_hub_id
from minimax_jax.layout.forms import FORMS
from minimax_jax.layout.specs import Entry, TensorSpec
from minimax_jax.layout.table import SCALE_SUFFIX
from minimax_jax.nearby import did_you_mean

SIDECAR_STEM = "source_scales"
SIDECAR = SIDECAR_STEM + ".safetensors"
"""The file beside a float native checkpoint that holds the block scales of its FP8 source, by native scale name."""

_SIDECAR_CONFIG = "quantization_config"
_WITHOUT_SIDECAR = "delete the file to export with fresh scales"


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened checkpoint.

    Attributes:
        path: the folder or file that was named; a URL with its revision resolved.
        checkpoint: its files, and the tensors of the model.
        config: its config; where a sidecar of source scales stands by, with the block size of those.
        survey: which layout it has, and the stored dtype of every entry.
        sidecar: block scales of the FP8 source, by native scale name; empty when there are none.
        left_out: tensors in its files that are not the model's, and that nothing reads.
        left_behind: what lies in its folder, and no conversion takes along.
        open_reader: makes the reader of its tensors: of a safetensors checkpoint, and of one in other files.
    """

    path: Location
    checkpoint: Checkpoint
    config: MiniMaxConfig
    survey: Survey
    sidecar: Mapping[str, TensorInfo]
    left_out: tuple[LeftOut, ...] = ()
    left_behind: tuple[LeftBehind, ...] = ()
    open_reader: Callable[[Checkpoint], Reader] = Reader

    def reader(self) -> Reader:
        """A reader of the checkpoint and its sidecar."""
        return self.open_reader(self.readable)

    @property
    def readable(self) -> Checkpoint:
        """The checkpoint and its sidecar as one, for a `Reader`."""
        files = {info.file for info in self.sidecar.values()}
        tensors = {**self.checkpoint.tensors, **self.sidecar}
        return dataclasses.replace(self.checkpoint, tensors=tensors, files=(*self.checkpoint.files, *sorted(files)))

    def specs(self, entry: Entry) -> Iterator[TensorSpec]:
        """The stored tensors of an entry (or of some of its experts), in this checkpoint's layout."""
        return layout_specs(entry, self.survey.layout, self.survey.dtypes[entry.native])

    def nbytes(self, entry: Entry) -> int:
        """Bytes of these tensors."""
        return entry.nbytes(self.survey.dtypes[entry.native])


def by_ranges(source: Source) -> Source:
    """The same source for a few small reads: of a hub repository, no whole shard is fetched for them."""
    if source.open_reader is not Reader:
        return source
    return dataclasses.replace(source, open_reader=functools.partial(Reader, whole_files=False))


def layout_specs(entry: Entry, layout: str, dtype: str) -> Iterator[TensorSpec]:
    """The stored tensors of an entry in a layout, its weights stored as `dtype`; of a stack of layers, its own."""
    if layout == "hf":
        return entry.hf_specs(dtype)
    return entry.native_specs(dtype) if layout == "native" else _further_specs(entry, layout, dtype)


def _further_specs(entry: Entry, layout: str, dtype: str) -> Iterator[TensorSpec]:
    place = arrange(entry, layout)
    for name in place.names:
        yield TensorSpec(name, place.shape, dtype)
    if dtype == "F8_E4M3":
        grid = arrange(entry, layout, scales=True)
        yield from (TensorSpec(name + SCALE_SUFFIX, grid.shape, "F32") for name in grid.names)


def require_own_layout(source: Source) -> None:
    """Check that a checkpoint is in one of the table's own layouts, for what reads parts of it by itself.

    Raises:
        LayoutError: it is in a further one.
    """
    layout = source.survey.layout
    if layout in FORMS:
        what, remedy = "cannot be loaded from this layout", "convert it to native first"
        raise LayoutError(Problem(what=what, file=str(source.path), expected="hf or native", got=layout, remedy=remedy))


def same_form(entry: Entry, one: str, other: str) -> bool:
    """Whether two layouts store an entry alike, but for its name."""
    return one == other or (_is_plain(entry, one) and _is_plain(entry, other))


def _is_plain(entry: Entry, layout: str) -> bool:
    """Whether a layout stores an entry as one tensor, as it is published."""
    return not entry.row.grouped and (layout not in FORMS or FORMS[layout][entry.row].axes == entry.row.axes)


def batches(entry: Entry, memory_bytes: int, most_bytes: int) -> Iterator[tuple[Entry, int]]:
    """The experts of an entry some at a time, each time with the first of them.

    Args:
        entry: the entry.
        memory_bytes: what all of its experts take.
        most_bytes: what those of one batch may take; one expert is a batch even if it takes more.
    """
    at_once = max(1, most_bytes * entry.experts // memory_bytes)
    for first in range(0, entry.experts, at_once):
        yield entry.narrow(slice(first, first + at_once)), first


def open_source(path: str | Location, *, ignore: Collection[str] = (), leave_out: Collection[str] = ()) -> Source:
    """Open a checkpoint and check all of it: config, headers, names, shapes, dtypes. No tensor is read.

    Args:
        path: a folder, or one safetensors file with a config.json beside it; or the URL of one: `hf://org/name`,
            `hf://org/name@revision`, `s3://bucket/folder`, `gs://`, `https://`, and others that fsspec knows. Of a hub
            repository, shards are fetched into the hub's cache when they are read; `?keep=N` behind its name keeps
            at most N of them on disk at a time, and none for 0. A folder may also be an Orbax checkpoint, or one of
            torch.distributed.checkpoint.
        ignore: attributes of config.json to leave unread.
        leave_out: what the names of further tensors begin with (`model.vision`), that are to be left out. MTP modules
            that config.json announces are left out by themselves; any other tensor that is not the model's is an error.

    Raises:
        ConfigError: config.json is missing, malformed or describes something unsupported.
        FormatError: a damaged or incomplete safetensors file, index or sidecar; a server that refuses or fails.
        LayoutError: the tensors are not those that the config asks for; nothing begins with what is to be left out.
        RequestError: no file can have such a name as `path`.
    """
    (source,) = open_sources([path], ignore=ignore, leave_out=leave_out)
    return source


def open_sources(
    paths: Iterable[str | Location], *, ignore: Collection[str] = (), leave_out: Collection[str] = ()
) -> list[Source]:
    """Open checkpoints as `open_source` does; what is to be left out has to be in one of them at least."""
    sources = [_open(path, ignore, leave_out) for path in paths]
    require_found(leave_out, itertools.chain(*(source.left_out for source in sources)))
    return sources


def sidecar_metadata(config: MiniMaxConfig) -> dict[str, str]:
    """The header metadata of a sidecar: the source's quantization_config, which a float checkpoint's config lacks."""
    return {_SIDECAR_CONFIG: json.dumps(config.to_dict()[_SIDECAR_CONFIG], sort_keys=True)}


def _open(path: str | Location, ignore: Collection[str], leave_out: Collection[str]) -> Source:
    place = places.pin(locate(path))
    _require_no_hub_id(place)
    if isinstance(place, Path) and is_orbax(place):
        from minimax_jax.jobs.orbax_source import open_orbax  # which is made of what is here

        return open_orbax(place, ignore=ignore, leave_out=leave_out)
    if isinstance(place, Path) and is_dcp(place):
        from minimax_jax.jobs.dcp_source import open_dcp

        return open_dcp(place, ignore=ignore, leave_out=leave_out)
    checkpoint = open_checkpoint(place)
    folder = place if places.is_folder(place) else place.parent
    config = _read_config(folder, ignore)
    scales = _open_sidecar(folder)
    if scales is not None:
        config = _with_block_of(scales, config)
        checkpoint = dataclasses.replace(checkpoint, states={**checkpoint.states, **scales.states})
    checkpoint, left_out = set_aside(checkpoint, config, leave_out)
    checked = survey(checkpoint.tensors, config)
    sidecar = {} if scales is None else scales.tensors
    raise_if(_misfits(sidecar, checked), LayoutError)
    raise_if(_unsized_blocks(checked, folder), ConfigError)
    index = () if checkpoint.index_file is None else (checkpoint.index_file,)
    used = (*checkpoint.files, *index, *(() if scales is None else scales.files))
    return Source(
        path=place,
        checkpoint=checkpoint,
        config=config,
        survey=checked,
        sidecar=sidecar,
        left_out=left_out,
        left_behind=left_behind(place, used),
    )


def _require_no_hub_id(place: Location) -> None:
    """Tell whoever names a hub repository as other tools do how it is named here; a path that is there is a path."""
    if isinstance(place, Path) and is_hub_id(str(place)) and not os.path.lexists(place):
        what = "no checkpoint can be opened here"
        remedy = did_you_mean(place, f"if it is a repository of the hub: hf://{place}")
        raise FormatError(Problem(what=what, file=str(place), got=os.strerror(errno.ENOENT), remedy=remedy))


def _read_config(folder: Location, ignore: Collection[str]) -> MiniMaxConfig:
    file = folder / CONFIG_NAME
    if isinstance(folder, Path):
        return MiniMaxConfig.from_pretrained(folder, ignore=ignore)
    try:
        text = places.read_whole(file, most_bytes=MOST_CONFIG_BYTES, what=CONFIG_NAME)
    except FormatError as error:
        raise ConfigError(error.problems) from error
    return MiniMaxConfig.from_json(text, file=str(file), ignore=ignore)


def _open_sidecar(folder: Location) -> Checkpoint | None:
    file = folder / SIDECAR
    if not places.exists(file):
        return None
    places.require_within(file, folder)
    return open_checkpoint(file)


def _with_block_of(scales: Checkpoint, config: MiniMaxConfig) -> MiniMaxConfig:
    """`config` as its FP8 source had it, so that a later FP8 export has the same blocks."""
    file = str(scales.path)
    try:
        published = json.loads(scales.metadata[_SIDECAR_CONFIG])
        known = MiniMaxConfig.from_dict(config.to_dict() | {_SIDECAR_CONFIG: published}, file=file, ignore=config.extra)
    except (KeyError, ValueError, RecursionError) as error:
        problem = Problem(what="sidecar without quantization_config", file=file, remedy=_WITHOUT_SIDECAR)
        raise FormatError(problem) from error
    except ConfigError as error:
        raise FormatError(error.problems) from error
    ours, theirs = config.weight_block_size, known.weight_block_size
    if theirs is None or ours not in (None, theirs):
        what, expected, got = "sidecar with another block size than config.json", str(ours), str(theirs)
        raise FormatError(Problem(what=what, file=file, expected=expected, got=got, remedy=_WITHOUT_SIDECAR))
    return known


def _misfits(sidecar: Mapping[str, TensorInfo], checked: Survey) -> Iterator[Problem]:
    expected = {e.native + SCALE_SUFFIX: e for e in checked.specs.entries if e.row.scaled}
    for key, info in sidecar.items():
        entry = expected.get(key)
        file, got = str(info.file), f"{info.dtype} {list(info.shape)}"
        if entry is None:
            yield Problem(what="unexpected tensor in the sidecar", file=file, key=shown(key), got=got)
        elif info.dtype != "F32" or info.shape != entry.grid:
            wanted = f"F32 {list(entry.grid)}"
            yield Problem(what="wrong scales in the sidecar", file=file, key=key, expected=wanted, got=got)
        elif checked.dtypes[entry.native] == "F8_E4M3":
            what = "scales in the sidecar for a weight that is FP8 and has its own"
            yield Problem(what=what, file=file, key=key, remedy=_WITHOUT_SIDECAR)


def _unsized_blocks(checked: Survey, folder: Location) -> Iterator[Problem]:
    """The problem of FP8 weights whose block size nobody tells: several may fit the grid of scales."""
    if checked.specs.config.weight_block_size is None and "F8_E4M3" in checked.dtypes.values():
        expected = "quantization_config with the weight_block_size of its FP8 weights"
        yield Problem(what="config.json without quantization_config", file=str(folder / CONFIG_NAME), expected=expected)
