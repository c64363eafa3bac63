"""Which tensor goes into which file, and where: decided before anything is written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import JobError, Problem, raise_if
from minimax_jax.io.checkpoint import SUFFIX
from minimax_jax.io.header import MAX_HEADER_BYTES, METADATA_KEY, is_shape, serialise_header
from minimax_jax.io.jsonfile import is_text, shown

DEFAULT_SHARD_BYTES = 5_000_000_000
_TORCH_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})  # accelerate refuses files without it


class TensorOut(NamedTuple):
    """A tensor to be written: its key, its dtype by format name, its shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, kw_only=True)
class ShardLayout:
    """One file to be written.

    Attributes:
        header: the bytes before the data, a multiple of 64.
        tensors: key to (start, stop), positions in the file; neither gaps nor overlaps.
        file_bytes: size of the whole file.
    """

    file_name: str
    header: bytes
    tensors: dict[str, tuple[int, int]]
    file_bytes: int


def lay_out(
    tensors: Sequence[TensorOut],
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    metadata: Mapping[str, str] = _TORCH_METADATA,
    stem: str = "model",
) -> tuple[ShardLayout, ...]:
    """Distribute tensors over files, in the given order; the same arguments give the same bytes.

    A tensor never spans files. Data starts at a multiple of 64 bytes, and tensors follow each other without gaps, as
    the format demands: a tensor is aligned to 64 bytes if the sizes of those before it in its file are multiples of 64.

    Args:
        tensors: what to write.
        shard_bytes: most bytes of tensor data in one file; a tensor that is larger gets a file of its own.
        metadata: free-form text for the header of every file.
        stem: one file is named `<stem>.safetensors`, several `<stem>-00001-of-00002.safetensors` and so on.

    Raises:
        JobError: the tensors cannot be written so; all that is wrong.
    """
    raise_if(_problems(tensors, shard_bytes, metadata), JobError)
    groups = list(_split(tensors, shard_bytes))
    shards = tuple(_shard(group, metadata, _file_name(stem, i, len(groups))) for i, group in enumerate(groups, 1))
    raise_if(_long_headers(shards), JobError)
    return shards


def index_of(shards: Sequence[ShardLayout]) -> dict[str, Any]:
    """The contents of `model.safetensors.index.json`: which file holds which tensor, and the bytes of all tensors."""
    total_bytes = sum(stop - start for shard in shards for start, stop in shard.tensors.values())
    weight_map = {key: shard.file_name for shard in shards for key in shard.tensors}
    return {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}


def _split(tensors: Sequence[TensorOut], shard_bytes: int) -> Iterator[list[TensorOut]]:
    group: list[TensorOut] = []
    filled = 0
    for tensor in tensors:
        nbytes = tensor.nbytes
        if group and nbytes and filled + nbytes > shard_bytes:
            yield group
            group, filled = [], 0
        group.append(tensor)
        filled += nbytes
    yield group


def _shard(group: list[TensorOut], metadata: Mapping[str, str], file_name: str) -> ShardLayout:
    sized = [(out.key, out.dtype, out.shape, out.nbytes) for out in group]
    header = serialise_header(sized, metadata)
    places: dict[str, tuple[int, int]] = {}
    position = len(header)
    for key, _, _, nbytes in sized:
        places[key] = position, position + nbytes
        position += nbytes
    return ShardLayout(file_name=file_name, header=header, tensors=places, file_bytes=position)


def _file_name(stem: str, number: int, count: int) -> str:
    return f"{stem}{SUFFIX}" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}{SUFFIX}"


def _problems(tensors: Sequence[TensorOut], shard_bytes: int, metadata: Mapping[str, str]) -> Iterator[Problem]:
    if shard_bytes < 1:
        yield Problem(what="shard size must be positive", got=f"{shard_bytes} bytes")
    if not all(is_text(text) for item in metadata.items() for text in item):
        yield Problem(what="metadata must map text to text", got=repr(dict(metadata)))
    for tensor in tensors:
        if not is_text(tensor.key) or tensor.key == METADATA_KEY:
            yield Problem(what="impossible key", key=shown(tensor.key))
        if tensor.dtype not in DTYPES:
            expected = f"one of {', '.join(DTYPES)}"
            yield Problem(what="unsupported dtype", key=shown(tensor.key), expected=expected, got=tensor.dtype)
        if not is_shape(tensor.shape):
            yield Problem(what="impossible shape", key=shown(tensor.key), got=str(tensor.shape))
    for key, count in Counter(tensor.key for tensor in tensors).items():
        if count > 1:
            yield Problem(what="tensor given more than once", key=shown(key), got=f"{count} times")


def _long_headers(shards: Sequence[ShardLayout]) -> Iterator[Problem]:
    for shard in shards:
        if len(shard.header) > MAX_HEADER_BYTES:
            expected, got = f"at most {MAX_HEADER_BYTES:,} bytes", f"{len(shard.header):,} bytes"
            what, remedy = "header too long for the format", "choose a smaller shard size"
            yield Problem(what=what, file=shard.file_name, expected=expected, got=got, remedy=remedy)
