"""A checkpoint of one or many safetensors files: every header and the index, held against each other."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

from minimax_jax.errors import FormatError, Problem, raise_if
from minimax_jax.io import source
from minimax_jax.io.files import FileState, io_errors
from minimax_jax.io.header import MAX_HEADER_BYTES, Header, TensorInfo, read_header
from minimax_jax.io.jsonfile import is_text, parse_object, shown
from minimax_jax.io.location import Location
from minimax_jax.paths import is_file

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_T = TypeVar("_T")
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
DCP_SUFFIX, DCP_METADATA = ".distcp", ".metadata"
_REQUESTS_AT_A_TIME = 16


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The tensors of a folder of safetensors files, or of one file.

    Attributes:
        path: what was opened.
        tensors: key to place; files in sorted order, within a file in the order of the data.
        metadata: the files' own metadata, merged; where files differ, the first one's.
        files: the files that hold the tensors, sorted.
        index_file: the index that named them, if there is one.
        states: what each file was when its header was read: what a `Reader` holds it to.
    """

    path: Location
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    files: tuple[Location, ...]
    index_file: Location | None
    states: Mapping[Location, FileState] = field(default_factory=dict, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self.tensors.values())


def open_checkpoint(path: Location) -> Checkpoint:
    """Read and check all headers of a checkpoint; no tensor data is read.

    In a folder, `model.safetensors.index.json` says which files count; without it `model.safetensors` counts alone;
    without that every `.safetensors` file does. `path` may also be an index file or one safetensors file. The shard
    count in file names and the index's `total_size` are not believed: published ones are wrong.

    Raises:
        FormatError: there is no checkpoint, or its files break the format or contradict each other; all that is wrong.
    """
    path = source.pin(path)
    if isinstance(path, Path):
        with io_errors(FormatError, "no checkpoint can be opened here", path, given=True):
            path.stat()
    if source.is_folder(path):
        return _open_folder(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _open_indexed(path, path)
    if path.suffix.lower() in PICKLES or _is_of_dcp(path):
        raise FormatError(_nothing_to_open(path, [path]))
    return _merge(path, [read_header(path)])


def for_each(files: Sequence[Location], call: Callable[[Location], _T]) -> list[_T]:
    """The result for each file; all problems of all of them at once. Servers are asked about several at a time."""

    def attempt(file: Location) -> tuple[list[_T], tuple[Problem, ...]]:
        try:
            return [call(file)], ()
        except FormatError as error:
            return [], error.problems

    if all(isinstance(file, Path) for file in files):
        attempts = [attempt(file) for file in files]
    else:
        with ThreadPoolExecutor(_REQUESTS_AT_A_TIME, thread_name_prefix="look") as pool:
            attempts = list(pool.map(attempt, files))
    raise_if((problem for _, problems in attempts for problem in problems), FormatError)
    return [result for results, _ in attempts for result in results]


def _open_folder(folder: Location) -> Checkpoint:
    index_file, single = folder / INDEX_NAME, folder / SINGLE_NAME
    listed = source.listed(folder)
    if listed is None:
        found = next(filter(source.exists, (index_file, single)), None)
        listed = [] if found is None else [found]
    if index_file in listed:
        opened = _open_indexed(folder, index_file)
        if single in listed and single not in opened.files:
            what, remedy = "two checkpoints in one folder", f"give the path of {SINGLE_NAME} or of the index instead"
            raise FormatError(Problem(what=what, file=str(single), got=f"{INDEX_NAME} does not name it", remedy=remedy))
        return opened
    files = [single] if single in listed else [file for file in listed if file.suffix == SUFFIX]
    if not files:
        raise FormatError(_nothing_to_open(folder, listed))
    return _merge(folder, for_each(files, lambda file: _read_inside(file, folder)))


def _open_indexed(path: Location, index_file: Location) -> Checkpoint:
    folder = index_file.parent
    source.require_within(index_file, folder)
    weight_map = _read_index(index_file)
    names = sorted(set(weight_map.values()))
    headers = for_each([folder / name for name in names], lambda file: _read_inside(file, folder))
    raise_if(_index_problems(weight_map, dict(zip(names, headers, strict=True)), index_file), FormatError)
    return _merge(path, headers, index_file)


def _read_index(index_file: Location) -> dict[str, str]:
    text = source.read_whole(index_file, most_bytes=MAX_HEADER_BYTES, what="index")
    weight_map = parse_object(text, file=index_file, what="index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        expected, got = "a JSON object that maps each key to its file", reprlib.repr(weight_map)
        raise FormatError(Problem(what="index without a weight_map", file=str(index_file), expected=expected, got=got))
    raise_if(_name_problems(weight_map, index_file), FormatError)
    return weight_map


def _name_problems(weight_map: dict[str, object], index_file: Location) -> Iterator[Problem]:
    safe: set[str] = set()
    for key, name in weight_map.items():
        if isinstance(name, str) and (name in safe or _is_safe_name(name)):
            safe.add(name)
            continue
        expected = "the relative path of a file in the folder of the index"
        got = shown(name) if isinstance(name, str) else reprlib.repr(name)
        what = "weight_map does not name a file in the folder"
        yield Problem(what=what, file=str(index_file), key=shown(key), expected=expected, got=got)


def _is_safe_name(name: str) -> bool:
    path = PurePosixPath(name)
    return is_text(name) and "\0" not in name and path.name != "" and not path.is_absolute() and ".." not in path.parts


def _read_inside(file: Location, folder: Location) -> Header:
    source.require_within(file, folder)
    return read_header(file)


def _index_problems(weight_map: dict[str, str], headers: dict[str, Header], index_file: Location) -> Iterator[Problem]:
    strays: set[str] = set()
    for name, header in headers.items():
        for key in header.tensors:
            named = weight_map.get(key)
            if named != name:
                strays.add(key)
                what = "tensor in another file than the index says" if named else "the index does not list this tensor"
                yield Problem(what=what, file=str(header.file), key=shown(key), expected=named and f"in {shown(named)}")
    for key, name in weight_map.items():
        if key not in headers[name].tensors and key not in strays:
            what = "tensor is not in the file that the index names"
            yield Problem(what=what, file=str(index_file), key=shown(key), expected=f"in {shown(name)}")


def _merge(path: Location, headers: list[Header], index_file: Location | None = None) -> Checkpoint:
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    problems: list[Problem] = []
    for header in headers:
        for key in header.tensors.keys() & tensors.keys():
            what, first = "tensor in two files", f"also in {tensors[key].file}"
            problems.append(Problem(what=what, file=str(header.file), key=shown(key), got=first))
        tensors.update(header.tensors)
        metadata = header.metadata | metadata
    raise_if(problems, FormatError)
    files = tuple(header.file for header in headers)
    states = {header.file: header.state for header in headers if header.state is not None}
    return Checkpoint(path=path, tensors=tensors, metadata=metadata, files=files, index_file=index_file, states=states)


def _is_of_dcp(file: Location) -> bool:
    return file.suffix == DCP_SUFFIX or file.name == DCP_METADATA


def _nothing_to_open(path: Location, listed: Iterable[Location]) -> Problem:
    listed = tuple(listed)
    if any(_is_of_dcp(file) for file in listed) or (isinstance(path, Path) and is_file(path / DCP_METADATA)):
        what = "a part of a checkpoint of torch.distributed.checkpoint, or one whose writing was stopped"
        expected = (
            f"a folder on this machine with {DCP_METADATA} in it, which torch writes last, and *{DCP_SUFFIX} files"
        )
        return Problem(what=what, file=str(path), expected=expected, remedy="give that folder, or save it again")
    pickles = [file.name for file in listed if file.suffix.lower() in PICKLES]
    if not pickles:
        remedy = f"give the folder that holds {INDEX_NAME} or {SINGLE_NAME}, or one {SUFFIX} file"
        return Problem(what="no safetensors file here", file=str(path), remedy=remedy)
    return Problem(
        what="only pickled weights here: they are never read, because unpickling runs code from the file",
        file=str(path),
        expected=f"{SUFFIX} files",
        got=", ".join(pickles[:3]),
        remedy="take the safetensors form of this checkpoint, or convert it with the library that wrote it",
    )
