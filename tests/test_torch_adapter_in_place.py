"""The adapter takes tensors out of its input one by one, once all of them are known to be right."""

import weakref

import pytest
import torch
from adapter_cases import DOWN, LAYER, MOE, SCALE, W1, Q
from helpers import config
from nemo_oracle import checkpoint, differences, our_adapter

import torch_bridge.experts
from minimax_jax.errors import LayoutError


def test_the_pure_form_leaves_its_input_alone(cfg, native):
    hf = checkpoint(cfg)
    before = dict(hf)
    copies = {key: tensor.clone() for key, tensor in hf.items()}
    assert differences(our_adapter(cfg).convert_from_hf(hf), native) == []
    assert hf.keys() == before.keys() and all(hf[key] is before[key] for key in hf)
    assert differences(hf, copies) == []


def test_matrices_are_let_go_of_one_by_one(monkeypatch):
    cfg = config(hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_local_experts=32)
    hf = checkpoint(cfg)
    alive = [weakref.ref(tensor) for key, tensor in hf.items() if ".experts." in key]
    counts, fill = [], torch_bridge.experts._fill

    def counted(filling, block):
        nbytes = fill(filling, block)
        del filling
        counts.append(sum(reference() is not None for reference in alive))
        return nbytes

    monkeypatch.setattr(torch_bridge.experts, "_fill", counted)
    our_adapter(cfg).from_hf(hf)
    experts, at_work = cfg.num_local_experts, torch_bridge.experts._WORKERS
    assert len(alive) == 6 * experts and len(counts) == 2 * experts  # gate and up of each, then down
    left = [4 * max(experts - done, 0) + 2 * min(2 * experts - done, experts) for done in range(1, 2 * experts + 1)]
    assert all(count <= bound + 4 * at_work for count, bound in zip(counts, left, strict=True))
    assert not any(reference() for reference in alive)


def damaged(cfg, change):
    hf = checkpoint(cfg)
    change(hf)
    return hf


HALFWAY = LAYER + "mlp.experts.1.gate_proj.weight"


def rename(old, new):
    return lambda hf: hf.update({new: hf.pop(old), new + SCALE: hf.pop(old + SCALE)})


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        (lambda hf: hf.pop(W1 + SCALE), W1, "without its scales"),
        (lambda hf: hf.pop(W1), W1, "missing tensor"),
        (lambda hf: (hf.pop(W1), hf.pop(W1 + SCALE)), W1, "missing tensor"),
        (lambda hf: hf.pop(Q + SCALE), Q, "without its scales"),
        (lambda hf: hf.pop(Q), Q + SCALE, "scales without"),
        (lambda hf: hf.update({"a.weight" + SCALE: torch.ones(1, 1)}), "a.weight" + SCALE, "scales without"),
        (lambda hf: hf.update({"a.weight": hf[Q]}), "a.weight", "without its scales"),
        (lambda hf: hf.update({Q: hf[Q].float()}), Q + SCALE, "scales without"),
        (lambda hf: hf.update({Q: hf[Q][None]}), Q, "not a matrix"),
        (lambda hf: hf.update({Q + SCALE: torch.ones(1, 1)}), Q + SCALE, "wrong grid"),
        (lambda hf: hf.update({Q + SCALE: hf[Q + SCALE].double()}), Q + SCALE, "wrong dtype"),
        (lambda hf: hf.update({W1: hf[W1].T}), W1, "transposed"),
        (lambda hf: hf.update({W1: hf[W1].bfloat16()}), W1, "differ in dtype"),
        (lambda hf: hf.update({W1: "a word"}), W1, "missing tensor"),
        (rename(W1, MOE + "experts.1.w4.weight"), MOE + "experts.1.w4.weight", "not the name"),
        (rename(W1, MOE + "experts.3.w1.weight"), MOE + "experts.3.w1.weight", "not the name"),
        (
            rename(W1, LAYER + "mlp.experts.1.gate_proj.weight"),
            LAYER + "mlp.experts.1.gate_proj.weight",
            "not the name",
        ),
        (lambda hf: [hf.pop(key) for key in list(hf) if MOE in key and ".w2." in key], DOWN, "missing experts"),
        (lambda hf: hf.update({LAYER + "mlp.gate.weight": torch.ones(1)}), LAYER + "mlp.gate.weight", "two tensors"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_taken(cfg, change, key, message):
    hf = damaged(cfg, change)
    before = dict(hf)
    with pytest.raises(LayoutError, match=message) as caught:
        our_adapter(cfg).from_hf(hf)
    assert key in [problem.key for problem in caught.value.problems]
    assert hf.keys() == before.keys() and all(hf[name] is before[name] for name in hf)


def test_everything_wrong_is_told_at_once(cfg):
    hf = checkpoint(cfg)
    for key in (W1, Q, MOE.replace("0", "1") + "experts.0.w2.weight" + SCALE):
        del hf[key]
    with pytest.raises(LayoutError) as caught:
        our_adapter(cfg).from_hf(hf)
    assert len({problem.key.split(".weight")[0] for problem in caught.value.problems}) == 3
