"""Which tensor goes where: what is laid out is what the safetensors library reads."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_safetensors import library_reads

from minimax_jax.errors import JobError
from minimax_jax.io.header import MAX_HEADER_BYTES
from minimax_jax.io.shards import TensorOut, lay_out


def out(key: str, *shape: int, dtype: str = "U8") -> TensorOut:
    return TensorOut(key=key, dtype=dtype, shape=shape)


def test_one_file_has_no_number_and_several_are_numbered() -> None:
    tensors = [out("a", 10), out("b", 10), out("c", 10)]
    assert [shard.file_name for shard in lay_out(tensors)] == ["model.safetensors"]
    names = [shard.file_name for shard in lay_out(tensors, shard_bytes=20)]
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert lay_out(tensors, stem="scales")[0].file_name == "scales.safetensors"


@pytest.mark.parametrize(
    ("shard_bytes", "groups"),
    [(30, "abc de"), (29, "ab c de"), (10, "a b c de"), (1, "a b c de"), (10**9, "abcde")],
)
def test_tensors_keep_their_order_and_never_span_files(shard_bytes: int, groups: str) -> None:
    shards = lay_out([out("a", 10), out("b", 10), out("c", 10), out("d", 25), out("e", 0)], shard_bytes=shard_bytes)
    assert " ".join("".join(shard.tensors) for shard in shards) == groups


METADATA = st.dictionaries(st.text('ab"é', max_size=2), st.text('ab"é', max_size=2))
TENSORS = st.lists(
    st.builds(
        TensorOut,
        key=st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        dtype=st.sampled_from(["U8", "F8_E4M3", "BF16", "F32", "I64"]),
        shape=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    max_size=8,
    unique_by=lambda tensor: tensor.key,
)


@settings(max_examples=150, deadline=None)
@given(tensors=TENSORS, shard_bytes=st.integers(1, 200), metadata=METADATA)
def test_any_layout_is_what_the_library_reads(
    tensors: list[TensorOut], shard_bytes: int, metadata: dict[str, str]
) -> None:
    shards = lay_out(tensors, shard_bytes=shard_bytes, metadata=metadata)
    assert [key for shard in shards for key in shard.tensors] == [tensor.key for tensor in tensors]
    by_key = {tensor.key: tensor for tensor in tensors}
    for shard in shards:
        data = np.random.default_rng(0).bytes(shard.file_bytes - len(shard.header))
        whole = shard.header + data
        expected = {
            key: (by_key[key].dtype, list(by_key[key].shape), whole[start:stop])
            for key, (start, stop) in shard.tensors.items()
        }
        assert len(shard.header) % 64 == 0 and library_reads(whole) == expected
        header = json.loads(shard.header[8:])
        assert header.get("__metadata__", {}) == metadata
        filled = sum(stop - start for start, stop in shard.tensors.values())
        assert filled <= shard_bytes or sum(start < stop for start, stop in shard.tensors.values()) == 1


@pytest.mark.parametrize(
    ("tensors", "options", "words"),
    [
        ([out("a", 1), out("a", 2)], {}, "more than once"),
        ([out("__metadata__", 1)], {}, "impossible key"),
        ([out("\ud800", 1)], {}, "impossible key"),
        ([out("a", 1, dtype="F4")], {}, "unsupported dtype"),
        ([out("a", -1)], {}, "impossible shape"),
        ([out("a", True)], {}, "impossible shape"),
        ([out("a", 2**40, 2**40)], {}, "impossible shape"),
        ([out("a", 1)], {"shard_bytes": 0}, "must be positive"),
        ([out("a", 1)], {"metadata": {"a": 1}}, "text to text"),
        ([out("x" * MAX_HEADER_BYTES, 1)], {}, "header too long"),
    ],
)
def test_layouts_that_cannot_be_written_are_refused(
    tensors: list[TensorOut], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(JobError, match=words):
        lay_out(tensors, **options)
