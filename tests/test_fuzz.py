"""Any bytes in place of any file: a named error, or what others read there too. Never a crash, a hang, or much memory.

What has to hold is said in `fuzz_targets`; `fuzz/fuzz_parsers.py` does the same guided by coverage.
"""

import contextlib
import copy
import io
import itertools
import json
import pickle
import pickletools
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import fuzz_targets
import pytest
from fuzz_targets import TARGETS
from hypothesis import given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).parent / "fuzz" / "corpus"
SEEDS = fuzz_targets.seeds()
SLOW_MS = 5000
"""Far more than any of it takes: what runs longer hangs."""

SPARE_BYTES, BYTES_PER_BYTE = 24 * 2**20, 200
"""Memory that a parser may take: so much (a config.json is read with room for 16 MiB), and so much for each byte."""

each_target = pytest.mark.parametrize("name", TARGETS)
fuzzed = settings(max_examples=80, deadline=SLOW_MS)


@contextlib.contextmanager
def bounded(content):
    tracemalloc.start()
    try:
        yield
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes <= SPARE_BYTES + BYTES_PER_BYTE * len(content)


@pytest.fixture(scope="module", autouse=True)
def everything_is_imported():
    for name, contents in SEEDS.items():
        for content in contents:
            assert TARGETS[name](content), name


@each_target
def test_the_corpus(name):
    files = sorted((CORPUS / name).iterdir())
    accepted = [TARGETS[name](file.read_bytes()) for file in files]
    assert any(accepted)
    for content in SEEDS[name]:
        assert content in [file.read_bytes() for file in files], "run fuzz_targets.write_seeds again"


# --- random bytes ----------------------------------------------------------------------------------------------------


@each_target
@fuzzed
@given(content=st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_random_bytes(name, content):
    with bounded(content):
        TARGETS[name](content)


# --- good files with some bytes changed ------------------------------------------------------------------------------

PIECES = st.binary(max_size=4) | st.sampled_from(
    [b'"', b"9", b"{", b"[", b"}", b"\n", b"-", b"null", b"\\ud800", b"\0"]
)


@st.composite
def spliced(draw, name):
    content = draw(st.sampled_from(SEEDS[name]))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        content = content[:place] + draw(PIECES) + content[place + draw(st.integers(0, 4)) :]
    return content


@each_target
@fuzzed
@given(data=st.data())
def test_good_files_with_some_bytes_changed(name, data):
    content = data.draw(spliced(name))
    with bounded(content):
        TARGETS[name](content)


# --- good files with another structure -------------------------------------------------------------------------------

NUMBERS = st.integers(-3, 300) | st.sampled_from([2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**40, -(2**63)])
LEAVES = st.none() | st.booleans() | NUMBERS | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4)
PATHS = st.sampled_from(["../x", "/etc/passwd", "x.safetensors/..", "y.safetensors", ".", "", "a\0b", "\ud800"])
VALUES = st.recursive(
    LEAVES | PATHS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | PATHS, inner, max_size=3),
    max_leaves=6,
)
DEEP = st.integers(1, 2000).map(lambda depth: "[" * depth + "]" * depth)


def places(value: Any, path: tuple[Any, ...] = ()):
    """The path of everything in a JSON value, itself included."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, one in inner:
        yield from places(one, (*path, step))


def at(document, path):
    for step in path:
        document = document[step]
    return document


@st.composite
def mutated(draw, document):
    """JSON text of a document in which some values went, came twice, moved, or are others."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(document))))
        if not path:
            continue
        holder, step = at(document, path[:-1]), path[-1]
        change = draw(st.sampled_from(["value", "value", "value", "remove", "rename", "swap", "nudge"]))
        if change == "remove":
            del holder[step]
        elif change == "rename" and isinstance(holder, dict):
            holder[draw(st.text(max_size=3) | st.sampled_from(["x", *holder]))] = holder.pop(step)
        elif change == "swap":
            other = draw(st.sampled_from(list(places(document))))
            holder[step] = copy.deepcopy(at(document, other))
        elif change == "nudge" and type(holder[step]) is int:
            holder[step] += draw(st.sampled_from([-1, 1, 8, 2**32, 2**63]))
        else:
            holder[step] = draw(VALUES)
    text = json.dumps(document, separators=(",", ":"))
    if draw(st.integers(0, 9)) == 0:  # a key twice, or a hole without end
        text = text[:-1] + draw(st.sampled_from([',"a":1,"a":1}', ',"deep":'])) + draw(DEEP) + "}"
    return text.encode("utf-8", "surrogatepass")


