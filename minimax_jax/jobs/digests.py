"""Digests of what a checkpoint holds: of each tensor, of the files around the tensors, and of the whole."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from minimax_jax.dtypes import NAMES
from minimax_jax.io import source as places
from minimax_jax.io.beside import side_files
from minimax_jax.io.files import FileState
from minimax_jax.io.header import METADATA_KEY, PREFIX_BYTES
from minimax_jax.io.jsonfile import as_text, parse_object
from minimax_jax.io.location import Location
from minimax_jax.jobs.compare import bytes_of
from minimax_jax.jobs.source import Source, by_ranges
from minimax_jax.layout.config import CONFIG_NAME

_PIECE_BYTES = 2**22


@dataclass(frozen=True, kw_only=True, slots=True)
class Digest:
    """One tensor of the Hugging Face form: what it is, and the SHA-256 of its bytes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FileDigest:
    """One file of a checkpoint.

    Attributes:
        name: path in the checkpoint's folder.
        nbytes: size of the whole file.
        sha256: of all its bytes; of a file of weights, of what stands before the data. Its tensors, those that are left
            out as well, have digests of their own: together they leave no byte out.
        of_weights: whether it is a file of weights.
        texts: of a file of weights, each name in the text of its header (`__metadata__`) with a digest of what it says.
    """

    name: str
    nbytes: int
    sha256: str
    of_weights: bool
    texts: tuple[tuple[str, str], ...] = ()


def digest_of(key: str, tensor: npt.NDArray[Any]) -> Digest:
    """The digest of a tensor in memory."""
    sha256 = hashlib.sha256(bytes_of(tensor).data).hexdigest()
    return Digest(key=key, dtype=NAMES[tensor.dtype], shape=tensor.shape, sha256=sha256)


def overall(digests: Iterable[Digest]) -> str:
    """One digest for many: over name, dtype, shape and digest of each tensor, in the order of names."""
    lines = (f"{d.key} {d.dtype} {list(d.shape)} {d.sha256}\n" for d in digests)
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def config_digest(source: Source) -> str:
    """The SHA-256 of what config.json says, in canonical form: the same for any layout, whoever wrote the file.

    The block size counts where weights are FP8; a float checkpoint may know it from a sidecar or not.
    """
    is_fp8 = "F8_E4M3" in source.survey.dtypes.values()
    config = source.config.replace(weight_block_size=source.config.block if is_fp8 else None)
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()


def file_digests(source: Source) -> Iterator[FileDigest]:
    """The files of a checkpoint: weights, index, config, sidecar and side files. No tensor is read.

    Raises:
        FormatError: a file is lost, cannot be read, or has changed since the checkpoint was opened.
    """
    checkpoint = source.checkpoint
    folder = source.path if places.is_folder(source.path) else source.path.parent
    for file in checkpoint.files:
        yield _header_digest(file, folder, checkpoint.states.get(file))
    index = () if checkpoint.index_file is None else (checkpoint.index_file,)
    sidecar = sorted({info.file for info in source.sidecar.values()})
    for file in (*index, folder / CONFIG_NAME, *sidecar, *side_files(source.path, checkpoint.files)):
        yield _file_digest(file, folder, checkpoint.states.get(file))


def left_out_digests(source: Source) -> Iterator[Digest]:
    """The tensors of a checkpoint that were left out, by the names that they have there; they are read for it.

    Raises:
        FormatError: a file cannot be read, or has changed since the checkpoint was opened.
    """
    aside = {info.key: info for part in source.left_out for info in part.tensors}
    if not aside:
        return
    with by_ranges(source).open_reader(dataclasses.replace(source.checkpoint, tensors=aside)) as reader:
        for key, info in aside.items():
            sha256 = _sha256(functools.partial(reader.read_into, info.file), info.start, info.stop)
            yield Digest(key=key, dtype=info.dtype, shape=info.shape, sha256=sha256)


def _file_digest(file: Location, folder: Location, state: FileState | None) -> FileDigest:
    opened = places.open_file(file, state)
    try:
        nbytes = opened.state.nbytes
        sha256 = _sha256(opened.read_into, 0, nbytes)
    finally:
        opened.close()
    return FileDigest(name=_name(file, folder), nbytes=nbytes, sha256=sha256, of_weights=False)


def _header_digest(file: Location, folder: Location, state: FileState | None) -> FileDigest:
    """The digest of a file of weights, whose header has been checked before."""
    opened = places.open_file(file, state)
    try:
        prefix = bytearray(PREFIX_BYTES)
        opened.read_into(0, memoryview(prefix))
        header = bytearray(int.from_bytes(prefix, "little"))
        opened.read_into(PREFIX_BYTES, memoryview(header))
    finally:
        opened.close()
    found = parse_object(bytes(header), file=file, what="header").get(METADATA_KEY, {})
    return FileDigest(
        name=_name(file, folder),
        nbytes=opened.state.nbytes,
        sha256=hashlib.sha256(prefix + header).hexdigest(),
        of_weights=True,
        texts=tuple(sorted((name, hashlib.sha256(text.encode()).hexdigest()) for name, text in found.items())),
    )


def _sha256(read_into: Callable[[int, memoryview], None], start: int, stop: int) -> str:
    """The SHA-256 of a range of bytes, read some at a time."""
    sha256 = hashlib.sha256()
    for first in range(start, stop, _PIECE_BYTES):
        piece = bytearray(min(_PIECE_BYTES, stop - first))
        read_into(first, memoryview(piece))
        sha256.update(piece)
    return sha256.hexdigest()


def _name(file: Location, folder: Location) -> str:
    return as_text(str(file)[len(str(folder)) + 1 :])
