"""Reads folders of `torch.distributed.checkpoint` by torch, once their table of contents is found to run no code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from minimax_jax.errors import FormatError, Problem
from minimax_jax.io.dcp import METADATA_NAME
from minimax_jax.io.inert import names_in
from minimax_jax.io.torch_archive import TORCH_DTYPES

_MODULE = "torch.distributed.checkpoint."
_CLASSES = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
_HARMLESS = {
    *(f"{_MODULE}metadata.{name}" for name in _CLASSES),
    f"{_MODULE}filesystem._StorageInfo",
    *TORCH_DTYPES,
    *("torch.Size", "torch.serialization._get_layout", "collections.OrderedDict"),
    *("pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib._local.PosixPath", "pathlib._local.PurePosixPath"),
}
"""What tables of contents name when torch writes them."""


class Reader(FileSystemReader):
    """torch's reader, for which Python would run whatever a table of contents names."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table of contents of all processes; it is the bytes that were looked at that Python's loader gets.

        Raises:
            FormatError: it names what torch does not write there, or is something else.
            OSError: there is none.
        """
        file = Path(self.path) / METADATA_NAME
        what, content = "no checkpoint can be opened here: its table of contents", file.read_bytes()
        foreign = names_in(content, file=file, what=what) - _HARMLESS
        if foreign:
            what, remedy = f"{what} would run code", "if you trust it, load it by torch alone"
            raise FormatError(Problem(what=what, file=str(file), got=", ".join(sorted(foreign)[:3]), remedy=remedy))
        metadata = pickle.loads(content)
        if not isinstance(metadata, Metadata):  # instead of one that is false, torch would load another file
            got, remedy = type(metadata).__name__, "copy the file again, or save the checkpoint anew"
            raise FormatError(Problem(what="no table of contents", file=str(file), got=got, remedy=remedy))
        return metadata
