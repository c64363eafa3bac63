"""The table against a list typed out by hand, the published totals, transformers and NeMo AutoModel."""

import dataclasses
import json
import warnings
from collections import Counter
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

import minimax_jax as mj
from minimax_jax.layout import table
from minimax_jax.layout.specs import specs, total_bytes

with warnings.catch_warnings():  # torch uses what torch deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    from nemo_automodel.components.models.minimax_m2 import state_dict_adapter as nemo

SMALL = mj.MiniMaxConfig(
    hidden_size=40,
    intermediate_size=24,
    num_hidden_layers=2,
    num_local_experts=2,
    num_experts_per_tok=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    rotary_dim=4,
    vocab_size=50,
    weight_block_size=(16, 16),
)

REAL = mj.MiniMaxConfig(
    hidden_size=3072,
    intermediate_size=1536,
    num_hidden_layers=62,
    num_local_experts=256,
    num_experts_per_tok=8,
    num_attention_heads=48,
    num_key_value_heads=8,
    head_dim=128,
    rotary_dim=64,
    vocab_size=200064,
    weight_block_size=(128, 128),
)

# Typed out by hand for SMALL, from the published names: name, dtype, shape.
HF = """
model.embed_tokens.weight BF16 50 40
model.layers.0.input_layernorm.weight BF16 40
model.layers.0.self_attn.q_proj.weight F8_E4M3 24 40
model.layers.0.self_attn.q_proj.weight_scale_inv F32 2 3
model.layers.0.self_attn.k_proj.weight F8_E4M3 12 40
model.layers.0.self_attn.k_proj.weight_scale_inv F32 1 3
model.layers.0.self_attn.v_proj.weight F8_E4M3 12 40
model.layers.0.self_attn.v_proj.weight_scale_inv F32 1 3
model.layers.0.self_attn.o_proj.weight F8_E4M3 40 24
model.layers.0.self_attn.o_proj.weight_scale_inv F32 3 2
model.layers.0.self_attn.q_norm.weight BF16 24
model.layers.0.self_attn.k_norm.weight BF16 12
model.layers.0.post_attention_layernorm.weight BF16 40
model.layers.0.block_sparse_moe.gate.weight F32 2 40
model.layers.0.block_sparse_moe.e_score_correction_bias F32 2
model.layers.0.block_sparse_moe.experts.0.w1.weight F8_E4M3 24 40
model.layers.0.block_sparse_moe.experts.0.w1.weight_scale_inv F32 2 3
model.layers.0.block_sparse_moe.experts.0.w3.weight F8_E4M3 24 40
model.layers.0.block_sparse_moe.experts.0.w3.weight_scale_inv F32 2 3
model.layers.0.block_sparse_moe.experts.1.w1.weight F8_E4M3 24 40
model.layers.0.block_sparse_moe.experts.1.w1.weight_scale_inv F32 2 3
model.layers.0.block_sparse_moe.experts.1.w3.weight F8_E4M3 24 40
model.layers.0.block_sparse_moe.experts.1.w3.weight_scale_inv F32 2 3
model.layers.0.block_sparse_moe.experts.0.w2.weight F8_E4M3 40 24
model.layers.0.block_sparse_moe.experts.0.w2.weight_scale_inv F32 3 2
model.layers.0.block_sparse_moe.experts.1.w2.weight F8_E4M3 40 24
model.layers.0.block_sparse_moe.experts.1.w2.weight_scale_inv F32 3 2
model.layers.1.input_layernorm.weight BF16 40
model.layers.1.self_attn.q_proj.weight F8_E4M3 24 40
model.layers.1.self_attn.q_proj.weight_scale_inv F32 2 3
model.layers.1.self_attn.k_proj.weight F8_E4M3 12 40
model.layers.1.self_attn.k_proj.weight_scale_inv F32 1 3
model.layers.1.self_attn.v_proj.weight F8_E4M3 12 40
model.layers.1.self_attn.v_proj.weight_scale_inv F32 1 3
model.layers.1.self_attn.o_proj.weight F8_E4M3 40 24
model.layers.1.self_attn.o_proj.weight_scale_inv F32 3 2
model.layers.1.self_attn.q_norm.weight BF16 24
model.layers.1.self_attn.k_norm.weight BF16 12
model.layers.1.post_attention_layernorm.weight BF16 40
model.layers.1.block_sparse_moe.gate.weight F32 2 40
model.layers.1.block_sparse_moe.e_score_correction_bias F32 2
model.layers.1.block_sparse_moe.experts.0.w1.weight F8_E4M3 24 40
model.layers.1.block_sparse_moe.experts.0.w1.weight_scale_inv F32 2 3
model.layers.1.block_sparse_moe.experts.0.w3.weight F8_E4M3 24 40
model.layers.1.block_sparse_moe.experts.0.w3.weight_scale_inv F32 2 3
model.layers.1.block_sparse_moe.experts.1.w1.weight F8_E4M3 24 40
model.layers.1.block_sparse_moe.experts.1.w1.weight_scale_inv F32 2 3
model.layers.1.block_sparse_moe.experts.1.w3.weight F8_E4M3 24 40
model.layers.1.block_sparse_moe.experts.1.w3.weight_scale_inv F32 2 3
model.layers.1.block_sparse_moe.experts.0.w2.weight F8_E4M3 40 24
model.layers.1.block_sparse_moe.experts.0.w2.weight_scale_inv F32 3 2
model.layers.1.block_sparse_moe.experts.1.w2.weight F8_E4M3 40 24
model.layers.1.block_sparse_moe.experts.1.w2.weight_scale_inv F32 3 2
model.norm.weight BF16 40
lm_head.weight BF16 50 40
"""

