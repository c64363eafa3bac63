"""`inspect`: kinds by the names of the layout, the tree, and the numbers of one tensor held against numpy."""

import json
import shutil
from pathlib import Path

import folders
import numpy as np
import pytest
import torch
from command_line import run, run_json
from folders import SUFFIX
from helpers import BF16, F32, FP8, dequantize
from servers import serving

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import LayoutError
from minimax_jax.jobs.source import open_source
from minimax_jax.jobs.tensor import describe
from minimax_jax.jobs.tree import tree_of

CONFIG = synthetic.config(layers=3, experts=3)
MOE, MLP = "model.layers.1.block_sparse_moe.", "model.layers.1.mlp."
W2, DOWN, GATE_UP = MOE + "experts.2.w2.weight", MLP + "experts.down_projs", MLP + "experts.gate_and_up_projs"
EMBED, Q_PROJ, BIAS = "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "e_score_correction_bias"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    synthetic.synthesize(root / "hf", CONFIG, shard_bytes=200_000)
    mj.convert(root / "hf", root / "fp8", dtype="fp8")
    mj.convert(root / "hf", root / "bf16")
    return root


# --- kinds -----------------------------------------------------------------------------------------------------------


def test_kinds_have_the_names_of_the_layout(made):
    for name in ("hf", "bf16"):
        kinds = mj.inspect(made / name).by_kind
        keys = folders.stored(made / name)
        for template, tally in kinds.items():
            names = {template.format(layer=n, expert=e) for n in range(3) for e in range(3)}
            own = [key for key in keys if key.removesuffix(SUFFIX) in names]
            assert own and tally.tensors == len(own)
        assert sum(tally.tensors for tally in kinds.values()) == len(keys)


def test_one_layer_is_one_layer(made, tmp_path):
    synthetic.synthesize(tmp_path / "one", synthetic.config(layers=1))
    assert "\n1 layer, " in run("inspect", tmp_path / "one")[0] and "\n3 layers, " in run("inspect", made / "hf")[0]


def test_the_config_is_that_of_what_is_stored(made):
    for name, fp8 in [("hf", True), ("fp8", True), ("bf16", False)]:
        told = run_json("inspect", made / name)[0]
        assert ("quantization_config" in told["config"]) == fp8 == ("F8_E4M3" in told["by_dtype"])
    assert told["source_scales"]["tensors"] and told["config"] == json.loads((made / "bf16/config.json").read_bytes())


# --- the tree --------------------------------------------------------------------------------------------------------


def names(nodes, above=()):
    """Every tensor that a tree stands for, by name."""
    for node in nodes:
        first, _, last = node.name.partition("-")
        steps = range(int(first), int(last) + 1) if last else [node.name]
        assert len(steps) == node.alike
        for step in steps:
            path = (*above, str(step))
            if node.children:
                yield from names(node.children, path)
            else:
                yield ".".join(path), node.dtype, list(node.shape)


@pytest.mark.parametrize("name", ["hf", "fp8", "bf16"])
def test_the_tree_stands_for_every_tensor(made, name):
    tree = tree_of(open_source(made / name).checkpoint.tensors)
    stored = folders.stored(made / name)
    assert {(key, dtype, tuple(shape)) for key, dtype, shape in names(tree)} == {
        (key, dtype, tuple(shape)) for key, (dtype, shape, _) in stored.items()
    }
    assert sum(node.nbytes for node in tree) == sum(len(data) for _, _, data in stored.values())


def test_equal_layers_are_folded_and_others_are_not(made, tmp_path):
    stdout, _ = run("inspect", made / "hf", "--tree")
    assert "layers 0-2 (3 alike)" in stdout and "experts 0-2 (3 alike)" in stdout
    assert "norm.weight  BF16 [256], 512 B" in stdout and "\x1b" not in stdout
    arrays = folders.arrays(made / "bf16")
    for key in arrays:
        if key.startswith("model.layers.1.mlp.experts"):
            arrays[key] = arrays[key].astype(F32)
    folders.write(tmp_path / "mixed", arrays, mj.MiniMaxConfig.from_pretrained(made / "bf16"))
    stdout, _ = run("inspect", tmp_path / "mixed", "--tree")
    assert [f"layers {n}  " in stdout for n in range(3)] == [True] * 3 and "alike" not in stdout
    told, _ = run_json("inspect", made / "hf", "--tree")
    layers = told["tree"][0]["children"][1]
    assert (layers["name"], layers["children"][0]["name"], layers["children"][0]["alike"]) == ("layers", "0-2", 3)


