"""Further layouts: against trees put together by plain numpy, against transformers' own module, and back again."""

import folders
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from config_cases import PUBLISHED
from helpers import BF16, bits, differences
from layout_cases import CONFIG, FURTHER, HF, NATIVE, WANT
from torch_helpers import in_torch

import minimax_jax as mj
from minimax_jax.errors import LayoutError
from minimax_jax.layout.specs import specs


@pytest.mark.parametrize("layout", FURTHER)
def test_each_layout_is_what_plain_numpy_makes_and_comes_back(layout):
    got = mj.to_layout(NATIVE, CONFIG, layout=layout)
    assert differences(got, WANT[layout]) == []
    assert all(array.shape == WANT[layout][key].shape for key, array in got.items())
    assert differences(mj.from_layout(WANT[layout], CONFIG, layout=layout), NATIVE) == []


@pytest.mark.parametrize("layout", FURTHER)
def test_jitted_and_on_device_it_is_the_same_bits(layout):
    native = {key: jnp.asarray(array) for key, array in NATIVE.items()}
    got = jax.jit(lambda tree: mj.to_layout(tree, CONFIG, layout=layout))(native)
    assert differences(got, WANT[layout]) == []
    assert differences(mj.to_layout(native, CONFIG, layout=layout), WANT[layout]) == []
    assert differences(jax.jit(lambda tree: mj.from_layout(tree, CONFIG, layout=layout))(got), NATIVE) == []


@pytest.mark.parametrize("layout", FURTHER)
def test_every_bfloat16_keeps_its_bits(layout):
    every = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    native = {key: np.resize(every, array.shape).astype(BF16) for key, array in NATIVE.items()}
    for change in (lambda tree: tree, jax.jit(lambda tree: tree)):
        out = mj.to_layout(change(native), CONFIG, layout=layout)
        assert differences(mj.from_layout(change(out), CONFIG, layout=layout), native) == []
    jitted = jax.jit(lambda tree: mj.to_layout(tree, CONFIG, layout=layout))(native)
    assert differences(jitted, mj.to_layout(native, CONFIG, layout=layout)) == []


def test_fp8_weights_lie_in_transformers_layout_with_their_scales():
    native = mj.from_hf(HF, CONFIG, dtype=None)
    got = mj.to_layout(native, CONFIG, layout="transformers-v5")
    name = "model.layers.1.block_sparse_moe.experts.2."
    fused = {suffix: got[f"model.layers.1.mlp.experts.gate_up_proj{suffix}"][2] for suffix in ("", "_scale_inv")}
    for suffix, array in fused.items():
        pair = [HF[f"{name}{part}.weight{suffix}"] for part in ("w1", "w3")]
        assert np.array_equal(bits(array), bits(np.concatenate(pair)))
    back = mj.from_layout(got, CONFIG, layout="transformers-v5")
    assert differences(mj.to_hf(back, CONFIG, quantization=True), HF) == []


@pytest.mark.parametrize("layout", ["maxtext", "maxtext-unscanned"])
def test_maxtext_has_no_place_for_fp8(layout):
    with pytest.raises(LayoutError, match="no place for FP8 weights"):
        mj.to_layout(mj.from_hf(HF, CONFIG, dtype=None), CONFIG, layout=layout)


@pytest.mark.parametrize("layout", ["hf", "native", "megatron"])
def test_other_layouts_are_refused(layout):
    for function in (mj.to_layout, mj.from_layout):
        with pytest.raises(LayoutError, match="no such layout"):
            function(NATIVE, CONFIG, layout=layout)


@pytest.mark.parametrize("layout", FURTHER)
def test_what_is_wrong_with_a_tree_is_said(layout):
    tree = dict(WANT[layout])
    lost = next(key for key in tree if "norm" in key)
    turned = next(key for key in tree if "embed" in key)
    del tree[lost]
    tree[turned] = tree[turned].T
    tree["model.extra"] = np.zeros(3, np.float32)
    with pytest.raises(LayoutError) as caught:
        mj.from_layout(tree, CONFIG, layout=layout)
    said = {(problem.what.split(",")[0], problem.key) for problem in caught.value.problems}
    assert said == {("missing tensor", lost), ("wrong shape", turned), ("unexpected tensor", "model.extra")}


def test_a_stack_of_another_number_of_layers_is_refused_once():
    with pytest.raises(LayoutError) as caught:
        mj.from_layout(WANT["maxtext"], CONFIG.replace(num_hidden_layers=2), layout="maxtext")
    assert len(caught.value.problems) == 13
    assert all(problem.what == "wrong shape" for problem in caught.value.problems)


def test_a_partial_stack_is_refused():
    some = {key: array for key, array in NATIVE.items() if ".1." not in key}
    with pytest.raises(LayoutError, match="stack of layers with gaps"):
        mj.to_layout(some, CONFIG, layout="maxtext", partial=True)
    assert len(mj.to_layout(some, CONFIG, layout="maxtext-unscanned", partial=True)) == 3 + 2 * 13


def test_layers_of_several_dtypes_are_not_stacked():
    tree = dict(NATIVE)
    for name in ("input_layernorm.weight", "self_attn.q_proj.weight"):
        key = f"model.layers.1.{name}"
        tree[key] = tree[key].astype(np.float16)
    with pytest.raises(LayoutError) as caught:
        mj.to_layout(tree, CONFIG, layout="maxtext")
    assert {(problem.what.split(":")[0], problem.got) for problem in caught.value.problems} == {
        ("layers differ in dtype", "bfloat16 and float16")
    }
    assert len(caught.value.problems) == 2 and all("decoder.layers" in problem.key for problem in caught.value.problems)
    kept = mj.to_layout(tree, CONFIG, layout="maxtext-unscanned")
    assert differences(mj.from_layout(kept, CONFIG, layout="maxtext-unscanned"), tree) == []


def test_the_published_sizes_in_maxtext():
    abstract = specs(PUBLISHED).abstract()
    tree = jax.eval_shape(lambda native: mj.to_layout(native, PUBLISHED, layout="maxtext"), abstract)
    moe = mj.nest(tree)["params"]["params"]["decoder"]["layers"]["moe_block"]
    assert {name: moe[name].shape for name in ("wi_0", "wi_1", "wo")} == {
        "wi_0": (256, 62, 3072, 1536),
        "wi_1": (256, 62, 3072, 1536),
        "wo": (256, 62, 1536, 3072),
    }
    assert (moe["gate"]["kernel"].shape, moe["gate"]["kernel"].dtype) == ((3072, 62, 256), np.float32)
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == 228_689_764_864


def test_transformers_module_takes_it_strictly_and_computes_what_it_does_from_the_published_form(tmp_path):
    native = {key: array.astype(np.float32) for key, array in NATIVE.items()}
    settings = {name: value for name, value in CONFIG.to_dict().items() if name != "quantization_config"}
    torch.manual_seed(0)
    model = transformers.MiniMaxM2ForCausalLM(transformers.MiniMaxM2Config(**settings)).eval()
    model.load_state_dict(in_torch(mj.to_layout(native, CONFIG, layout="transformers-v5")), strict=True)
    folders.write(tmp_path / "hf", mj.to_hf(native, CONFIG), CONFIG.replace(weight_block_size=None))
    published = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    state, other = model.state_dict(), published.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, published(ids).logits)
