"""Tensors as torch.save writes them, and pickles as data: bytes that are damaged, or made to harm."""

import contextlib
import io
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from dcp_cases import Runs, plain, plain_of
from hypothesis import given, settings
from hypothesis import strategies as st

from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import FormatError, Problem
from minimax_jax.io.inert import read_pickle
from minimax_jax.io.source import LocalFile
from minimax_jax.io.torch_archive import find_tensor


class InMemory:
    """A file that is only bytes."""

    def __init__(self, content):
        self.content = content

    def read_into(self, start, buffer):
        found = self.content[start : start + buffer.nbytes] if start >= 0 else b""
        if len(found) != buffer.nbytes:
            raise FormatError(Problem(what="the bytes end here"))
        buffer[:] = found


def archive_of(tensor):
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()


ARCHIVE = archive_of(torch.arange(6, dtype=torch.int16).reshape(2, 3).T)


def read_archive(content):
    opened = InMemory(b"before" + content + b"behind")
    found = find_tensor(opened, 6, 6 + len(content), file="f", key="k")
    whole = np.empty(found.shape, DTYPES[found.dtype])
    found.fill(opened, tuple(slice(0, size) for size in found.shape), whole)
    return whole


def test_an_archive_of_a_torch_that_said_nothing_of_its_byte_order_is_read():
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(ARCHIVE)) as archive, zipfile.ZipFile(stream, "w") as other:
        for name in archive.namelist():
            if not name.endswith("byteorder"):
                other.writestr(name, archive.read(name))
    assert plain(read_archive(stream.getvalue())) == by_torch(stream.getvalue())


def by_torch(content):
    """What torch's safe loader makes of an archive; it says of damage what it likes."""
    try:
        return plain_of(torch.load(io.BytesIO(content), weights_only=True))
    except Exception:
        return "damaged"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(ARCHIVE) - 1), st.integers(0, 255)), min_size=1, max_size=3))
def test_an_archive_with_other_bytes_is_an_error_or_what_torch_reads(changes):
    content = bytearray(ARCHIVE)
    for place, byte in changes:
        content[place] = byte
    with contextlib.suppress(FormatError):
        ours = read_archive(bytes(content))
        assert by_torch(content) in (plain(ours), "damaged")


# ---- pickles


def test_nothing_that_an_archive_names_is_run(tmp_path):
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(ARCHIVE)) as archive, zipfile.ZipFile(stream, "w") as other:
        for name in archive.namelist():
            pickled = name.endswith("data.pkl")
            other.writestr(name, pickle.dumps(Runs(tmp_path / "it-ran"), 2) if pickled else archive.read(name))
    with pytest.raises(FormatError, match="not the description of a plain tensor"):
        read_archive(stream.getvalue())
    assert not (tmp_path / "it-ran").exists()


def test_a_list_of_entries_without_end_is_not_read(tmp_path):
    file, size = tmp_path / "x.distcp", 2**26
    with file.open("wb") as stream:
        stream.truncate(size)
        stream.seek(size)
        stream.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, size, 0, 0))
    tracemalloc.start()
    with contextlib.closing(LocalFile(file)) as opened, pytest.raises(FormatError, match="list of entries is too long"):
        find_tensor(opened, 0, size + 22, file=file, key="k")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


DEEP = b"\x80\x02})" + b"\x85" * 500_000 + b"Ns."
ROOM = b"\x80\x02Nr\xff\xff\xff\xff."
CLASS = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}\x86b."
NUMBERS = (
    b"\x80\x02}(" + b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(9)) + b"u."
)
BYTES = b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"."


HARM = [
    (DEEP, "by name"),
    (NUMBERS, "by name"),
    (ROOM, None),
    (CLASS, "state of an instance"),
    (BYTES, "KeyError"),
    (b"", "EOFError"),
]


@pytest.mark.parametrize(("content", "what"), HARM)
def test_pickles_that_are_made_to_harm_do_none(content, what):
    """A key so deep that hashing it ends the process, keys that share a hash, room for four thousand million references
    or for a terabyte, and a state for a class."""
    expected = contextlib.nullcontext() if what is None else pytest.raises(FormatError, match=what)
    tracemalloc.start()
    try:
        with expected:
            read_pickle(content, file="f", what="it")
        assert tracemalloc.get_traced_memory()[1] < 2**27
    finally:
        tracemalloc.stop()