NATIVE = """
model.embed_tokens.weight BF16 50 40
model.layers.0.input_layernorm.weight BF16 40
model.layers.0.self_attn.q_proj.weight F8_E4M3 24 40
model.layers.0.self_attn.q_proj.weight_scale_inv F32 2 3
model.layers.0.self_attn.k_proj.weight F8_E4M3 12 40
model.layers.0.self_attn.k_proj.weight_scale_inv F32 1 3
model.layers.0.self_attn.v_proj.weight F8_E4M3 12 40
model.layers.0.self_attn.v_proj.weight_scale_inv F32 1 3
model.layers.0.self_attn.o_proj.weight F8_E4M3 40 24
model.layers.0.self_attn.o_proj.weight_scale_inv F32 3 2
model.layers.0.self_attn.q_norm.weight BF16 24
model.layers.0.self_attn.k_norm.weight BF16 12
model.layers.0.post_attention_layernorm.weight BF16 40
model.layers.0.mlp.gate.weight F32 2 40
model.layers.0.mlp.gate.e_score_correction_bias F32 2
model.layers.0.mlp.experts.gate_and_up_projs F8_E4M3 2 40 48
model.layers.0.mlp.experts.gate_and_up_projs_scale_inv F32 2 3 4
model.layers.0.mlp.experts.down_projs F8_E4M3 2 24 40
model.layers.0.mlp.experts.down_projs_scale_inv F32 2 2 3
model.layers.1.input_layernorm.weight BF16 40
model.layers.1.self_attn.q_proj.weight F8_E4M3 24 40
model.layers.1.self_attn.q_proj.weight_scale_inv F32 2 3
model.layers.1.self_attn.k_proj.weight F8_E4M3 12 40
model.layers.1.self_attn.k_proj.weight_scale_inv F32 1 3
model.layers.1.self_attn.v_proj.weight F8_E4M3 12 40
model.layers.1.self_attn.v_proj.weight_scale_inv F32 1 3
model.layers.1.self_attn.o_proj.weight F8_E4M3 40 24
model.layers.1.self_attn.o_proj.weight_scale_inv F32 3 2
model.layers.1.self_attn.q_norm.weight BF16 24
model.layers.1.self_attn.k_norm.weight BF16 12
model.layers.1.post_attention_layernorm.weight BF16 40
model.layers.1.mlp.gate.weight F32 2 40
model.layers.1.mlp.gate.e_score_correction_bias F32 2
model.layers.1.mlp.experts.gate_and_up_projs F8_E4M3 2 40 48
model.layers.1.mlp.experts.gate_and_up_projs_scale_inv F32 2 3 4
model.layers.1.mlp.experts.down_projs F8_E4M3 2 24 40
model.layers.1.mlp.experts.down_projs_scale_inv F32 2 2 3
model.norm.weight BF16 40
lm_head.weight BF16 50 40
"""