# --- one tensor ------------------------------------------------------------------------------------------------------


def oracle(values, scales=None):
    """The figures of one matrix or vector, by numpy in float64; blocks one by one."""
    floats = values.astype(F32) if scales is None else dequantize(values, scales, F32)
    finite = floats[np.isfinite(floats)].astype(np.float64)
    blocks = []
    if floats.ndim == 2:
        cut = [
            floats[i : i + 128, j : j + 128] for i in range(0, len(floats), 128) for j in range(0, floats.shape[1], 128)
        ]
        blocks = [np.nanmax(np.abs(block)) for block in cut]
    codes = values.astype(F32)
    return {
        "elements": floats.size,
        "min": float(np.nanmin(floats)),
        "max": float(np.nanmax(floats)),
        "mean": pytest.approx(finite.mean(), rel=1e-9, abs=1e-12),
        "finite": finite.size,
        "zeros": int((codes == 0).sum()),
        "nans": int(np.isnan(codes).sum()),
        "saturated": int((np.abs(codes) == 448).sum()) if values.dtype == FP8 else None,
        "block_amax": {"blocks": len(blocks), "min": min(blocks), "median": np.median(blocks), "max": max(blocks)}
        if blocks
        else None,
        "scale_inv": None if scales is None else [float(scales.min()), float(scales.max())],
    }


def merged(parts):
    """The figures of several matrices of one size together."""
    whole = {name: sum(part[name] for part in parts) for name in ("elements", "finite", "zeros", "nans")}
    return whole | {"min": min(part["min"] for part in parts), "max": max(part["max"] for part in parts)}


@pytest.mark.parametrize("name", [EMBED, Q_PROJ, W2, MOE + BIAS, MOE + "gate.weight", Q_PROJ + SUFFIX, W2 + SUFFIX])
def test_the_figures_of_a_published_name(made, name):
    told, stderr = run_json("inspect", made / "hf", "--tensor", name)
    arrays = folders.arrays(made / "hf")
    weight = arrays[name]
    expected = oracle(weight.ravel() if name.endswith(SUFFIX) else weight, arrays.get(name + SUFFIX))
    assert told["statistics"] == expected and stderr == "" and told["experts"] == []
    assert (told["shape"], told["dtype"]) == (list(weight.shape), folders.stored(made / "hf")[name][0])
    for stored in told["stored"]:
        with Path(stored["file"]).open("rb") as stream:
            stream.seek(stored["start"])
            assert stream.read(stored["stop"] - stored["start"]) == arrays[stored["key"]].tobytes()
    assert [stored["key"] for stored in told["stored"]] == [key for key in (name, name + SUFFIX) if key in arrays]


@pytest.mark.parametrize("layout", ["hf", "fp8"])
@pytest.mark.parametrize(("name", "parts"), [(DOWN, ("w2",)), (GATE_UP, ("w1", "w3"))])
def test_the_figures_of_a_native_name_expert_by_expert_in_either_layout(made, layout, name, parts):
    told, _ = run_json("inspect", made / layout, "--tensor", name)
    arrays = folders.arrays(made / "hf")
    keys = [[f"{MOE}experts.{expert}.{part}.weight" for part in parts] for expert in range(3)]
    experts = [merged([oracle(arrays[key], arrays[key + SUFFIX]) for key in own]) for own in keys]
    for seen, expected in zip([*told["experts"], told["statistics"]], [*experts, merged(experts)], strict=True):
        assert {figure: seen[figure] for figure in expected} == expected
    assert told["shape"] == list(folders.arrays(made / "fp8")[name].shape)
    held = {key for own in keys for key in own} if layout == "hf" else {name}
    assert {stored["key"].removesuffix(SUFFIX) for stored in told["stored"]} == held
    assert f"\n {2}  " in run("inspect", made / layout, "--tensor", name)[0]


