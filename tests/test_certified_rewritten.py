"""The same tensors in other files: no difference, but said; what changed on the way is found in any file."""

import json
import shutil

import folders
import pytest
import torch
from certified_cases import EMBED, Q_PROJ, mismatches
from command_line import run, run_json
from folders import SUFFIX
from safetensors.torch import load_file, save_file

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import FormatError

INDEX = "model.safetensors.index.json"
ASIDE = ["model.mtp_layers.0.eh_proj.weight", "model.mtp_layers.0.norm.weight", "vision.norm.weight"]
PT = {"format": "pt"}


def loaded(folder):
    return {key: tensor for file in folders.weight_files(folder) for key, tensor in load_file(file).items()}


def rewrite(folder, parts, text=PT):
    """The weights anew, by the safetensors library: file name to names of tensors."""
    tensors = loaded(folder)
    for file in folders.weight_files(folder):
        file.unlink()
    for name, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / name, text)
    if list(parts) == ["model.safetensors"]:
        (folder / INDEX).unlink(missing_ok=True)
    else:
        weight_map = {key: name for name, keys in parts.items() for key in keys}
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def as_stored(folder):
    return {file.name: list(load_file(file)) for file in folders.weight_files(folder)}


def merged(folder):
    rewrite(folder, {"model.safetensors": list(loaded(folder))})


def recut(folder):
    """Files of the same names, and other tensors in them."""
    names, keys = [file.name for file in folders.weight_files(folder)], sorted(loaded(folder))
    rewrite(folder, {name: keys[number :: len(names)] for number, name in enumerate(names)})


def renamed(folder):
    rewrite(folder, {f"other-{name}": keys for name, keys in as_stored(folder).items()})


def without_text(folder):
    rewrite(folder, as_stored(folder), text=None)


def with_header(file, change):
    """A file with another text of its header before the same data."""
    good = file.read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")
    header = change(good[8:end])
    file.write_bytes(len(header).to_bytes(8, "little") + header + good[end:])


def padded(folder):
    for file in folders.weight_files(folder):
        with_header(file, lambda header: header + b" " * 64)


def in_other_words(folder):
    for file in folders.weight_files(folder):
        with_header(file, lambda header: json.dumps(json.loads(header), sort_keys=True, indent=1).encode())


REWRITES = [merged, recut, renamed, without_text, padded, in_other_words]


@pytest.fixture(scope="module")
def with_more(tmp_path_factory):
    """A checkpoint with tensors that are not the model's, some of them announced, and its certificate."""
    folder = tmp_path_factory.mktemp("more") / "hf"
    synthetic.synthesize(folder, synthetic.config(layers=1, experts=2), shard_bytes=60_000)
    more = {name: torch.arange(6, dtype=torch.float32).reshape(2, 3) + number for number, name in enumerate(ASIDE)}
    tensors = loaded(folder) | more
    keys = sorted(tensors)
    parts = {f"model-{number}.safetensors": keys[number::3] for number in range(3)}
    for file in folders.weight_files(folder):
        file.unlink()
    for name, part in parts.items():
        save_file({key: tensors[key] for key in part}, folder / name, PT)
    (folder / INDEX).write_text(json.dumps({"weight_map": {key: name for name in parts for key in parts[name]}}))
    folders.edit_json(folder / "config.json", use_mtp=True, num_mtp_modules=1)
    mj.verify(folder, leave_out=["vision"], output=folder.parent / "hf.json")
    return folder.parent


@pytest.fixture
def more_copy(with_more, tmp_path):
    return shutil.copytree(with_more / "hf", tmp_path / "hf")


def held(folder, with_more, **options):
    return mj.verify(folder, certificate=with_more / "hf.json", leave_out=["vision"], **options)


# ---- an honest rewrite


@pytest.mark.parametrize("rewritten", REWRITES)
def test_the_same_tensors_in_other_files_fit_and_that_is_said(certified, certified_copy, rewritten):
    folder = certified_copy("hf")
    rewritten(folder)
    assert folders.stored(folder) == folders.stored(certified / "hf")
    seen = mj.verify(folder, certificate=certified / "hf.json")
    assert seen.good and seen.held.mismatches == ()
    assert "names, sizes or headers" in seen.held.notes[0]
    assert ["__metadata__" in note for note in seen.held.notes[1:]] == [True] * (rewritten is without_text)
    stdout, _ = run("verify", folder, "--certificate", certified / "hf.json")
    assert "note: weights in files of other names" in stdout and stdout.endswith("the same\n")


@pytest.mark.parametrize("rewritten", REWRITES)
def test_by_bytes_asks_for_the_very_same_files(certified, certified_copy, rewritten):
    folder = certified_copy("hf")
    command = "verify", folder, "--certificate", certified / "hf.json", "--by", "bytes"
    run(*command)
    rewritten(folder)
    told, _ = run_json(*command, code=1)
    found = {(each["name"], each["what"]) for each in told["held"]["mismatches"]}
    files = {file.name for file in folders.weight_files(certified / "hf")}
    there = files & {file.name for file in folder.iterdir()}
    expected = {(name, "file") for name in there} | {(name, "missing") for name in files - there}
    assert {(name, what) for name, what in found if name != INDEX} == expected and told["held"]["notes"] == []


def test_by_bytes_holds_another_layout_tensor_by_tensor(certified):
    seen = mj.verify(certified / "fp8", certificate=certified / "hf.json", by="bytes")
    assert seen.good and "another layout" in seen.held.notes[0]