WITHOUT_PREFIX = """
embed_tokens.weight
layers.0.block_sparse_moe.e_score_correction_bias
layers.1.block_sparse_moe.experts.1.w2.weight_scale_inv
norm.weight
lm_head.weight
"""


def golden(text):
    return [(key, tuple(map(int, sizes)), dtype) for key, dtype, *sizes in map(str.split, text.strip().splitlines())]


def in_bf16(tensors):
    """Golden tensors as a checkpoint without FP8 has them: no scales, BF16 where there were codes."""
    return [
        (key, shape, "BF16" if dtype == "F8_E4M3" else dtype)
        for key, shape, dtype in tensors
        if not key.endswith("_scale_inv")
    ]


# ---- by hand


def test_hugging_face_names_shapes_and_dtypes():
    assert list(specs(SMALL).hf()) == golden(HF)


def test_native_names_shapes_and_dtypes():
    assert list(specs(SMALL).native("F8_E4M3")) == golden(NATIVE)


def test_without_fp8():
    assert list(specs(SMALL).hf("BF16")) == in_bf16(golden(HF))
    assert list(specs(SMALL).native()) == in_bf16(golden(NATIVE))
    assert [spec.dtype for spec in specs(SMALL).native("F32") if "proj" in spec.key] == ["F32"] * 12


def test_names_without_the_prefix():
    bare = specs(SMALL, "")
    assert [spec.key for spec in bare.hf()] == [key.removeprefix("model.") for key, _, _ in golden(HF)]
    assert [spec.key for spec in bare.native("F8_E4M3")] == [key.removeprefix("model.") for key, _, _ in golden(NATIVE)]
    assert set(WITHOUT_PREFIX.split()) <= set(bare.places)


def test_a_tied_output_head_is_not_stored():
    tied = specs(SMALL.replace(tie_word_embeddings=True))
    assert list(tied.hf()) == golden(HF)[:-1]
    assert list(tied.native("F8_E4M3")) == golden(NATIVE)[:-1]


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
    assert sorted(specs(SMALL).places) == sorted(key for key, _, _ in golden(HF))


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
    tensors = list(specs(REAL).hf())
    assert len({spec.key for spec in tensors}) == len(tensors) == 96_103
    scales = [spec for spec in tensors if spec.key.endswith("_scale_inv")]
    rest = Counter(spec.dtype for spec in tensors if not spec.key.endswith("_scale_inv"))
    assert len(scales) == 47_864 and {spec.dtype for spec in scales} == {"F32"}
    assert rest == {"F8_E4M3": 47_864, "F32": 124, "BF16": 251}


def test_published_sizes():
    assert total_bytes(specs(REAL).hf()) == 230_121_630_720
    assert total_bytes(specs(REAL).hf("BF16")) == 457_477_079_040
    assert total_bytes(specs(REAL).native()) == 457_477_079_040
    assert total_bytes(specs(REAL).native("F8_E4M3")) == 230_121_630_720
    parameters = sum(int(np.prod(spec.shape, dtype=object)) for spec in specs(REAL).hf("BF16"))
    assert parameters == 228_689_764_864


def test_one_grouped_tensor_is_past_int32():
    gate_and_up = specs(REAL).by_native["model.layers.61.mlp.experts.gate_and_up_projs"]
    assert gate_and_up.shape == (256, 3072, 3072)
    assert np.prod(gate_and_up.shape, dtype=np.int64) == 2_415_919_104 > np.iinfo(np.int32).max


def test_abstract_trees_have_shapes_and_dtypes_without_arrays():
    tree = specs(REAL).abstract()
    assert len(tree) == 62 * 12 + 3
    assert tree["model.layers.61.mlp.experts.down_projs"] == jax.ShapeDtypeStruct((256, 1536, 3072), "bfloat16")
    assert tree["model.layers.0.mlp.gate.weight"] == jax.ShapeDtypeStruct((256, 3072), "float32")
    quantized = specs(REAL).abstract("F8_E4M3")["model.layers.0.mlp.experts.down_projs"]
    assert quantized == jax.ShapeDtypeStruct((256, 1536, 3072), "float8_e4m3fn")


