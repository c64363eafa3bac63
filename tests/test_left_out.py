"""Tensors that are not the model's: MTP modules that the config announces, and what is named, are left out and said."""

import hashlib
import json
import warnings

import folders
import pytest
import torch
from command_line import run, run_json
from raw_safetensors import library_reads
from safetensors.torch import load_file, save_file

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import LayoutError

CONFIG = synthetic.config(layers=2, experts=3)
MTP = ["model.mtp_layers.0.eh_proj.weight", "model.mtp_layers.0.self_attn.q_proj.weight"]
VISION = ["vision.patch.weight", "vision.norm.weight"]
PAST = ["model.layers.2.enorm.weight", "model.layers.2.self_attn.q_proj.weight", "model.layers.3.eh_proj.weight"]


def made(folder, names, **announced):
    """A checkpoint with some further tensors, 24 bytes each, in a file of their own."""
    synthetic.synthesize(folder, CONFIG, shard_bytes=300_000)
    if names:
        save_file({name: torch.ones(2, 3) for name in names}, folder / "more.safetensors")
        index = folder / "model.safetensors.index.json"
        weight_map = json.loads(index.read_bytes())["weight_map"]
        folders.edit_json(index, weight_map=weight_map | dict.fromkeys(names, "more.safetensors"))
    folders.edit_json(folder / "config.json", **announced)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return made(tmp_path_factory.mktemp("plain") / "hf", [])


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    return made(tmp_path_factory.mktemp("mtp") / "hf", MTP + PAST, use_mtp=True, num_mtp_modules=3)


def names_of(left_out):
    return {part.prefix: sorted(part.keys) for part in left_out}


def told_in(said):
    return {part["prefix"]: (part["announced_by_config"], part["bytes"], sorted(part["tensors"])) for part in said}


ANNOUNCED = {
    "model.mtp_layers.": (True, 48, MTP),
    "model.layers.2.": (True, 48, PAST[:2]),
    "model.layers.3.": (True, 24, PAST[2:]),
}


def test_every_report_says_what_was_left_out(modules, tmp_path):
    assert told_in(run_json("inspect", modules)[0]["left_out"]) == ANNOUNCED
    assert told_in(run_json("plan", modules)[0]["left_out"]) == ANNOUNCED
    assert told_in(run_json("convert", modules, tmp_path / "native")[0]["left_out"]) == ANNOUNCED
    (verified,) = run_json("verify", modules)[0]["checkpoints"]
    assert told_in(verified["left_out"]) == ANNOUNCED
    for command in (
        ["inspect", modules],
        ["plan", modules],
        ["convert", modules, tmp_path / "hf"],
        ["verify", modules],
    ):
        shown = run(*command)[0]
        assert all(name in shown for name in (MTP[0], PAST[2], "48 bytes", "config.json announces")), command


@pytest.mark.parametrize("to", ["native", "orbax", "dcp"])
def test_the_model_itself_is_converted_as_without_them(modules, plain, tmp_path, to):
    if to == "orbax":
        pytest.importorskip("orbax.checkpoint")
    report = mj.convert(modules, tmp_path / "with", to=to, dtype="fp8")
    assert names_of(report.left_out) == {prefix: names for prefix, (_, _, names) in ANNOUNCED.items()}
    assert mj.convert(plain, tmp_path / "without", to=to, dtype="fp8").left_out == ()
    if to == "native":
        assert folders.stored(tmp_path / "with") == folders.stored(tmp_path / "without")
        assert mj.verify(tmp_path / "with", plain, by="bytes").good


@pytest.mark.parametrize(
    "announced", [{}, {"use_mtp": False, "num_mtp_modules": 3}, {"num_mtp_modules": 0}, {"num_mtp_modules": True}]
)
@pytest.mark.parametrize("names", [MTP, PAST])
def test_modules_that_nobody_announces_are_refused(tmp_path, names, announced):
    folder = made(tmp_path / "hf", names, **announced)
    with pytest.raises(LayoutError) as caught:
        mj.inspect(folder)
    assert all("--leave-out" in problem.remedy for problem in caught.value.problems)


