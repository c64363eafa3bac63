"""The adapter as NeMo's callers see it: the object, and the destinations it gives a loader."""

import copy
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from adapter_cases import SCALE, W1
from nemo_oracle import (
    MoESplitExpertsStateDictMixin,
    StateDictAdapter,
    checkpoint,
    differences,
    nemo_adapter,
    our_adapter,
)

from minimax_jax.errors import ConfigError, LayoutError
from torch_bridge import MiniMaxM2StateDictAdapter

# ---- destinations of a loader


def test_fp8_destinations_are_nemos(cfg, native):
    got = our_adapter(cfg).load_destinations(native, quantization=True)
    want = nemo_adapter(cfg).to_hf(dict(native), quantization=True, for_checkpoint_load=True)
    assert list(got) == list(want)
    for key, tensor in got.items():
        assert (tensor.dtype, tensor.shape) == (want[key].dtype, want[key].shape)
        if key.endswith(SCALE):
            assert (tensor == 1).all()
    for key, tensor in checkpoint(cfg).items():
        got[key].copy_(tensor)
    assert differences(our_adapter(cfg).from_hf(got), native) == []


def test_nemos_loader_gets_destinations(cfg, native):
    adapter = our_adapter(cfg)
    for quantization in (False, True):
        got = adapter.to_hf(native, quantization=quantization, for_checkpoint_load=True, device_mesh=None)
        assert list(got) == list(adapter.load_destinations(native, quantization=quantization))


def test_destinations_are_the_models_own_storage(cfg, native):
    model = {name: torch.zeros_like(tensor) for name, tensor in native.items()}
    destinations = our_adapter(cfg).load_destinations(model)
    for key, tensor in our_adapter(cfg).to_hf(native).items():
        destinations[key].copy_(tensor)
    assert differences(model, native) == []
    got = our_adapter(cfg).from_hf(destinations)
    assert got.keys() == model.keys() and all(got[name] is model[name] for name in model)
    assert destinations == {}


def test_a_destination_that_went_missing_is_an_error(cfg, native):
    destinations = our_adapter(cfg).load_destinations(native)
    del destinations[W1]
    with pytest.raises(LayoutError, match="missing tensor"):
        our_adapter(cfg).from_hf(destinations)


def test_destinations_that_were_replaced_are_converted(cfg, native):
    destinations = our_adapter(cfg).load_destinations({name: torch.zeros_like(t) for name, t in native.items()})
    destinations |= our_adapter(cfg).to_hf(native)
    assert differences(our_adapter(cfg).from_hf(destinations), native) == []


def test_the_meta_device_gives_names_and_shapes(cfg, native):
    meta = {name: tensor.to("meta") for name, tensor in native.items()}
    for quantization in (False, True):
        got = our_adapter(cfg).to_hf(meta, quantization=quantization)
        want = our_adapter(cfg).to_hf(native, quantization=quantization)
        assert {k: (t.shape, t.dtype) for k, t in got.items()} == {k: (t.shape, t.dtype) for k, t in want.items()}
        back = our_adapter(cfg).from_hf(got)
        assert {k: (t.shape, t.dtype) for k, t in back.items()} == {k: (t.shape, t.dtype) for k, t in native.items()}


# ---- the object


def test_instances_are_what_nemos_callers_ask_for(cfg):
    adapter = our_adapter(cfg)
    assert isinstance(adapter, StateDictAdapter)
    assert isinstance(adapter, MoESplitExpertsStateDictMixin)
    assert isinstance(adapter, MiniMaxM2StateDictAdapter)
    nemo = nemo_adapter(cfg)
    for name in dir(nemo):
        assert hasattr(adapter, name) or name in ("_last_expert_ids", "_inplace_loaded_native_keys")
    for name in (
        *("view_loaded_native_keys", "supports_low_memory_dcp_load", "_expert_path_segment", "_is_gated_moe"),
        *("checkpoint_key_aliases", "_hf_prefix", "_uses_model_prefix", "_v5_peft_target_parameters"),
    ):
        assert getattr(adapter, name) == getattr(nemo, name), name
    assert adapter.supports_write_through_checkpoint_load is False
    assert adapter.map_peft_target_module_to_hf("a.b") == "a.b"
    assert adapter.iter_checkpoint_load_parts({}) is None


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda adapter: pickle.loads(pickle.dumps(adapter))])
def test_instances_can_be_copied(cfg, native, duplicate):
    adapter = duplicate(our_adapter(cfg))
    assert isinstance(adapter, StateDictAdapter)
    assert differences(adapter.from_hf(checkpoint(cfg)), native) == []


def test_a_subclass_is_its_own_class(cfg):
    class Mine(MiniMaxM2StateDictAdapter):
        def _native_key_to_hf(self, key):
            return "mine"

    nemo = nemo_adapter(cfg)
    adapter = copy.copy(Mine(nemo.config, nemo.moe_config, nemo.backend))
    assert isinstance(adapter, Mine) and isinstance(adapter, StateDictAdapter)
    assert adapter._native_key_to_hf("a") == "mine"


@pytest.mark.parametrize(
    ("moe", "dtype", "key"),
    [
        ({"expert_bias": True}, torch.bfloat16, "expert_bias"),
        ({"expert_activation": "relu2"}, torch.bfloat16, "expert_activation"),
        ({}, torch.float64, None),
    ],
)
def test_what_minimax_does_not_have_is_refused(cfg, moe, dtype, key):
    nemo = nemo_adapter(cfg)
    moe_config = SimpleNamespace(**vars(nemo.moe_config) | moe)
    with pytest.raises(ConfigError) as caught:
        MiniMaxM2StateDictAdapter(nemo.config, moe_config, nemo.backend, dtype=dtype)
    assert caught.value.problems[0].key == key


def test_nemo_is_not_imported_nor_needed():
    script = """
import sys, torch, torch_bridge
from types import SimpleNamespace
moe = SimpleNamespace(n_routed_experts=2, moe_inter_dim=3)
adapter = torch_bridge.MiniMaxM2StateDictAdapter(SimpleNamespace(), moe, None)
experts = "layers.0.mlp.experts."
native = {experts + "gate_and_up_projs": torch.ones(2, 4, 6), experts + "down_projs": torch.ones(2, 3, 4)}
assert adapter.from_hf(adapter.to_hf(native)).keys() == native.keys()
assert type(adapter) is torch_bridge.MiniMaxM2StateDictAdapter
assert not any(name.startswith("nemo") or name.startswith("transformers") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