def test_a_published_name_in_a_native_checkpoint(made):
    figures = {layout: run_json("inspect", made / layout, "--tensor", W2)[0] for layout in ("hf", "fp8", "bf16")}
    assert figures["fp8"]["statistics"] == figures["hf"]["statistics"]
    arrays = folders.arrays(made / "hf")
    exact = dequantize(arrays[W2], arrays[W2 + SUFFIX], BF16)
    assert figures["bf16"]["statistics"] == oracle(exact) and figures["bf16"]["shape"] == [256, 72]
    assert [stored["key"] for stored in figures["bf16"]["stored"]] == [DOWN]


def test_scales_beside_a_float_checkpoint(made):
    told, _ = run_json("inspect", made / "bf16", "--tensor", DOWN + SUFFIX)
    again, _ = run_json("inspect", made / "fp8", "--tensor", DOWN + SUFFIX)
    assert told["statistics"] == again["statistics"] and told["experts"] == again["experts"] != []
    assert told["stored"][0]["file"].endswith("source_scales.safetensors")


def test_nan_infinity_zero_and_saturated_codes_are_counted(made, tmp_path):
    folder = shutil.copytree(made / "hf", tmp_path / "hf")

    def poison(codes):
        bits = codes.view(torch.uint8)
        bits[0, :7] = torch.tensor([0x7F, 0xFF, 0x7E, 0xFE, 0x7E, 0x00, 0x80], dtype=torch.uint8)
        return codes

    def spoil(weight):
        weight[:3] = torch.tensor([float("nan"), float("inf"), -0.0])
        return weight

    folders.edit(folder, Q_PROJ, poison)
    folders.edit(folder, "model.norm.weight", spoil)
    arrays = folders.arrays(folder)
    told, _ = run_json("inspect", folder, "--tensor", Q_PROJ)
    assert told["statistics"] == oracle(arrays[Q_PROJ], arrays[Q_PROJ + SUFFIX])
    assert told["statistics"]["nans"] == 2 and told["statistics"]["saturated"] >= 3
    told, _ = run_json("inspect", folder, "--tensor", "model.norm.weight")
    assert told["statistics"] == oracle(arrays["model.norm.weight"]) | {"max": None}


def test_pieces_give_what_the_whole_gives(made, monkeypatch):
    def figures():
        return [run_json("inspect", made / "hf", "--tensor", name)[0] for name in (EMBED, DOWN)]

    whole = figures()
    monkeypatch.setattr("minimax_jax.jobs.look._PIECE_BYTES", 40_000)
    for before, after in zip(whole, figures(), strict=True):
        before["statistics"]["mean"] = pytest.approx(before["statistics"]["mean"])
        assert after == before


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        (W2.replace("w2", "w4"), W2),
        ("layers.1.self_attn.q_proj.weigth", Q_PROJ),
        ("q_proj", "model.layers.0.self_attn.q_proj.weight"),
        ("model.layers.1.mlp.experts.down_proj", DOWN),
        ("model.layers.9.mlp.experts.down_projs", "model.layers.0.mlp.experts.down_projs"),
        ("embed_tokens", EMBED),
    ],
)
def test_a_typo_is_answered_with_what_may_be_meant(made, asked, meant):
    told, stderr = run_json("inspect", made / "hf", "--tensor", asked, code=3)
    (problem,) = told["problems"]
    assert problem["key"] == asked and meant in problem["remedy"] and meant in stderr


def test_names_that_mean_nothing_and_scales_that_are_not_there(made):
    assert "--tree" in run("inspect", made / "hf", "--tensor", "zzz", code=3)[1]
    with pytest.raises(LayoutError, match="no block scales"):
        describe(open_source(made / "bf16"), W2 + SUFFIX)
    with pytest.raises(LayoutError, match="no block scales"):
        describe(open_source(made / "hf"), EMBED + SUFFIX)
    assert "give one" in run("inspect", made / "hf", "--tree", "--tensor", EMBED, code=2)[1]


def test_over_http_the_same_is_told(made):
    with serving(made) as server:
        url = f"{server.url}/hf"
        for option in (["--tree"], ["--tensor", DOWN]):
            far, near = (run_json("inspect", place, *option)[0] for place in (url, made / "hf"))
            assert (far.get("tree"), far.get("statistics")) == (near.get("tree"), near.get("statistics"))
            assert far["path"] == url
