"""Orbax checkpoints of flat trees: saved whole, or laid out and filled row by row; described; restored.

    ocp.load(folder)  # any of them, by Orbax alone: {"name": array}

A tree may be nested as well: its arrays are then known by their paths, with dots between the steps, as Orbax has them.

Orbax takes a leaf whole, and the largest one of a published layer is 4.8 GB in bfloat16. So `lay_out` has Orbax write a
tree of single numbers, then gives each array its size in the same files (zarr, one file for each chunk of rows), and
`Rows` fills it through TensorStore, which is what Orbax itself writes and reads through. What comes of it is an
ordinary Orbax checkpoint of numpy arrays: it loads without the devices that it was made on.

orbax-checkpoint is an extra of this package, and nothing of it is imported before it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from minimax_jax.dtypes import DTYPES, NAMES
from minimax_jax.errors import CheckpointError, FormatError, JobError, Problem

if TYPE_CHECKING:
    import jax

CHUNK_BYTES = 32 * 2**20
"""Most bytes of one chunk, and so of one file, unless a single row is larger."""

OWN_FILES = ("_CHECKPOINT_METADATA", "orbax.checkpoint", "commit_success.txt")
"""What Orbax writes into the folder of a checkpoint, beside the folders of its items; the first is always there."""

_LARGE_ROW_BYTES = 2**20
"""From here on each row, such as an expert, is a chunk by itself: rows are written and read some at a time."""

_SHOWN = 400
_NO_SUCH = "not an Orbax checkpoint, or an incomplete one"


class Shaped(Protocol):
    """Name, dtype (by format name) and shape of an array."""

    @property
    def key(self) -> str:
        """Its name in the tree."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    @property
    def dtype(self) -> str:
        """A name such as `BF16`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """An array of an Orbax checkpoint: its name in the tree, dtype (by format name), shape, and the checkpoint."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Path


def is_orbax(path: Path) -> bool:
    """Whether a folder is an Orbax checkpoint."""
    return (path / OWN_FILES[0]).is_file()


def require() -> Any:
    """`orbax.checkpoint.v1`.

    Raises:
        JobError: it is not installed.
    """
    try:
        from orbax.checkpoint import v1
    except ImportError as error:
        remedy = "pip install 'minimax_jax[orbax]'"
        raise JobError(Problem(what="orbax-checkpoint is not installed", got=str(error), remedy=remedy)) from error
    return v1


def save(folder: Path, tensors: Mapping[str, Any]) -> None:
    """Save a flat tree whole; Orbax's own way and files. Every process calls it, and writes its own shards.

    Args:
        folder: does not exist yet; it appears whole or not at all.
        tensors: JAX arrays, or numpy arrays that are the same in every process.

    Raises:
        JobError: the folder exists, or cannot be written; Orbax is not installed.
    """
    ocp = require()
    if folder.exists():  # Orbax would say so too, but leave coroutines behind that nobody awaits
        remedy = "choose another, or delete it"
        raise JobError(Problem(what="destination of an Orbax checkpoint exists", file=str(folder), remedy=remedy))
    with _Errors(JobError, "Orbax checkpoint cannot be saved", folder):
        ocp.save(folder.absolute(), dict(tensors))


