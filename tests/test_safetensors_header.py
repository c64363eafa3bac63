"""What a malformed file gives: a named error, never data."""

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import fuzz_targets
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from raw_safetensors import entry, library_accepts, raw_bytes

from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import FormatError
from minimax_jax.io.header import MAX_HEADER_BYTES, parse_header, read_header

GOOD = {"__metadata__": {"format": "pt"}, "a": entry("F32", [2, 3], 0, 24), "b": entry("BF16", [4], 24, 32)}
DATA = bytes(range(32))
ENTRY = json.dumps(entry("U8", [8], 0, 8)).encode()


def one(*args: Any) -> bytes:
    return raw_bytes({"x": entry(*args)}, bytes(8))


def text(header: str) -> bytes:
    return raw_bytes(header.encode(), bytes(8))


# what breaks it: the bytes, words of the message, the key it must name
MALFORMED: dict[str, tuple[bytes, str, str | None]] = {
    "empty file": (b"", "truncated", None),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "truncated", None),
    "length beyond the file": (raw_bytes(b"{}", length=3), "truncated", None),
    "length beyond the limit": (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "header too long", None),
    "length of all ones": (b"\xff" * 8 + b"{}", "header too long", None),
    "length zero": (bytes(100), "never finished", None),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull", None),
    "no brace": (text(" {}"), "does not start with", None),
    "an array": (text("[]"), "does not start with", None),
    "not UTF-8": (raw_bytes(b'{"\xff":1}'), "not valid JSON", None),
    "UTF-16": (raw_bytes("{}".encode("utf-16-le")), "not valid JSON", None),
    "unfinished JSON": (text('{"x":'), "not valid JSON", None),
    "text behind the object": (text("{} {}"), "not valid JSON", None),
    "NUL padding": (text("{}\0\0"), "not valid JSON", None),
    "deep JSON": (text('{"x":' + "[" * 100_000 + "]" * 100_000 + "}"), "not valid JSON", None),
    "deep objects": (text('{"x":' * 100_000 + "1" + "}" * 100_000), "not valid JSON", None),
    "NaN": (text('{"x":NaN}'), "NaN is not JSON", None),
    "huge number": (text(f'{{"x":{"9" * 5000}}}'), "not valid JSON", None),
    "half a surrogate pair": (raw_bytes(b'{"\\ud800":%s}' % ENTRY, bytes(8)), "not valid JSON", None),
    "key twice": (raw_bytes(b'{"x":%s,"x":%s}' % (ENTRY, ENTRY), bytes(8)), "twice", "x"),
    "field twice": (
        text('{"x":{"dtype":"U8","shape":[8],"shape":[8],"data_offsets":[0,8]}}'),
        "twice",
        "shape",
    ),
    "metadata is a list": (raw_bytes({"__metadata__": []}), "metadata is not", "__metadata__"),
    "metadata value is a number": (raw_bytes({"__metadata__": {"a": 1}}), "metadata value", "__metadata__"),
    "metadata value is half a surrogate": (text('{"__metadata__":{"a":"\\udc00"}}'), "metadata value", "__metadata__"),
    "tensor is null": (raw_bytes({"x": None}), "lacks a field", "x"),
    "tensor without shape": (raw_bytes({"x": {"dtype": "U8", "data_offsets": [0, 0]}}), "lacks a field", "x"),
    "dtype unknown": (one("F9", [8], 0, 8), "unsupported dtype", "x"),
    "dtype in lower case": (one("u8", [8], 0, 8), "unsupported dtype", "x"),
    "dtype is a list": (one(["U8"], [8], 0, 8), "unsupported dtype", "x"),
    "shape is a number": (one("U8", 8, 0, 8), "impossible shape", "x"),
    "shape negative": (one("U8", [-8], 0, 8), "impossible shape", "x"),
    "shape twice negative": (one("U8", [-2, -4], 0, 8), "impossible shape", "x"),
    "shape fractional": (one("U8", [8.0], 0, 8), "impossible shape", "x"),
    "shape is true": (one("U8", [True], 0, 1), "impossible shape", "x"),
    "shape is text": (one("U8", ["8"], 0, 8), "impossible shape", "x"),
    "shape of 65 axes": (one("U64", [1] * 65, 0, 8), "impossible shape", "x"),
    "shape overflows 64 bits": (one("F32", [2**32, 2**32], 0, 0), "impossible shape", "x"),
    "shape wraps around to the size": (one("U8", [2**63 + 4, 2], 0, 8), "impossible shape", "x"),
    "shape absurd beside a zero": (one("U8", [0, 2**62, 2**62], 0, 0), "impossible shape", "x"),
    "offsets are one number": (
        raw_bytes({"x": {"dtype": "U8", "shape": [8], "data_offsets": 8}}, bytes(8)),
        "impossible data_offsets",
        "x",
    ),
    "offset negative": (one("U8", [8], -8, 0), "impossible data_offsets", "x"),
    "offset is false": (one("U8", [8], False, 8), "impossible data_offsets", "x"),
    "offset fractional": (one("U8", [8], 0.0, 8), "impossible data_offsets", "x"),
    "offsets reversed": (one("U8", [8], 8, 0), "impossible data_offsets", "x"),
    "offsets beyond 64 bits": (one("U8", [8], 2**64, 2**64 + 8), "impossible data_offsets", "x"),
    "three offsets": (
        raw_bytes({"x": {"dtype": "U8", "shape": [8], "data_offsets": [0, 4, 8]}}, bytes(8)),
        "impossible data_offsets",
        "x",
    ),
    "size is not that of the shape": (one("F32", [8], 0, 8), "do not match", "x"),
    "size of a scalar": (one("F32", [], 0, 8), "do not match", "x"),
    "size of an empty tensor": (one("F32", [0, 4], 0, 8), "do not match", "x"),
    "data far outside of the file": (one("U8", [8], 2**40, 2**40 + 8), "gap", "x"),
    "data ends early": (raw_bytes(GOOD, DATA[:-1]), "truncated", "b"),
    "data is missing": (raw_bytes(GOOD), "truncated", "a"),
    "bytes behind the data": (raw_bytes(GOOD, DATA + b"\0"), "behind the last tensor", None),
    "bytes but no tensor": (raw_bytes({}, b"\0"), "behind the last tensor", None),
    "gap at the start": (one("U8", [4], 4, 8), "gap", "x"),
    "gap between": (raw_bytes({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 4, 6)}, bytes(6)), "gap", "b"),
    "overlap": (raw_bytes({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, bytes(6)), "overlaps", "b"),
    "same place twice": (
        raw_bytes({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}, bytes(4)),
        "overlaps",
        "b",
    ),
    "empty tensor inside another": (
        raw_bytes({"a": entry("U8", [4], 0, 4), "b": entry("U8", [0], 2, 2)}, bytes(4)),
        "overlaps",
        "b",
    ),
}
# Stricter than the library, on purpose: a file on which two readers may disagree is no checkpoint.
OURS_ALONE = {"key twice", "shape of 65 axes"}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_named_errors(tmp_path: Path, case: str) -> None:
    content, words, key = MALFORMED[case]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        read_header(file)
    problem = caught.value.problems[0]
    assert words in str(problem) and (problem.file, problem.key) == (str(file), key)
    assert library_accepts(content) == (case in OURS_ALONE)


