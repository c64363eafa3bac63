"""Digests of what a checkpoint holds: of each tensor, of the files around the tensors, and of the whole."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from minimax_jax.dtypes import NAMES
from minimax_jax.io import source as places
from minimax_jax.io.checkpoint import side_files
from minimax_jax.io.files import FileState
from minimax_jax.io.location import Location
from minimax_jax.jobs.compare import bytes_of
from minimax_jax.jobs.source import Source
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
        sha256: of all its bytes; of a file of weights, of what stands before the tensors, which have digests of their
            own. Together they leave no byte out.
        header_only: whether it is a file of weights.
    """

    name: str
    nbytes: int
    sha256: str
    header_only: bool


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
    """The files of a checkpoint: headers of weights, index, config, sidecar and side files. No weight is read.

    Bytes of tensors that were left out have no digest; the header speaks of them.

    Raises:
        FormatError: a file is lost, cannot be read, or has changed since the checkpoint was opened.
    """
    checkpoint = source.checkpoint
    folder = source.path if places.is_folder(source.path) else source.path.parent
    begins: dict[Location, int] = {}
    aside = (info for part in source.left_out for info in part.tensors)
    for info in itertools.chain(checkpoint.tensors.values(), aside):
        begins[info.file] = min(info.start, begins.get(info.file, info.start))
    for file in checkpoint.files:
        yield _file_digest(file, folder, checkpoint.states.get(file), begins.get(file))
    index = () if checkpoint.index_file is None else (checkpoint.index_file,)
    sidecar = sorted({info.file for info in source.sidecar.values()})
    for file in (*index, folder / CONFIG_NAME, *sidecar, *side_files(source.path)):
        yield _file_digest(file, folder, checkpoint.states.get(file))


def _file_digest(
    file: Location, folder: Location, state: FileState | None, header_bytes: int | None = None
) -> FileDigest:
    opened = places.open_file(file, state)
    try:
        nbytes = opened.state.nbytes
        stop = nbytes if header_bytes is None else header_bytes
        sha256 = hashlib.sha256()
        for start in range(0, stop, _PIECE_BYTES):
            piece = bytearray(min(_PIECE_BYTES, stop - start))
            opened.read_into(start, memoryview(piece))
            sha256.update(piece)
    finally:
        opened.close()
    name = str(file)[len(str(folder)) + 1 :]
    return FileDigest(name=name, nbytes=nbytes, sha256=sha256.hexdigest(), header_only=header_bytes is not None)
