"""Orbax checkpoints laid out and filled row by row, and read so.

Orbax takes a leaf whole, and the largest one of a published layer is 4.8 GB in bfloat16. So `lay_out` has Orbax write a
tree of single numbers, then gives each array its size in the same files (zarr, one file for each chunk of rows), and
`Rows` fills it through TensorStore, which is what Orbax itself writes and reads through. What comes of it is an
ordinary Orbax checkpoint of numpy arrays: it loads without the devices that it was made on.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import FormatError, JobError
from minimax_jax.io import points
from minimax_jax.io.files import io_errors, sync_tree
from minimax_jax.io.journal import digest
from minimax_jax.io.orbax import NO_SUCH, OWN_FILES, Errors, require, trees

CHUNK_BYTES = 32 * 2**20
"""Most bytes of one chunk, and so of one file, unless a single row is larger."""

_LARGE_ROW_BYTES = 2**20
"""From here on each row, such as an expert, is a chunk by itself: rows are written and read some at a time."""

_CHUNK = re.compile(r"\d+(\.\d+)*")
"""The name of a file that holds a chunk: where it is in the grid of them."""

_LOCK_SUFFIX = ".__lock"
"""The end of the name that TensorStore gives a file until it is whole; a process that is killed leaves it."""

NO_CHUNKS: Mapping[str, tuple[int, ...]] = MappingProxyType({})


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


def lay_out(
    folder: Path,
    arrays: Iterable[Shaped],
    *,
    chunks: Mapping[str, tuple[int, ...]] = NO_CHUNKS,
    nest: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> None:
    """Write a checkpoint of arrays that are all there but hold nothing yet: `Rows` fills them.

    When this returns, it survives a power cut; see `digest_of_layout` for how far it came otherwise.

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
    numbers = {key: np.zeros((1,) * len(array.shape), DTYPES[array.dtype]) for key, array in wanted.items()}
    with Errors(JobError, "Orbax checkpoint cannot be written", folder), context, _without_merge_warning():
        ocp.save(folder.absolute(), nest(numbers))
        item = _item(folder)
        for key, array in wanted.items():
            points.reach("before an array is laid out")
            _resize(item / key, array.shape, _chunk(array, chunks))
    sync_tree(folder)  # Orbax does not


def digest_of_layout(folder: Path) -> str:
    """A digest of all that `lay_out` has written, and `Rows` leaves as it is; of the chunks, nothing.

    Two layouts of the same arrays differ in it, as Orbax notes times.

    Raises:
        JobError: something cannot be read.
    """
    inside = (file for file in folder.glob("*/**/*") if not _is_of_chunk(file.name))
    files = sorted(file for file in (*inside, *(folder / name for name in OWN_FILES)) if file.is_file())
    with io_errors(JobError, "layout of an Orbax checkpoint cannot be read", folder):
        return digest(part for file in files for part in (str(file.relative_to(folder)).encode(), file.read_bytes()))


def remove_broken_chunks(
    folder: Path, arrays: Iterable[Shaped], *, chunks: Mapping[str, tuple[int, ...]] = NO_CHUNKS
) -> None:
    """Take away chunks of a wrong size, and what a killed process left of them: neither can be read or written to.

    Arguments as in `lay_out`; nobody may be writing.

    Raises:
        JobError: something cannot be taken away.
    """
    with Errors(FormatError, NO_SUCH, folder):
        item = _item(folder)
    with io_errors(JobError, "chunks cannot be looked through", folder):
        for array in arrays:
            nbytes = math.prod(_chunk(array, chunks)) * DTYPES[array.dtype].itemsize
            for file in (item / array.key).iterdir():
                if _is_of_chunk(file.name) and not (_CHUNK.fullmatch(file.name) and file.stat().st_size == nbytes):
                    file.unlink()


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
        with Errors(FormatError, NO_SUCH, folder, key):
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
        with Errors(JobError, "array cannot be written", self.folder, self.key):
            place = self._array[region]
            place.write(box.reshape(place.shape), can_reference_source_data_indefinitely=True).result()

    def read(self, start_row: int | None = None, stop_row: int | None = None) -> npt.NDArray[Any]:
        """Rows `start_row` to `stop_row`, all by default, as a fresh array `[rows, ...]`.

        Raises:
            FormatError: they are missing or damaged.
        """
        with Errors(FormatError, "array cannot be read", self.folder, self.key):
            found: npt.NDArray[Any] = self._array[start_row:stop_row].read().result()
        return found

    def read_region(self, region: tuple[slice, ...]) -> npt.NDArray[Any]:
        """A box of the array, as a fresh array.

        Raises:
            FormatError: it is missing or damaged.
        """
        with Errors(FormatError, "array cannot be read", self.folder, self.key):
            found: npt.NDArray[Any] = self._array[region].read().result()
        return found

    def fill(self, region: tuple[slice, ...], box: npt.NDArray[Any]) -> None:
        """Read a box of the array into one of its dtype and shape; as `read_region`."""
        box[...] = self.read_region(region)


def chunk_rows(shape: tuple[int, ...], itemsize: int) -> int:
    """How many rows of its leading axis one chunk of an array holds, at least 1.

    Args:
        shape: `[rows, ...]`.
        itemsize: bytes of one element.
    """
    row_bytes = max(1, int(np.prod(shape[1:], dtype=np.int64)) * itemsize)
    return 1 if row_bytes >= _LARGE_ROW_BYTES else max(1, min(shape[0], CHUNK_BYTES // row_bytes))


def _chunk(array: Shaped, chunks: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of one chunk: what is asked for, or some rows."""
    rows = chunk_rows(array.shape, DTYPES[array.dtype].itemsize)
    return chunks.get(array.key, (rows, *array.shape[1:]))


def _is_of_chunk(name: str) -> bool:
    """Whether a file is a chunk, or will be one."""
    return name.endswith(_LOCK_SUFFIX) or _CHUNK.fullmatch(name) is not None


def _resize(array: Path, shape: tuple[int, ...], chunk: tuple[int, ...]) -> None:
    """Make an array anew as it is stored, but for its size and chunks."""
    import tensorstore

    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(array.absolute())}}
    stored = tensorstore.open(spec, open=True).result().spec().to_json()["metadata"]
    metadata = {**stored, "shape": list(shape), "chunks": list(chunk)}
    tensorstore.open({**spec, "metadata": metadata}, create=True, delete_existing=True).result()


def _item(folder: Path) -> Path:
    """The folder of the tree inside a checkpoint."""
    for found in trees(folder):
        return found
    raise FileNotFoundError("no tree in it")


def _kvstore(item: Path, key: str) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{item.absolute()}/"}
    if (item / "manifest.ocdbt").exists():
        return {"driver": "ocdbt", "base": base, "path": f"{key}/"}
    return {"driver": "file", "path": f"{item.absolute()}/{key}/"}


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