def test_another_family_s_count_announces_them_too(tmp_path):
    folder = made(tmp_path / "hf", PAST[:2], num_nextn_predict_layers=1)
    assert names_of(mj.inspect(folder).left_out) == {"model.layers.2.": PAST[:2]}


def test_more_modules_than_announced_are_refused(tmp_path):
    folder = made(tmp_path / "hf", PAST, num_mtp_modules=1)
    with pytest.raises(LayoutError, match="num_hidden_layers") as caught:
        mj.inspect(folder)
    assert caught.value.problems[0].key == PAST[2]


def test_a_layer_like_the_model_s_own_is_no_module(tmp_path):
    synthetic.synthesize(tmp_path / "hf", synthetic.config(layers=3, experts=3))
    folders.edit_json(
        tmp_path / "hf" / "config.json", num_hidden_layers=2, attn_type_list=[1, 1], use_mtp=True, num_mtp_modules=3
    )
    with pytest.raises(LayoutError, match="num_hidden_layers"):
        mj.inspect(tmp_path / "hf")
    seen = mj.inspect(tmp_path / "hf", leave_out=["model.layers.2"])
    assert [part.announced for part in seen.left_out] == [False] and seen.config.num_hidden_layers == 2


def test_what_is_named_is_left_out_and_nothing_else(plain, tmp_path):
    folder = made(tmp_path / "hf", VISION)
    for leave_out in ((), ["visio"], ["vision.patch"]):
        with pytest.raises(LayoutError, match="unexpected tensor"):
            mj.plan(folder, leave_out=leave_out)
    for leave_out in (["vision"], ["vision."], ["vision.patch", "vision.norm.weight"]):
        seen = mj.inspect(folder, leave_out=leave_out)
        assert sorted(key for part in seen.left_out for key in part.keys) == sorted(VISION)
        assert not any(part.announced for part in seen.left_out)
        assert (seen.total, seen.by_kind) == (mj.inspect(plain).total, mj.inspect(plain).by_kind)
    assert mj.verify(folder, plain, by="bytes", leave_out=["vision"]).good
    run("convert", folder, tmp_path / "native", "--leave-out", "vision", "--dtype", "fp8")
    assert mj.verify(tmp_path / "native", plain, by="bytes").good


@pytest.mark.parametrize("name", ["model.layers.1", "lm_head", "model", "", ".", "model.layers.0.mlp.gate.weight"])
def test_a_tensor_of_the_model_cannot_be_left_out(plain, name):
    with pytest.raises(LayoutError, match="belongs to the model"):
        mj.inspect(plain, leave_out=[name])


