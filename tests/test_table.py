"""The table against a list typed out by hand, and the published totals."""

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest
from config_cases import PUBLISHED
from table_cases import HF, NATIVE, SMALL, in_bf16

from minimax_jax.layout import table
from minimax_jax.layout.specs import specs, total_bytes

WITHOUT_PREFIX = """
embed_tokens.weight
layers.0.block_sparse_moe.e_score_correction_bias
layers.1.block_sparse_moe.experts.1.w2.weight_scale_inv
norm.weight
lm_head.weight
"""


def test_hugging_face_names_shapes_and_dtypes():
    assert list(specs(SMALL).hf()) == HF


def test_native_names_shapes_and_dtypes():
    assert list(specs(SMALL).native("F8_E4M3")) == NATIVE


def test_without_fp8():
    assert list(specs(SMALL).hf("BF16")) == in_bf16(HF)
    assert list(specs(SMALL).native()) == in_bf16(NATIVE)
    assert [spec.dtype for spec in specs(SMALL).native("F32") if "proj" in spec.key] == ["F32"] * 12


def test_names_without_the_prefix():
    bare = specs(SMALL, "")
    assert [spec.key for spec in bare.hf()] == [key.removeprefix("model.") for key, _, _ in HF]
    assert [spec.key for spec in bare.native("F8_E4M3")] == [key.removeprefix("model.") for key, _, _ in NATIVE]
    assert set(WITHOUT_PREFIX.split()) <= set(bare.places)


def test_a_tied_output_head_is_not_stored():
    tied = specs(SMALL.replace(tie_word_embeddings=True))
    assert list(tied.hf()) == HF[:-1]
    assert list(tied.native("F8_E4M3")) == NATIVE[:-1]


@pytest.mark.parametrize(
    ("key", "native", "expert", "part", "is_scale"),
    [
        ("lm_head.weight", "lm_head.weight", 0, 0, False),
        (
            "model.layers.1.self_attn.o_proj.weight_scale_inv",
            "model.layers.1.self_attn.o_proj.weight",
            0,
            0,
            True,
        ),
        (
            "model.layers.0.block_sparse_moe.e_score_correction_bias",
            "model.layers.0.mlp.gate.e_score_correction_bias",
            0,
            0,
            False,
        ),
        (
            "model.layers.1.block_sparse_moe.experts.0.w1.weight",
            "model.layers.1.mlp.experts.gate_and_up_projs",
            0,
            0,
            False,
        ),
        (
            "model.layers.0.block_sparse_moe.experts.1.w3.weight_scale_inv",
            "model.layers.0.mlp.experts.gate_and_up_projs",
            1,
            1,
            True,
        ),
        (
            "model.layers.1.block_sparse_moe.experts.1.w2.weight",
            "model.layers.1.mlp.experts.down_projs",
            1,
            0,
            False,
        ),
    ],
)
def test_where_a_hugging_face_tensor_goes(key, native, expert, part, is_scale):
    place = specs(SMALL).places[key]
    assert (place.entry.native, place.expert, place.part, place.is_scale) == (native, expert, part, is_scale)
    assert place.entry is specs(SMALL).by_native[native]


def test_places_hold_every_hugging_face_name_and_no_other():
    assert sorted(specs(SMALL).places) == sorted(key for key, _, _ in HF)


def test_logical_axes_have_the_sizes_of_the_shapes():
    sizes = {"vocab": 50, "hidden": 40, "inter": 24, "2*inter": 48, "expert": 2}
    sizes |= {"q_heads*head_dim": 24, "kv_heads*head_dim": 12}
    for entry in specs(SMALL).entries:
        assert tuple(sizes[axis] for axis in entry.row.axes) == entry.part_shape
        assert tuple(sizes[axis] for axis in entry.row.native_axes) == entry.shape
    gate_and_up = specs(SMALL).by_native["model.layers.0.mlp.experts.gate_and_up_projs"]
    assert gate_and_up.row.native_axes == ("expert", "hidden", "2*inter")


def test_layers_of_entries():
    layers = Counter(entry.layer for entry in specs(SMALL).entries)
    assert layers == {None: 3, 0: 12, 1: 12}


def test_some_experts_of_an_entry():
    entry = specs(SMALL.replace(num_local_experts=5)).by_native["model.layers.1.mlp.experts.gate_and_up_projs"]
    some = entry.narrow(slice(2, 4))
    assert some.keys == tuple(
        (
            f"model.layers.1.block_sparse_moe.experts.{expert}.w1.weight",
            f"model.layers.1.block_sparse_moe.experts.{expert}.w3.weight",
        )
        for expert in (2, 3)
    )
    assert (some.native, some.experts, some.parts) == (entry.native, 2, 2)
    assert (some.shape, some.grid) == ((2, 40, 48), (2, 3, 4))
    assert (some.part_shape, some.part_grid) == ((24, 40), (2, 3))
    assert len(list(some.hf_specs("F8_E4M3"))) == 2 * 2 * 2