def test_a_changed_index_of_unchanged_files_is_found(certified, certified_copy):
    folder = certified_copy("hf")
    folders.edit_json(folder / INDEX, metadata={"total_size": 1})
    assert mismatches(mj.verify(folder, certificate=certified / "hf.json")) == {(INDEX, "file")}


# ---- what changed on the way


@pytest.mark.parametrize("rewritten", REWRITES)
@pytest.mark.parametrize("key", [EMBED, Q_PROJ, Q_PROJ + SUFFIX])
def test_one_flipped_bit_of_a_rewritten_tensor_is_found(certified, certified_copy, rewritten, key):
    folder = certified_copy("hf")
    rewritten(folder)
    folders.flip_bit(folder, key, 11)
    assert mismatches(mj.verify(folder, certificate=certified / "hf.json")) == {(key, "sha256")}


@pytest.mark.parametrize("text", [{"format": "qt"}, {"gormat": "pt"}, {"format": "pt", "more": "words"}])
@pytest.mark.parametrize("rewritten", [recut, renamed])
def test_changed_text_of_a_header_is_found(certified, certified_copy, rewritten, text):
    folder = certified_copy("hf")
    rewritten(folder)
    victim = folders.weight_files(folder)[0]
    save_file(load_file(victim), victim, text)
    seen = mj.verify(folder, certificate=certified / "hf.json")
    assert mismatches(seen) == {(victim.name, "text")}
    assert "header with other text" in run("verify", folder, "--certificate", certified / "hf.json", code=1)[0]


def test_text_that_comes_where_there_was_none_is_said(certified_copy, tmp_path):
    folder = certified_copy("hf")
    without_text(folder)
    mj.verify(folder, output=tmp_path / "bare.json")
    rewrite(folder, as_stored(folder))
    seen = mj.verify(folder, certificate=tmp_path / "bare.json")
    assert seen.good and "__metadata__" in seen.held.notes[1]


# ---- tensors that are left out


@pytest.mark.parametrize("rewritten", REWRITES)
@pytest.mark.parametrize("key", ASIDE)
def test_a_bit_of_a_tensor_that_is_left_out_is_found_in_any_file(with_more, more_copy, rewritten, key):
    rewritten(more_copy)
    seen = held(more_copy, with_more)
    assert seen.good and seen.held.tensors == len(seen.checkpoints[0].digests) + len(ASIDE)
    folders.flip_bit(more_copy, key, 77)
    assert mismatches(held(more_copy, with_more)) == {(key, "sha256")}


@pytest.mark.parametrize("rewritten", [merged, renamed])
def test_their_dtype_and_shape_count_and_one_that_went_or_came(with_more, more_copy, rewritten):
    rewritten(more_copy)
    first, second, third = ASIDE
    folders.edit(more_copy, first, lambda tensor: tensor.view(torch.int32))
    folders.edit(more_copy, second, lambda tensor: tensor.reshape(3, 2))
    tensors = loaded(more_copy)
    del tensors[third]
    tensors["vision.other"] = torch.ones(2)
    for file in folders.weight_files(more_copy):
        file.unlink()
    (more_copy / INDEX).unlink(missing_ok=True)
    save_file(tensors, more_copy / "model.safetensors", PT)
    assert mismatches(held(more_copy, with_more)) == {
        (first, "dtype"),
        (second, "shape"),
        (third, "missing"),
        ("vision.other", "extra"),
    }


@pytest.mark.parametrize("to", ["hf", "native"])
def test_a_conversion_leaves_them_out_and_that_is_said(with_more, tmp_path, to):
    mj.convert(with_more / "hf", tmp_path / "out", to=to, dtype="fp8", leave_out=["vision"])
    seen = mj.verify(tmp_path / "out", certificate=with_more / "hf.json")
    assert seen.good and f"3 tensors left out of the model, first {ASIDE[0]}" in seen.held.notes[-1]


def test_those_of_an_orbax_checkpoint_are_covered_too(with_more, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint").v1
    mj.convert(with_more / "hf", tmp_path / "native", dtype="bf16", leave_out=["vision"])
    tree = dict(mj.read_tree(tmp_path / "native"))
    for step, number in (("good", 1.0), ("bad", 2.0)):
        more = {"vision.scale": torch.tensor(number).numpy(), "vision.norm": torch.full((3, 2), number).numpy()}
        ocp.save(tmp_path / step, tree | more)
        (tmp_path / step / "config.json").write_bytes((tmp_path / "native" / "config.json").read_bytes())
    options = {"leave_out": ["vision"]}
    mj.verify(tmp_path / "good", output=tmp_path / "c.json", **options)
    assert mj.verify(tmp_path / "good", certificate=tmp_path / "c.json", **options).good
    found = mismatches(mj.verify(tmp_path / "bad", certificate=tmp_path / "c.json", **options))
    assert {each for each in found if each[0].startswith("vision")} == {
        ("vision.scale", "sha256"),
        ("vision.norm", "sha256"),
    }


# ---- certificates of an older form


@pytest.mark.parametrize(
    "form", ["minimax_jax certificate 1", "minimax_jax certificate 2", "minimax_jax certificate 4"]
)
def test_a_certificate_of_another_form_is_refused_with_the_way_out(certified, tmp_path, form):
    document = json.loads((certified / "hf.json").read_bytes()) | {"format": form}
    (tmp_path / "c.json").write_text(json.dumps(document))
    with pytest.raises(FormatError, match="not a certificate of a known form") as caught:
        mj.verify(certified / "hf", certificate=tmp_path / "c.json")
    (problem,) = caught.value.problems
    assert form in problem.got and "minimax-jax verify CHECKPOINT -o FILE" in problem.remedy
