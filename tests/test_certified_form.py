"""The certificate itself: what it says, and that any change to it is found."""

import json

import numpy as np
import pytest
from certified_cases import EMBED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import minimax_jax as mj
from minimax_jax.errors import FormatError
from minimax_jax.jobs.certified import FORMAT, read_certificate, seal


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_flipped_bit_in_a_certificate_is_found(certified, tmp_path, data):
    good = (certified / "bf16.json").read_bytes()
    bit = data.draw(st.integers(0, 8 * len(good) - 1))
    (tmp_path / "c.json").write_bytes(good[: bit // 8] + bytes([good[bit // 8] ^ 1 << bit % 8]) + good[bit // 8 + 1 :])
    with pytest.raises(FormatError):
        read_certificate(tmp_path / "c.json")


def without(document, *path):
    *steps, last = path
    inner = document
    for step in steps:
        inner = inner[step]
    del inner[last]


def put(document, value, *path):
    *steps, last = path
    inner = document
    for step in steps:
        inner = inner[step]
    inner[last] = value


FORGED = {
    "no options": lambda d: without(d, "options"),
    "options of another kind": lambda d: put(d, [], "options"),
    "no checkpoints": lambda d: put(d, [], "checkpoints"),
    "three checkpoints": lambda d: put(d, d["checkpoints"] * 3, "checkpoints"),
    "checkpoints of another kind": lambda d: put(d, 5, "checkpoints"),
    "no tensors": lambda d: without(d, "tensors"),
    "tensors of another kind": lambda d: put(d, [1], "tensors"),
    "a tensor without digest": lambda d: without(d, "tensors", EMBED, "sha256"),
    "a tensor that went": lambda d: without(d, "tensors", EMBED),
    "a shape that is none": lambda d: put(d, [-1], "tensors", EMBED, "shape"),
    "a list of no digests": lambda d: put(d, [], "tensors", EMBED),
    "a path that is no text": lambda d: put(d, 7, "checkpoints", 0, "path"),
    "a digest of nothing known": lambda d: put(d, 5, "checkpoints", 0, "files", "config.json", "of"),
    "a digest of another part": lambda d: put(d, "Header", "checkpoints", 0, "files", "config.json", "of"),
    "a file without size": lambda d: put(d, "x", "checkpoints", 0, "files", "config.json", "bytes"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_sealed_certificate_of_a_wrong_form_is_refused(certified, tmp_path, case):
    document = json.loads((certified / "bf16.json").read_bytes())
    FORGED[case](document)
    document["seal"] = seal(document)
    (tmp_path / "c.json").write_text(json.dumps(document))
    with pytest.raises(FormatError, match="form") as caught:
        mj.verify(certified / "bf16", certificate=tmp_path / "c.json")
    assert caught.value.problems[0].file == str(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "known form"),
        (json.dumps({"format": FORMAT}).encode(), "seal"),
        (json.dumps({"format": FORMAT + "0"}).encode(), "known form"),
        (b'{"format":' + b"[" * 900 + b"]" * 900 + b"}", "known form|not valid JSON"),
        (b'{"format":"' + FORMAT.encode() + b'","x":' + b"[" * 970 + b"]" * 970 + b"}", "form|seal|not valid JSON"),
    ],
)
def test_what_is_no_certificate_is_refused_before_the_work(certified, tmp_path, content, words):
    (tmp_path / "c.json").write_bytes(content)
    moments = []
    with pytest.raises(FormatError, match=words):
        mj.verify(certified / "hf", certificate=tmp_path / "c.json", progress=moments.append)
    assert not moments


def test_a_certificate_says_with_what_it_was_made(certified):
    told = json.loads((certified / "hf.json").read_bytes())
    assert told["versions"]["numpy"] == np.__version__ and told["versions"]["python"].startswith("3.")
    assert set(told["versions"]) == {"python", "minimax_jax", "jax", "jaxlib", "numpy", "ml_dtypes"}
    assert told["options"] == {"by": "value", "sample": None} and told["seal"] == seal(told)
    assert [layer["layer"] for layer in told["layers"]] == [None, 0, 1]
    files = told["checkpoints"][0]["files"]
    assert {name: fact["bytes"] for name, fact in files.items()} == {
        file.name: file.stat().st_size for file in (certified / "hf").iterdir()
    }
    assert {fact["of"] for name, fact in files.items() if name.endswith(".safetensors")} == {"header"}