def test_scales_alone():
    down = specs(SMALL).by_native["model.layers.0.mlp.experts.down_projs"]
    assert list(down.scale_specs()) == [
        ("model.layers.0.block_sparse_moe.experts.0.w2.weight_scale_inv", (3, 2), "F32"),
        ("model.layers.0.block_sparse_moe.experts.1.w2.weight_scale_inv", (3, 2), "F32"),
    ]


def test_blocks_need_not_be_square():
    q_proj = specs(SMALL.replace(weight_block_size=(7, 16))).by_native["model.layers.0.self_attn.q_proj.weight"]
    assert (q_proj.part_grid, q_proj.grid) == ((4, 3), (4, 3))
    down = specs(SMALL.replace(weight_block_size=(7, 16))).by_native["model.layers.0.mlp.experts.down_projs"]
    assert (down.part_grid, down.grid) == ((6, 2), (2, 2, 6))


# ---- the published size


def test_published_counts():
    tensors = list(specs(PUBLISHED).hf())
    assert len({spec.key for spec in tensors}) == len(tensors) == 96_103
    scales = [spec for spec in tensors if spec.key.endswith("_scale_inv")]
    rest = Counter(spec.dtype for spec in tensors if not spec.key.endswith("_scale_inv"))
    assert len(scales) == 47_864 and {spec.dtype for spec in scales} == {"F32"}
    assert rest == {"F8_E4M3": 47_864, "F32": 124, "BF16": 251}


def test_published_sizes():
    assert total_bytes(specs(PUBLISHED).hf()) == 230_121_630_720
    assert total_bytes(specs(PUBLISHED).hf("BF16")) == 457_477_079_040
    assert total_bytes(specs(PUBLISHED).native()) == 457_477_079_040
    assert total_bytes(specs(PUBLISHED).native("F8_E4M3")) == 230_121_630_720
    parameters = sum(int(np.prod(spec.shape, dtype=object)) for spec in specs(PUBLISHED).hf("BF16"))
    assert parameters == 228_689_764_864


def test_one_grouped_tensor_is_past_int32():
    gate_and_up = specs(PUBLISHED).by_native["model.layers.61.mlp.experts.gate_and_up_projs"]
    assert gate_and_up.shape == (256, 3072, 3072)
    assert np.prod(gate_and_up.shape, dtype=np.int64) == 2_415_919_104 > np.iinfo(np.int32).max


def test_abstract_trees_have_shapes_and_dtypes_without_arrays():
    tree = specs(PUBLISHED).abstract()
    assert len(tree) == 62 * 12 + 3
    assert tree["model.layers.61.mlp.experts.down_projs"] == jax.ShapeDtypeStruct((256, 1536, 3072), "bfloat16")
    assert tree["model.layers.0.mlp.gate.weight"] == jax.ShapeDtypeStruct((256, 3072), "float32")
    quantized = specs(PUBLISHED).abstract("F8_E4M3")["model.layers.0.mlp.experts.down_projs"]
    assert quantized == jax.ShapeDtypeStruct((256, 1536, 3072), "float8_e4m3fn")


def test_specs_are_computed_once_a_config():
    assert specs(SMALL) is specs(dataclasses.replace(SMALL))
    assert specs(SMALL) is not specs(SMALL, "")


# ---- names taken apart, for messages


@pytest.mark.parametrize(
    ("key", "kind", "layer", "expert"),
    [
        ("lm_head.weight", "lm_head.weight", None, None),
        ("model.layers.7.mlp.gate.weight", "layers.{}.mlp.gate.weight", 7, None),
        ("layers.7.mlp.gate.weight", "layers.{}.mlp.gate.weight", 7, None),
        ("model.layers.61.x.experts.255.w1.weight", "layers.{}.x.experts.{}.w1.weight", 61, 255),
        ("vision.layers.3.weight", "vision.layers.{}.weight", None, None),
        ("model.layers.x.weight", "layers.x.weight", None, None),
        ("model.layers.-1.weight", "layers.-1.weight", None, None),
        ("model.layers.\u0663.weight", "layers.\u0663.weight", None, None),
        ("model.layers." + "9" * 5000, "layers." + "9" * 5000, None, None),
        ("model.layers", "layers", None, None),
        ("", "", None, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_names_are_taken_apart(key, kind, layer, expert):
    assert table.dissect(key) == (kind, layer, expert)