def prefixed(text, seed):
    """A safetensors file with another header, and the data of a good one."""
    (length,) = struct.unpack("<Q", seed[:8])
    return struct.pack("<Q", len(text)) + text + seed[8 + length :]


@st.composite
def shuffled(draw, pickled):
    """A pickle some of whose opcodes went, came twice, moved, or are numbers."""
    starts = [start for _, _, start in pickletools.genops(pickled)]
    codes = [pickled[start:stop] for start, stop in itertools.pairwise([*starts, len(pickled)])]
    for _ in range(draw(st.integers(1, 3))):
        one, other = (draw(st.integers(0, len(codes) - 1)) for _ in range(2))
        change = draw(st.sampled_from(["remove", "repeat", "swap", "number"]))
        number = draw(st.integers(-3, 300) | st.sampled_from([2**31 - 1, -(2**31)]))
        codes[one : one + 1] = {
            "remove": [],
            "repeat": [codes[one]] * 2,
            "swap": [codes[other]],
            "number": [pickle.BININT + struct.pack("<i", number)],
        }[change]
    return b"".join(codes)


def with_pickle(seed, change):
    """The archive of a tensor with another pickle in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(seed)) as archive, zipfile.ZipFile(stream, "w") as other:
        for name in archive.namelist():
            content = archive.read(name)
            other.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return stream.getvalue()


@st.composite
def restructured(draw, name):
    seed = draw(st.sampled_from(SEEDS[name]))
    if name == "contents":
        return draw(shuffled(seed))
    if name == "archive":
        return with_pickle(seed, lambda pickled: draw(shuffled(pickled)))
    if name in ("header", "sidecar"):
        (length,) = struct.unpack("<Q", seed[:8])
        return prefixed(draw(mutated(json.loads(seed[8 : 8 + length]))), seed)
    if name == "journal":
        lines = [json.loads(line) for line in seed.split(b"\n")[:3]]
        chosen = draw(st.integers(0, 2))
        texts = [json.dumps(line).encode() for line in lines]
        texts[chosen] = draw(mutated(lines[chosen]))
        return b"\n".join(texts) + b"\n"
    if name == "certificate":
        changed = draw(mutated(json.loads(seed)))
        with contextlib.suppress(ValueError, RecursionError, UnicodeDecodeError):
            return fuzz_targets.resealed(json.loads(changed)) if draw(st.booleans()) else changed
        return changed
    return draw(mutated(json.loads(seed)))


@each_target
@settings(max_examples=150, deadline=SLOW_MS)
@given(data=st.data())
def test_good_files_with_another_structure(name, data):
    content = data.draw(restructured(name))
    with bounded(content):
        TARGETS[name](content)


# --- the checks bite -------------------------------------------------------------------------------------------------


def test_a_parser_that_crashes_or_believes_too_much_would_be_seen(monkeypatch):
    monkeypatch.setattr(fuzz_targets, "library_reads", lambda content: {})
    with pytest.raises(AssertionError):
        TARGETS["header"](SEEDS["header"][0])
    monkeypatch.setattr(fuzz_targets, "open_checkpoint", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        TARGETS["index"](b"{}")
    with pytest.raises(AssertionError), bounded(b""):
        bytearray(SPARE_BYTES + 1000)
