"""The table against transformers and NeMo AutoModel."""

import folders
import pytest
import torch
from config_cases import PUBLISHED
from nemo_oracle import nemo_adapter, nemo_module
from table_cases import HF, SMALL, in_bf16
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

import minimax_jax as mj
from minimax_jax.layout.specs import specs

nemo = nemo_module("state_dict_adapter")


@pytest.fixture(scope="module")
def saved_by_transformers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers")
    sizes = {name: value for name, value in SMALL.to_dict().items() if name != "quantization_config"}
    MiniMaxM2ForCausalLM(MiniMaxM2Config.from_dict(sizes)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_transformers_writes_exactly_these_names_and_shapes(saved_by_transformers):
    config = mj.MiniMaxConfig.from_pretrained(saved_by_transformers)
    expected = {key: shape for key, shape, _ in in_bf16(HF)}
    saved = folders.stored(saved_by_transformers)
    assert {key: tuple(shape) for key, (_, shape, _) in saved.items()} == expected
    assert {spec.key: spec.shape for spec in specs(config).hf("BF16")} == expected


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_nemo_gives_the_same_native_names_and_shapes(prefix):
    tensors = {spec.key: torch.zeros(spec.shape, dtype=torch.bfloat16) for spec in specs(SMALL, prefix).hf("BF16")}
    native = nemo_adapter(SMALL).from_hf(tensors)
    assert {key: tuple(tensor.shape) for key, tensor in native.items()} == {
        spec.key: spec.shape for spec in specs(SMALL, prefix).native()
    }


def test_nemo_renames_one_tensor_as_the_table_does():
    adapter = nemo_adapter(SMALL)
    for entry in specs(PUBLISHED).entries:
        if not entry.row.grouped:
            ((key,),) = entry.keys
            assert adapter._hf_key_to_native(key) == entry.native
            assert adapter._native_key_to_hf(entry.native) == key


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
        keys = [*specs(PUBLISHED, prefix).places, *(spec.key for spec in specs(PUBLISHED, prefix).native("F8_E4M3"))]
        assert [key for key in keys if mj.should_quantize_key(key) != nemo.should_quantize_key(key)] == []


@pytest.mark.parametrize("key", ODD_KEYS)
def test_should_quantize_key_is_nemos_for_odd_names(key):
    assert mj.should_quantize_key(key) is nemo.should_quantize_key(key)


def test_the_table_quantises_what_the_rule_does():
    wrong = [
        key
        for key, place in specs(PUBLISHED).places.items()
        if not place.is_scale and place.entry.row.scaled != mj.should_quantize_key(key)
    ]
    assert wrong == []
