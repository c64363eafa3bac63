"""Checkpoints of `torch.distributed.checkpoint`: what is in them, and where; without torch.

A folder of files, in which chunks of tensors lie one behind the other, each as `torch.save` writes it, and a table of
contents, `.metadata`, which torch writes last: a pickle, which is read as data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import operator
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TypeAlias

from minimax_jax.bulk import without_collector
from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import FormatError, Problem, raise_if
from minimax_jax.io.checkpoint import DCP_METADATA, DCP_SUFFIX, for_each
from minimax_jax.io.files import FileState, short_file
from minimax_jax.io.inert import Named, read_pickle
from minimax_jax.io.jsonfile import is_text, shown
from minimax_jax.io.location import Location
from minimax_jax.io.source import open_file, read_whole, require_within
from minimax_jax.io.torch_archive import TORCH_DTYPES
from minimax_jax.paths import is_file

METADATA_NAME = DCP_METADATA
_MOST_METADATA_BYTES = 2**30
_MOST_SIZE = 2**48
_PRIME = 2**127 - 1
_TABLE = "table of contents"
_MODULE = "torch.distributed.checkpoint."


@dataclass(frozen=True, kw_only=True, slots=True)
class Spot:
    """Where the archive of a chunk lies: in which file, from which byte on, and up to which."""

    file: Location
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A box of a tensor: where it begins along each axis, its sizes, and where it is stored."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    spot: Spot


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunked:
    """A tensor of a checkpoint: its name there, dtype (by format name), shape, and the chunks that it is made of."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


_Spots: TypeAlias = Mapping[tuple[str, tuple[int, ...]], Spot]
"""Where each chunk is, by its tensor and its offsets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
        tensors: by name; those in a dict `model` without that step, as what is saved beside it has others.
        objects: names of what else was saved: numbers, texts and the like.
        states: what each of its files was when it was looked at.
    """

    tensors: Mapping[str, Chunked]
    objects: tuple[str, ...]
    states: Mapping[Location, FileState]


def is_dcp(folder: Path) -> bool:
    """Whether a folder is a checkpoint of torch.distributed.checkpoint."""
    return is_file(folder / METADATA_NAME) and any(folder.glob(f"*{DCP_SUFFIX}"))


@without_collector
def describe(folder: Path) -> Contents:
    """What a checkpoint holds, from its table of contents and the sizes of its files.

    Raises:
        FormatError: the table is damaged, or of another form; a file is missing or too short; chunks of a tensor are
            missing or overlap; all that is wrong.
    """
    file = folder / METADATA_NAME
    state = _state(file, folder)
    told = read_pickle(read_whole(file, most_bytes=_MOST_METADATA_BYTES, what=METADATA_NAME), file=file, what=_TABLE)
    try:
        tensors, objects = _contents(told, folder)
    except ValueError as error:
        what, remedy = f"{_TABLE} cannot be read", "save the checkpoint again, as plain tensors and without extensions"
        raise FormatError(Problem(what=what, file=str(file), got=str(error), remedy=remedy)) from error
    raise_if((problem for tensor in tensors.values() for problem in _gaps(tensor, file)), FormatError)
    spots = [chunk.spot for tensor in tensors.values() for chunk in tensor.chunks]
    files = sorted({spot.file for spot in spots})
    states = dict(zip(files, for_each(files, lambda file: _state(file, folder)), strict=True))
    raise_if(_short_files(spots, states), FormatError)
    return Contents(tensors=tensors, objects=objects, states={file: state, **states})


def _contents(table: object, folder: Path) -> tuple[dict[str, Chunked], tuple[str, ...]]:
    """The tensors of a checkpoint, and the names of what else is in it."""
    match _fields(table, "metadata.Metadata"):
        case {"state_dict_metadata": dict(saved), "storage_data": dict(stored), **more}:
            spots = {_index(index): _spot(info, folder) for index, info in stored.items()}
            inner = _names_in_model(more.get("planner_data"), saved)
        case _:
            raise ValueError("no tables of tensors and of where they are stored")
    tensors, objects = dict[str, Chunked](), list[str]()
    for key, told in saved.items():
        if isinstance(told, Named) and told.name == f"{_MODULE}metadata.BytesStorageMetadata":
            objects.append(_text(key))
        else:
            tensors[inner.get(key, _text(key))] = _tensor(_text(key), told, spots)
    return tensors, tuple(objects)


def _names_in_model(paths: object, saved: Mapping[object, object]) -> dict[object, str]:
    """Names in the dict `model` of what was saved, such as `{"model": model.state_dict(), "optim": ...}`."""
    found = dict[object, str]()
    for key, path in paths.items() if isinstance(paths, dict) else ():
        match path:
            case ("model", str(name)) if is_text(name) and name not in saved:
                found[key] = name
    return found


def _index(told: object) -> tuple[str, tuple[int, ...]]:
    """Of which tensor a chunk is, and where in it."""
    match _fields(told, "metadata.MetadataIndex"):
        case {"fqn": str(key), "offset": Named() as offsets}:
            return key, _sizes(offsets)
        case {"fqn": str(key)}:  # something that is no tensor
            return key, ()
    raise ValueError("a chunk without a name")


