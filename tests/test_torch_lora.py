"""LoRA of experts in torch, beside NeMo's own adapter."""

import pytest
import torch
from lora_cases import CFG, EXPERTS, HIDDEN, HUB, INTER, MLP, NEMO, PEFT, RANK, W1, keys_of
from nemo_oracle import differences, nemo_adapter, our_adapter
from rank_tensors import rank_of
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch_lora_cases import FORMS, LEGACY, MODERN, OTHERS, A, B, factors

from minimax_jax.errors import LayoutError


@pytest.fixture(scope="module")
def grouped():
    return nemo_adapter(CFG).from_hf(factors())


# ---- beside NeMo


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("prefix", ["", "model.", PEFT + "model."])
def test_from_hf_equals_nemo(dtype, prefix):
    tree = factors(dtype=dtype, prefix=prefix) | OTHERS
    want = nemo_adapter(CFG).from_hf(dict(tree))
    hub = factors(HUB, dtype=dtype, prefix=prefix) | OTHERS
    for given in (dict(tree), hub, *(nemo_adapter(CFG).to_hf(dict(want), **form) for form in FORMS)):
        got = our_adapter(CFG).from_hf(given)
        assert differences(got, want) == []
        assert given == {}
        assert all(got[key] is tensor for key, tensor in OTHERS.items())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_hf_equals_nemo(grouped, form, dtype):
    native = {key: tensor.to(dtype) for key, tensor in grouped.items()} | OTHERS
    got, want = our_adapter(CFG).to_hf(native, **form), nemo_adapter(CFG).to_hf(dict(native), **form)
    assert differences(got, want) == []
    assert list(got) == list(want)
    assert all(tensor.is_contiguous() for tensor in got.values())
    for name, tensor in native.items():
        pairs = our_adapter(CFG).convert_single_tensor_to_hf(name, tensor, **form)
        nemos = nemo_adapter(CFG).convert_single_tensor_to_hf(name, tensor, **form)
        assert [key for key, _ in pairs] == [key for key, _ in nemos]
        assert differences(dict(pairs), dict(nemos)) == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_more_than_ten_experts_keep_their_order(form, device):
    cfg = CFG.replace(num_local_experts=21, num_hidden_layers=1)
    tree = factors(cfg=cfg)
    native = nemo_adapter(cfg).from_hf(dict(tree))
    want = nemo_adapter(cfg).to_hf(dict(native), **form)
    got = our_adapter(cfg).to_hf({name: tensor.to(device) for name, tensor in native.items()}, **form)
    assert [(key, tensor.shape) for key, tensor in got.items()] == [(key, tensor.shape) for key, tensor in want.items()]
    if device == "cpu":
        assert differences(got, want) == []
        assert differences(our_adapter(cfg).from_hf(got), native) == []


@pytest.mark.parametrize("form", FORMS)
def test_quantization_and_exclusion_equal_nemo(grouped, form):
    how = {"exclude_key_regex": r".*(lora_B|layers\.1)", "quantization": True, **form}
    got, want = our_adapter(CFG).to_hf(grouped, **how), nemo_adapter(CFG).to_hf(dict(grouped), **how)
    assert differences(got, want) == []
    assert 0 < len(got) < len(our_adapter(CFG).to_hf(grouped, **form))


@pytest.mark.parametrize("form", FORMS)
def test_a_loader_fills_destinations(grouped, form):
    model = {name: torch.zeros_like(tensor) for name, tensor in grouped.items()}
    destinations = our_adapter(CFG).to_hf(model, for_checkpoint_load=True, **form)
    for key, tensor in our_adapter(CFG).to_hf(grouped, **form).items():
        destinations[key].copy_(tensor)
    assert differences(our_adapter(CFG).from_hf(destinations), grouped) == []


def test_names_equal_nemo(grouped):
    native = grouped | OTHERS
    assert our_adapter(CFG).get_hf_state_dict_keys(native) == nemo_adapter(CFG).get_hf_state_dict_keys(native)


@pytest.mark.parametrize("form", FORMS)
def test_factors_of_another_form_pass_as_they_are(form):
    tree = factors() | nemo_adapter(CFG).to_hf(nemo_adapter(CFG).from_hf(factors()))
    got = our_adapter(CFG).to_hf(tree, **form)
    assert got.keys() == tree.keys() and all(got[key] is tree[key] for key in tree)


# ---- memory


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_shares_no_memory(grouped, form, tmp_path):
    kept = {name: tensor.clone() for name, tensor in grouped.items()}
    hf = our_adapter(CFG).to_hf(grouped, **form)
    save_file(hf, tmp_path / "adapter_model.safetensors")  # refuses tensors that share memory
    assert differences(load_file(tmp_path / "adapter_model.safetensors"), hf) == []
    for tensor in hf.values():
        tensor.fill_(3)
    assert differences(grouped, kept) == []


@pytest.mark.parametrize("form", FORMS)
def test_the_meta_device_gives_names_and_shapes(grouped, form):
    adapter = our_adapter(CFG)

    def described(tensors):
        return {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}

    hf = adapter.to_hf({name: tensor.to("meta") for name, tensor in grouped.items()}, **form)
    assert all(tensor.is_meta for tensor in hf.values())
    assert described(hf) == described(adapter.to_hf(grouped, **form))
    assert described(adapter.from_hf(hf)) == described(grouped)


# ---- an A each for gate and up