def test_the_file_that_the_malformed_ones_are_made_from_is_good(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(raw_bytes(GOOD, DATA))
    header = read_header(tmp_path / "m.safetensors")
    found = [(info.key, info.dtype, info.nbytes, info.shape) for info in header.tensors.values()]
    assert header.metadata == {"format": "pt"}
    assert found == [("a", "F32", 24, (2, 3)), ("b", "BF16", 8, (4,))]
    assert header.file_bytes == (tmp_path / "m.safetensors").stat().st_size


def test_all_that_is_wrong_with_the_tensors_is_told_at_once() -> None:
    header = {
        "a": entry("F9", [-1], 1, 0),
        "b": entry("U8", [2], 0, 3),
        "c": [],
        "__metadata__": {"d": 1, "e": None},
    }
    with pytest.raises(FormatError) as caught:
        parse_header(json.dumps(header).encode(), file=Path("f"), file_bytes=1000)
    assert [problem.key for problem in caught.value.problems] == ["__metadata__"] * 2 + ["a"] * 3 + ["b", "c"]


def test_tensors_come_in_the_order_of_the_data(tmp_path: Path) -> None:
    header = {"late": entry("U8", [2], 2, 4), "empty": entry("U8", [0], 2, 2), "early": entry("U8", [2], 0, 2)}
    file = tmp_path / "m.safetensors"
    file.write_bytes(raw_bytes(header, bytes(4)))
    assert list(read_header(file).tensors) == ["early", "empty", "late"]


def test_a_tensor_inside_another_is_one_problem(tmp_path: Path) -> None:
    header = {"a": entry("U8", [6], 0, 6), "b": entry("U8", [2], 2, 4), "c": entry("U8", [2], 6, 8)}
    (tmp_path / "m.safetensors").write_bytes(raw_bytes(header, bytes(8)))
    with pytest.raises(FormatError) as caught:
        read_header(tmp_path / "m.safetensors")
    assert [problem.key for problem in caught.value.problems] == ["b"]


@pytest.mark.parametrize("length", [0, 100_000])
def test_messages_hold_no_control_characters_and_stay_short(tmp_path: Path, length: int) -> None:
    key = "\x1b[2J\n" + "x" * length
    (tmp_path / "m.safetensors").write_bytes(raw_bytes({key: entry("U8", "y" * 100_000, 0, 0)}))
    with pytest.raises(FormatError) as caught:
        read_header(tmp_path / "m.safetensors")
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 1500


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "device", "loop"])
def test_what_is_not_a_file_is_refused_and_does_not_hang(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "model.safetensors"
    if kind == "folder":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "loop":
        file.symlink_to(file)
    with pytest.raises(FormatError, match=r"not a regular file|cannot be opened"):
        read_header(Path("/dev/zero") if kind == "device" else file)


VALID = raw_bytes(GOOD, DATA)
INSERTED = st.binary(max_size=4) | st.sampled_from([b'"', b"9"])
EDITS = st.lists(st.tuples(st.integers(0, len(VALID)), st.integers(0, 4), INSERTED), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(edits=EDITS)
def test_fuzz_bytes(edits: list[tuple[int, int, bytes]]) -> None:
    content = VALID
    for place, removed, inserted in edits:
        content = content[:place] + inserted + content[place + removed :]
    fuzz_targets.header(content)


NUMBERS = st.integers(-2, 40) | st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, 10**40]) | st.booleans()
JSON = st.recursive(st.none() | NUMBERS | st.floats() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3))
SHAPES = st.lists(st.integers(0, 5), max_size=4) | st.lists(NUMBERS, max_size=4)
KEYS = st.text(max_size=3) | st.just("__metadata__")
ENTRIES = st.fixed_dictionaries(
    {"dtype": st.sampled_from([*DTYPES, "F4"]) | JSON, "shape": SHAPES | JSON, "data_offsets": SHAPES | JSON},
    optional={"more": JSON},
)


@settings(max_examples=300, deadline=None)
@given(header=st.dictionaries(KEYS, ENTRIES | JSON, max_size=4), size=st.integers(0, 40))
@example(header={"x": entry("U8", [], 0, 1), "y": entry("C64", [2], 1, 17)}, size=17)
def test_fuzz_json(header: dict[str, Any], size: int) -> None:
    fuzz_targets.header(raw_bytes(header, bytes(size)))


SHIFTS = st.sampled_from([0] * 9 + [-1, 1])
PLACED = st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3), SHIFTS)


@settings(max_examples=200, deadline=None)
@given(tensors=st.lists(PLACED, max_size=5), cut=st.sampled_from([0, 0, 0, 1, -1]))
def test_fuzz_places(tensors: list[tuple[str, list[int], int]], cut: int) -> None:
    header, position = {}, 0
    for number, (dtype, shape, shift) in enumerate(tensors):
        begin = position + shift
        position = begin + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        header[str(number)] = entry(dtype, shape, begin, position)
    content = raw_bytes(header, bytes(max(position + cut, 0)))
    assert fuzz_targets.header(content) == library_accepts(content)