def _spot(told: object, folder: Path) -> Spot:
    match _fields(told, "filesystem._StorageInfo"):
        case {"transform_descriptors": [_, *_]}:
            raise ValueError("written by an extension, such as one that compresses")
        case {"relative_path": str(name), "offset": int(start), "length": int(size)} if (
            name == PurePath(name).name and "\0" not in name and start >= 0 <= size
        ):
            return Spot(file=folder / name, start=start, stop=start + size)
    raise ValueError("a chunk that lies in no file of the folder")


def _tensor(key: str, told: object, spots: _Spots) -> Chunked:
    match _fields(told, "metadata.TensorStorageMetadata"):
        case {"properties": Named(state=(Named(name=told_dtype), *_)), "size": size, "chunks": [*boxes]}:
            dtype = TORCH_DTYPES.get(told_dtype)
        case _:
            raise ValueError(f"{shown(key)} has no dtype, shape and chunks")
    if dtype is None:
        raise ValueError(f"{shown(key)} has a dtype that is not known here: {shown(told_dtype)}")
    chunks = [chunk for box in boxes for chunk in _chunks(key, box, DTYPES[dtype].itemsize, spots)]
    return Chunked(key=key, dtype=dtype, shape=_sizes(size), chunks=tuple(chunks))


def _chunks(key: str, box: object, itemsize: int, spots: _Spots) -> Iterator[Chunk]:
    """A chunk; none where it is empty, as those of processes that got nothing are."""
    match _fields(box, "metadata.ChunkStorageMetadata"):
        case {"offsets": begin, "sizes": size}:
            offsets, sizes = _sizes(begin), _sizes(size)
        case _:
            raise ValueError(f"{shown(key)} has a chunk without offsets and sizes")
    if 0 in sizes:
        return
    spot = spots.get((key, offsets))
    if spot is None or spot.stop - spot.start < math.prod(sizes) * itemsize:
        where = "nowhere" if spot is None else "in fewer bytes than it has"
        raise ValueError(f"{shown(key)} has a chunk at {list(offsets)} that is stored {where}")
    yield Chunk(offsets=offsets, sizes=sizes, spot=spot)


def _fields(told: object, name: str) -> Mapping[str, object]:
    """The attributes of an instance of one of torch's classes."""
    match told:
        case Named(name=found, args=tuple(), state=dict(fields)) if found == _MODULE + name:
            return fields
    raise ValueError(f"no {name}")


def _sizes(told: object) -> tuple[int, ...]:
    match told:
        case Named(name="torch.Size", args=(tuple(sizes),)) if all(map(_is_size, sizes)):
            return sizes
    raise ValueError("no torch.Size")


def _is_size(told: object) -> bool:
    return isinstance(told, int) and 0 <= told < _MOST_SIZE


def _text(key: object) -> str:
    if not isinstance(key, str) or not is_text(key):
        raise ValueError("a name that is no text")
    return key


def _gaps(tensor: Chunked, file: Path) -> Iterator[Problem]:
    """The problem of chunks that are not all of a tensor, each part of it once."""
    inside = all(_is_inside(chunk, tensor.shape) for chunk in tensor.chunks)
    if not inside or _fill(tensor.chunks) != _mark((0,) * len(tensor.shape), tensor.shape):
        expected = f"chunks that make up {list(tensor.shape)}, each part of it once"
        got = f"{len(tensor.chunks)} chunks with {sum(math.prod(chunk.sizes) for chunk in tensor.chunks):,} elements"
        problem = Problem(what="tensor with gaps or overlaps", file=str(file), key=shown(tensor.key), expected=expected)
        yield dataclasses.replace(problem, got=got, remedy="save the checkpoint again, from all of its processes")


def _is_inside(chunk: Chunk, shape: tuple[int, ...]) -> bool:
    if not len(chunk.offsets) == len(chunk.sizes) == len(shape):
        return False
    return all(map(operator.le, map(operator.add, chunk.offsets, chunk.sizes), shape))


def _fill(chunks: Iterable[Chunk]) -> int:
    """What the marks of some boxes come to, by which they are told from others without comparing each with each."""
    return sum(_mark(chunk.offsets, chunk.sizes) for chunk in chunks) % _PRIME


def _mark(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> int:
    """A sum over the places `(i, j, ...)` of a box, of `x**i * y**j * ...`, times `(x - 1) * (y - 1) * ...`.

    It is taken modulo a prime, and `x, y, ...` are random: boxes that do not hold each place as often as others do come
    to the same with a probability below 2**-70 (Schwartz and Zippel).
    """
    mark = 1
    for axis, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
        mark = mark * (_power(axis, start + size) - _power(axis, start)) % _PRIME
    return mark


@functools.lru_cache(2**16)
def _power(axis: int, exponent: int) -> int:
    return pow(_base(axis), exponent, _PRIME)


@functools.cache
def _base(axis: int) -> int:
    return secrets.randbelow(_PRIME)


def _short_files(spots: Sequence[Spot], states: Mapping[Location, FileState]) -> Iterator[Problem]:
    """The problems of files that end before their last chunk."""
    ends = dict[Location, int]()
    for spot in spots:
        ends[spot.file] = max(spot.stop, ends.get(spot.file, 0))
    for file, end in ends.items():
        if states[file].nbytes < end:
            yield short_file(file, expected_bytes=end, got_bytes=states[file].nbytes)


def _state(file: Location, folder: Path) -> FileState:
    require_within(file, folder)
    with contextlib.closing(open_file(file)) as opened:
        return opened.state