def test_a_second_a_is_refused_by_name_and_nothing_is_taken():
    tree = factors(HUB)
    up = W1.replace(".w1.", ".w3.")
    tree[up] = tree[up] + 1
    before = dict(tree)
    with pytest.raises(LayoutError, match="A differs from that of the gate") as error:
        our_adapter(CFG).from_hf(tree)
    assert keys_of(error) == {up}
    assert tree.keys() == before.keys() and all(tree[key] is before[key] for key in tree)


@pytest.mark.parametrize(("names", "spelled"), [("hub", HUB), ("nemo", NEMO)])
def test_a_second_a_is_kept_at_twice_the_rank(names, spelled):
    tree, adapter = factors(spelled, shared=False), our_adapter(CFG)
    native = adapter.convert_from_hf(tree, concatenate_lora=True)
    assert native[PEFT + A].shape == (EXPERTS, HIDDEN, 2 * RANK)
    assert native[PEFT + B].shape == (EXPERTS, 2 * RANK, 2 * INTER)
    back = adapter.to_hf(native, v4_compatible=True, lora_names=names, concatenated_lora=True)
    assert differences(back, tree) == []


def test_published_names_are_written(grouped):
    got = our_adapter(CFG).to_hf(grouped, v4_compatible=True, lora_names="hub")
    assert differences(got, factors(HUB)) == []


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.pop(W1), "missing tensor"),
        (lambda tree: [tree.pop(key) for key in list(tree) if "w2.lora_A" in key], "missing tensor"),
        (lambda tree: tree.update({W1: tree[W1].T}), "wrong shape"),
        (lambda tree: tree.update({W1.replace("experts.1", "experts.9"): tree.pop(W1)}), "unexpected tensor"),
        (lambda tree: tree.update(factors(NEMO)), "given twice"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_taken(change, message):
    tree = factors(HUB)
    change(tree)
    before = dict(tree)
    with pytest.raises(LayoutError, match=message):
        our_adapter(CFG).from_hf(tree)
    assert tree.keys() == before.keys() and all(tree[key] is before[key] for key in tree)


def test_grouped_factors_that_do_not_fit_are_named_all_at_once(grouped):
    wrong = {PEFT + A: grouped[PEFT + A][:, :-1], PEFT + MLP + "lora_down_B": grouped[PEFT + MLP + "lora_down_B"].mT}
    for form in FORMS:
        with pytest.raises(LayoutError, match="wrong shape") as error:
            our_adapter(CFG).to_hf(grouped | wrong, **form)
        assert keys_of(error) >= wrong.keys()


# ---- the layout of PEFT's ParamWrapper


def published_shapes():
    """As in the published models: gate and up alone fit both layouts."""
    cfg = CFG.replace(hidden_size=2 * INTER)
    native = nemo_adapter(cfg).from_hf(factors(cfg=cfg))
    return cfg, {name: tensor for name, tensor in native.items() if "gate_and_up" in name}


@pytest.mark.parametrize("form", [MODERN, LEGACY])
def test_nemos_loader_says_which_layout(form):
    cfg, native = published_shapes()
    adapter = our_adapter(cfg)
    hf = nemo_adapter(cfg).to_hf(dict(native), **form)
    with pytest.raises(LayoutError, match="fit both layouts"):
        adapter.convert_from_hf(hf)
    legacy = "legacy_paramwrapper_layout" in form
    assert differences(adapter.convert_from_hf(hf, legacy_paramwrapper_layout=legacy), native) == []
    adapter._paramwrapper_layout_hint = "peft-0.18" if legacy else "peft-0.19.1"
    assert differences(adapter.convert_from_hf(hf), native) == []


def test_a_word_that_shapes_contradict_or_that_is_unknown_is_an_error(grouped):
    adapter = our_adapter(CFG)
    hf = adapter.to_hf(grouped)
    for hint, message in (("peft-0.18", "wrong shape"), ("peft-1.0", "unknown layout")):
        adapter._paramwrapper_layout_hint = hint
        with pytest.raises(LayoutError, match=message):
            adapter.convert_from_hf(hf)


# ---- on ranks


@pytest.mark.parametrize("dims", [{"ep": 2}, {"ep_shard": 1, "ep": 4}])
def test_each_rank_writes_the_lora_of_its_experts_as_in_nemo(dims):
    cfg = CFG.replace(num_local_experts=24)
    grouped = nemo_adapter(cfg).from_hf(factors(cfg=cfg))
    placements = tuple(Shard(0) if name == "ep" else Replicate() for name in dims)
    written = {}
    for rank in range(dims["ep"]):
        with rank_of(rank, **dims) as mesh:
            native = {
                name: DTensor.from_local(tensor.chunk(dims["ep"])[rank].clone(), mesh, placements)
                for name, tensor in grouped.items()
            }
            got = our_adapter(cfg).to_hf(native, v4_compatible=True)
            want = nemo_adapter(cfg).to_hf(dict(native), v4_compatible=True)
            assert list(got) == list(want) and differences(got, want) == []
            written |= got
    assert differences(written, our_adapter(cfg).to_hf(grouped, v4_compatible=True)) == []


def test_a_rank_without_experts_writes_nothing(grouped):
    with rank_of(2, ep=3) as mesh:  # two experts each: none are left
        whole = grouped[PEFT + A]
        native = DTensor.from_local(whole[:0], mesh, (Shard(0),), shape=whole.shape, stride=whole.stride())
        assert our_adapter(CFG).to_hf({PEFT + A: native}, v4_compatible=True) == {}