def lay_out(
    folder: Path,
    arrays: Iterable[Shaped],
    *,
    chunks: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    nest: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> None:
    """Write a checkpoint of arrays that are all there but hold nothing yet: `Rows` fills them.

    Args:
        folder: does not exist yet.
        arrays: what to lay out, each with at least one axis.
        chunks: shape of one chunk, by name; by default some rows of the leading axis, see `chunk_rows`.
        nest: makes the tree of the flat one.

    Raises:
        JobError: the folder exists, or cannot be written; Orbax is not installed.
    """
    ocp = require()
    wanted = {array.key: array for array in arrays}
    context = ocp.Context()
    saving = context.array.saving
    # Not OCDBT, in which each write makes a new version of the index of all chunks, thousands of which add up.
    # Not zarr 3, because Orbax takes files of that without OCDBT for damaged, and warns whenever they are loaded.
    saving.use_ocdbt, saving.use_zarr3, saving.use_compression = False, False, False
    points = {key: np.zeros((1,) * len(array.shape), DTYPES[array.dtype]) for key, array in wanted.items()}
    with _Errors(JobError, "Orbax checkpoint cannot be written", folder), context, _without_merge_warning():
        ocp.save(folder.absolute(), nest(points))
        item = _item(folder)
        for key, array in wanted.items():
            rows = chunk_rows(array.shape, DTYPES[array.dtype].itemsize)
            _resize(item / key, array.shape, chunks.get(key, (rows, *array.shape[1:])))


class Rows:
    """One array of an Orbax checkpoint, rows of its leading axis at a time; safe to call from several threads.

    Attributes:
        folder: the checkpoint.
        key: its name in the tree.
    """

    def __init__(self, folder: Path, key: str):
        """Open it.

        Raises:
            FormatError: there is no such array.
        """
        import tensorstore

        self.folder, self.key = folder, key
        with _Errors(FormatError, _NO_SUCH, folder, key):
            spec = {"driver": "auto", "kvstore": _kvstore(_item(folder), key)}
            self._array = tensorstore.open(spec, open=True).result()
            # A chunk that is all zeros is written like any other, because a missing one is damage, as it is to Orbax.
            exactly = {"store_data_equal_to_fill_value": True, "fill_missing_data_reads": False}
            self._array = tensorstore.open(self._array.spec().to_json() | exactly, open=True).result()

    def write(self, first: int, rows: npt.NDArray[Any]) -> None:
        """Write `[rows, ...]` from row `first` on; as `write_region`."""
        self.write_region((slice(first, first + len(rows)),), rows)

    def write_region(self, region: tuple[slice, ...], box: npt.NDArray[Any]) -> None:
        """Write a box of the array. `box` must not change meanwhile; it is on the disk afterwards.

        Raises:
            JobError: it cannot be written.
        """
        with _Errors(JobError, "array cannot be written", self.folder, self.key):
            place = self._array[region]
            place.write(box.reshape(place.shape), can_reference_source_data_indefinitely=True).result()

    def read(self, start_row: int | None = None, stop_row: int | None = None) -> npt.NDArray[Any]:
        """Rows `start_row` to `stop_row`, all by default, as a fresh array `[rows, ...]`.

        Raises:
            FormatError: they are missing or damaged.
        """
        with _Errors(FormatError, "array cannot be read", self.folder, self.key):
            found: npt.NDArray[Any] = self._array[start_row:stop_row].read().result()
        return found

    def read_region(self, region: tuple[slice, ...]) -> npt.NDArray[Any]:
        """A box of the array, as a fresh array.

        Raises:
            FormatError: it is missing or damaged.
        """
        with _Errors(FormatError, "array cannot be read", self.folder, self.key):
            found: npt.NDArray[Any] = self._array[region].read().result()
        return found


def chunk_rows(shape: tuple[int, ...], itemsize: int) -> int:
    """How many rows of its leading axis one chunk of an array holds, at least 1.

    Args:
        shape: `[rows, ...]`.
        itemsize: bytes of one element.
    """
    row_bytes = max(1, int(np.prod(shape[1:], dtype=np.int64)) * itemsize)
    return 1 if row_bytes >= _LARGE_ROW_BYTES else max(1, min(shape[0], CHUNK_BYTES // row_bytes))


def describe(folder: Path) -> dict[str, Stored]:
    """Every array of a checkpoint by name, from its metadata alone.

    Raises:
        FormatError: not a whole Orbax checkpoint of one flat tree of arrays.
        JobError: Orbax is not installed.
    """
    ocp = require()
    with _Errors(FormatError, _NO_SUCH, folder):
        found = ocp.metadata(folder.absolute()).metadata
    leaves = dict(_paths(found)) if isinstance(found, dict) else {}
    if not leaves or not all(hasattr(leaf, "shape") for leaf in leaves.values()):
        expected = "one tree of arrays by name, all of them there"
        raise FormatError(Problem(what=_NO_SUCH, file=str(folder), expected=expected))
    return {key: stored_as(folder, key, leaf) for key, leaf in leaves.items()}


def _paths(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, by the steps to them with dots between."""
    for step, node in tree.items():
        if isinstance(node, dict):
            yield from ((f"{step}.{name}", leaf) for name, leaf in _paths(node))
        else:
            yield str(step), node


def stored_as(folder: Path, key: str, leaf: Any) -> Stored:
    """What an array, or its metadata, is when it is stored."""
    dtype = np.dtype(leaf.dtype)
    return Stored(key=key, dtype=NAMES.get(dtype, str(dtype)), shape=tuple(leaf.shape), file=folder)


def restore(folder: Path, like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Restore arrays, each with the sharding asked for: every process reads the bytes of its own shards.

    Args:
        folder: an Orbax checkpoint of one flat tree.
        like: shape, dtype and sharding of every array in it; no other dtype than the stored one is asked for.

    Returns:
        New arrays by name.

    Raises:
        FormatError: arrays that are missing or damaged.
        JobError: Orbax is not installed.
    """
    ocp = require()
    with _Errors(FormatError, "Orbax checkpoint cannot be restored", folder):
        restored: dict[str, jax.Array] = ocp.load(folder.absolute(), dict(like))
    return restored


def _resize(array: Path, shape: tuple[int, ...], chunk: tuple[int, ...]) -> None:
    """Make an array anew as it is stored, but for its size and chunks."""
    import tensorstore

    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(array.absolute())}}
    stored = tensorstore.open(spec, open=True).result().spec().to_json()["metadata"]
    metadata = {**stored, "shape": list(shape), "chunks": list(chunk)}
    tensorstore.open({**spec, "metadata": metadata}, create=True, delete_existing=True).result()


def _item(folder: Path) -> Path:
    """The folder of the tree inside a checkpoint: what Orbax calls it is its own affair."""
    for metadata in folder.glob("*/_METADATA"):
        return metadata.parent
    raise FileNotFoundError("no tree in it")


def _kvstore(item: Path, key: str) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{item.absolute()}/"}
    if (item / "manifest.ocdbt").exists():
        return {"driver": "ocdbt", "base": base, "path": f"{key}/"}
    return {"driver": "file", "path": f"{item.absolute()}/{key}/"}


class _Errors:
    """Turn what Orbax and TensorStore raise inside the block into an error of this library; all else passes."""

    def __init__(self, kind: type[CheckpointError], what: str, folder: Path, key: str | None = None):
        self._kind, self._what, self._folder, self._key = kind, what, folder, key

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # What goes wrong with a shard of an array, Orbax wraps in a bare Exception.
        told = error.__cause__ if kind is Exception and error is not None else error
        if isinstance(told, OSError | ValueError | KeyError):
            got = str(told)[:_SHOWN]
            raise self._kind(Problem(what=self._what, file=str(self._folder), key=self._key, got=got)) from error


@contextmanager
def _without_merge_warning() -> Iterator[None]:
    """Orbax warns of files that are not OCDBT that it did not merge them, as OCDBT has to be."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