def test_an_unfinished_job_knows_what_it_leaves_out(tmp_path, monkeypatch):
    folder = made(tmp_path / "hf", [*MTP, *VISION], num_mtp_modules=1)
    with monkeypatch.context() as patch:
        patch.setattr("minimax_jax.jobs.run._finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            mj.convert(folder, tmp_path / "out", leave_out=["vision"])
    folders.edit_json(folder / "config.json", num_mtp_modules=None)
    with pytest.raises(mj.JobError, match="config of the source differs") as caught:
        mj.convert(folder, tmp_path / "out", leave_out=["vision", "model.mtp_layers"])
    assert not any("left out" in problem.what for problem in caught.value.problems)  # the same names, on another's word
    folders.edit_json(folder / "config.json", num_mtp_modules=1)
    assert names_of(mj.convert(folder, tmp_path / "out", leave_out=["vision"]).left_out).keys() == {
        "vision.",
        "model.mtp_layers.",
    }


def test_a_certificate_covers_their_bytes_too(modules, tmp_path):
    mj.verify(modules, output=tmp_path / "certificate.json")
    file = modules / "more.safetensors"
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    (told,) = json.loads((tmp_path / "certificate.json").read_bytes())["checkpoints"]
    assert told["files"][file.name]["sha256"] == hashlib.sha256(good[:header]).hexdigest()
    stored = {name: fact["sha256"] for name, fact in told["left_out_tensors"].items()}
    assert stored == {key: hashlib.sha256(data).hexdigest() for key, (_, _, data) in library_reads(good).items()}
    try:
        for place in (20, header, (header + len(good)) // 2, len(good) - 1):
            file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            try:
                held = mj.verify(modules, certificate=tmp_path / "certificate.json").held
            except mj.CheckpointError:
                assert place == 20
            else:
                ((name, what),) = [(each.name, each.what) for each in held.mismatches]
                assert name in stored and what == "sha256"
    finally:
        file.write_bytes(good)
    assert mj.verify(modules, certificate=tmp_path / "certificate.json").good


def test_a_bit_of_theirs_in_a_file_of_the_model_s_is_found(tmp_path):
    folder, names = tmp_path / "hf", ["a.first", "model.vision", "vision.last"]
    synthetic.synthesize(folder, CONFIG)
    (file,) = folder.glob("*.safetensors")
    save_file(load_file(file) | {name: torch.ones(5) for name in names}, file)
    mj.verify(folder, leave_out=names, output=tmp_path / "c.json")
    assert mj.verify(folder, leave_out=names, certificate=tmp_path / "c.json").good
    for name in names:
        folders.flip_bit(folder, name, 9)
        held = mj.verify(folder, leave_out=names, certificate=tmp_path / "c.json").held
        folders.flip_bit(folder, name, 9)
        assert [(each.name, each.what) for each in held.mismatches] == [(name, "sha256")]


@pytest.mark.parametrize("name", ["visio", "vision.patches", "model.mtp"])
def test_a_name_that_nothing_begins_with_is_refused(plain, tmp_path, name):
    folder = made(tmp_path / "hf", [*MTP, *VISION], num_mtp_modules=1)
    calls = [
        lambda: mj.inspect(folder, leave_out=["vision", name]),
        lambda: mj.plan(folder, leave_out=["vision", name]),
        lambda: mj.convert(folder, tmp_path / "out", leave_out=["vision", name]),
        lambda: mj.verify(folder, plain, leave_out=["vision", name]),
        lambda: mj.diff(plain, folder, leave_out=["vision", name]),
        lambda: mj.load(folder, leave_out=["vision", name]),
    ]
    for call in calls:
        with pytest.raises(LayoutError, match="nothing is there to be left out") as caught:
            call()
        assert [problem.key for problem in caught.value.problems] == [name]
    assert not (tmp_path / "out").exists()
    assert "error: nothing is there to be left out" in run("plan", plain, "--leave-out", name, code=3)[1]


def test_of_two_checkpoints_one_may_have_what_is_left_out(plain, tmp_path):
    folder = made(tmp_path / "hf", VISION)
    assert mj.verify(folder, plain, by="bytes", leave_out=["vision"]).good
    assert mj.diff(plain, folder, leave_out=["vision"]).same


def test_calls_without_a_report_warn(modules, plain):
    for call in (mj.read_tree, mj.load):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            tree = call(modules)
        assert sorted("left out, MTP modules" in str(warning.message) for warning in said) == [True] * len(ANNOUNCED)
        assert {warning.filename for warning in said} == {__file__}
        assert tree.keys() == call(plain).keys()
        call(modules, leave_out=list(ANNOUNCED))  # warnings are errors here


@pytest.mark.parametrize("layout", ["hf", "native", "transformers-v5"])
def test_a_config_with_too_few_layers_does_not_make_mtp_of_a_real_one(plain, tmp_path, layout):
    folder = tmp_path / layout
    mj.convert(plain, folder, to=layout)
    config = json.loads((folder / "config.json").read_bytes())
    shorter = {name: config[name][:1] for name in ("attn_type_list", "layer_types") if name in config}
    folders.edit_json(folder / "config.json", num_hidden_layers=1, use_mtp=True, num_mtp_modules=1, **shorter)
    with pytest.raises(LayoutError):
        mj.convert(folder, tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


def test_a_name_of_a_further_layout_cannot_be_left_out(plain, tmp_path):
    mj.convert(plain, tmp_path / "fused", to="transformers-v5")
    with pytest.raises(LayoutError, match="belongs to the model"):
        mj.plan(tmp_path / "fused", leave_out=["model.layers.0.mlp.experts.gate_up_proj"])