def test_specs_are_computed_once_a_config():
    assert specs(SMALL) is specs(dataclasses.replace(SMALL))
    assert specs(SMALL) is not specs(SMALL, "")


# ---- the other libraries


@pytest.fixture(scope="module")
def saved_by_transformers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers")
    sizes = {name: value for name, value in SMALL.to_dict().items() if name != "quantization_config"}
    MiniMaxM2ForCausalLM(MiniMaxM2Config.from_dict(sizes)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def header_of(file):
    """The JSON header of a safetensors file: eight bytes of length, then the text."""
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {key: tuple(info["shape"]) for key, info in header.items() if key != "__metadata__"}


def test_transformers_writes_exactly_these_names_and_shapes(saved_by_transformers):
    config = mj.MiniMaxConfig.from_pretrained(saved_by_transformers)
    expected = {key: shape for key, shape, _ in in_bf16(golden(HF))}
    assert header_of(saved_by_transformers / "model.safetensors") == expected
    assert {spec.key: spec.shape for spec in specs(config).hf("BF16")} == expected


@pytest.fixture(scope="module")
def nemo_adapter():
    moe_config = SimpleNamespace(n_routed_experts=2, moe_inter_dim=24, expert_activation="swiglu", expert_bias=False)
    backend = SimpleNamespace(experts="torch", dispatcher="torch")
    return nemo.MiniMaxM2StateDictAdapter(SimpleNamespace(), moe_config, backend, dtype=torch.bfloat16)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_nemo_gives_the_same_native_names_and_shapes(nemo_adapter, prefix):
    tensors = {spec.key: torch.zeros(spec.shape, dtype=torch.bfloat16) for spec in specs(SMALL, prefix).hf("BF16")}
    native = nemo_adapter.from_hf(tensors)
    assert {key: tuple(tensor.shape) for key, tensor in native.items()} == {
        spec.key: spec.shape for spec in specs(SMALL, prefix).native()
    }


def test_nemo_renames_one_tensor_as_the_table_does(nemo_adapter):
    for entry in specs(REAL).entries:
        if not entry.row.grouped:
            ((key,),) = entry.keys
            assert nemo_adapter._hf_key_to_native(key) == entry.native
            assert nemo_adapter._native_key_to_hf(entry.native) == key


def test_patterns_are_nemos():
    assert list(mj.NON_QUANTIZED_KEY_PATTERNS) == nemo.NON_QUANTIZED_KEY_PATTERNS


ODD_KEYS = [
    "",
    ".weight",
    "weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.self_attn.q_proj.lora_A.weight",
    "model.layers.0.self_attn.q_proj.lora_B.default.weight",
    "base_model.model.model.layers.0.mlp.experts.3.gate_proj.lora_A.weight",
    "model.layers.0.mlp.experts.gate_and_up_projs",
    "model.layers.0.mlp.experts.3.gate_proj.weight",
    "model.layers.0.mlp.gate.weight",
    "model.layers.0.mlp.gate.weight.extra",
    "model.layers.0.self_attn.q_proj.weight_scale_inv",
    "model.layers.0.block_sparse_moe.gate_proj.weight",
    "model.layers.0.final_norm.weight",
    "model.layers.0.norm.weights.weight",
    "lora_up.weight",
    "language_model.model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.SELF_ATTN.q_proj.Weight",
]


def test_should_quantize_key_is_nemos_for_every_name_of_the_full_table():
    for prefix in ("model.", ""):
        keys = [*specs(REAL, prefix).places, *(spec.key for spec in specs(REAL, prefix).native("F8_E4M3"))]
        assert [key for key in keys if mj.should_quantize_key(key) != nemo.should_quantize_key(key)] == []


@pytest.mark.parametrize("key", ODD_KEYS)
def test_should_quantize_key_is_nemos_for_odd_names(key):
    assert mj.should_quantize_key(key) is nemo.should_quantize_key(key)


def test_the_table_quantises_what_the_rule_does():
    wrong = [
        key
        for key, place in specs(REAL).places.items()
        if not place.is_scale and place.entry.row.scaled != mj.should_quantize_key(key)
    ]
    assert wrong == []


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
