"""A checkpoint held against an earlier certificate: whatever has changed since is named."""

import json
import shutil

import folders
import pytest
from certified_cases import CONFIG, EMBED, Q_PROJ, mismatches
from command_line import run, run_json
from folders import SUFFIX
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from servers import serving

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import CheckpointError, JobError
from minimax_jax.jobs.certified import seal
from minimax_jax.jobs.digests import Digest, overall


def weights_renamed(folder):
    """The same files of weights by other names, and an index that names them so."""
    weight_map = {key: file.name for file in folders.weight_files(folder) for key in load_file(file)}
    for name in set(weight_map.values()):
        (folder / name).rename(folder / f"other-{name}")
    renamed = {key: f"other-{name}" for key, name in weight_map.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": renamed}))


def test_what_is_unchanged_fits_its_certificate(certified, certified_copy):
    for name in ("hf", "bf16"):
        seen = mj.verify(certified_copy(name), certificate=certified / f"{name}.json")
        assert seen.good and seen.held.mismatches == () and seen.held.path == str(certified / name)
        assert seen.held.tensors == len(seen.checkpoints[0].digests)
        assert seen.held.files == len(folders.converted(certified / name))


def test_another_layout_fits_by_its_tensors_its_config_and_the_files_beside_them(certified, certified_copy):
    seen = mj.verify(certified / "fp8", certificate=certified / "hf.json")
    assert seen.good and seen.held.tensors == len(folders.stored(certified / "hf"))
    (note,) = seen.held.notes
    assert (
        "another layout" in note and note in run("verify", certified / "fp8", "--certificate", certified / "hf.json")[0]
    )
    folder = certified_copy("fp8")
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b" ")
    assert mismatches(mj.verify(folder, certificate=certified / "hf.json")) == {("tokenizer.json", "file")}


@pytest.mark.parametrize(
    "change", [{"rope_theta": 1e4, "rope_parameters": None}, {"rms_norm_eps": 0.5}, {"eos_token_id": 7}]
)
@pytest.mark.parametrize("name", ["hf", "fp8", "renamed"])
def test_a_changed_config_is_found_in_any_layout(certified, certified_copy, name, change):
    folder = certified_copy("hf" if name == "renamed" else name)
    if name == "renamed":
        weights_renamed(folder)
        assert mj.verify(folder, certificate=certified / "hf.json").good
    folders.edit_json(folder / "config.json", **change)
    found = mismatches(mj.verify(folder, certificate=certified / "hf.json"))
    assert ("config.json", "config") in found and {name for name, _ in found} == {"config.json"}


def test_renamed_weights_fit_and_that_is_said(certified, certified_copy):
    folder = certified_copy("hf")
    weights_renamed(folder)
    seen = mj.verify(folder, certificate=certified / "hf.json")
    assert seen.good and "files of other names" in seen.held.notes[0]
    assert mj.verify(certified_copy("bf16"), certificate=certified / "bf16.json").held.notes == ()


@pytest.mark.parametrize("victim", ["tokenizer.json", "source_scales.safetensors"])
@pytest.mark.parametrize("how", ["lost", "changed"])
def test_what_lies_beside_renamed_weights_is_found_missing_or_changed(certified, certified_copy, victim, how):
    folder = certified_copy("bf16")
    weights_renamed(folder)
    assert mj.verify(folder, certificate=certified / "bf16.json").good
    if how == "lost":
        (folder / victim).unlink()
    elif victim == "tokenizer.json":
        (folder / victim).write_bytes((folder / victim).read_bytes() + b" ")
    else:
        folders.flip_bit(folder, "model.layers.0.self_attn.q_proj.weight" + SUFFIX, 3)
    found = mismatches(mj.verify(folder, certificate=certified / "bf16.json"))
    assert found == {(victim, "missing" if how == "lost" else "file")}


def test_a_file_that_another_layout_lacks_is_found_missing(certified, certified_copy):
    folder = certified_copy("fp8")
    (folder / "tokenizer.json").unlink()
    assert mismatches(mj.verify(folder, certificate=certified / "hf.json")) == {("tokenizer.json", "missing")}


@pytest.mark.parametrize("to", ["native", "hf", "transformers-v5", "orbax"])
def test_conversions_fit_the_certificate_of_their_source_sidecar_and_all(certified, tmp_path, to):
    if to == "orbax":
        pytest.importorskip("orbax.checkpoint")
    mj.convert(certified / "bf16", tmp_path / "out", to=to)
    seen = mj.verify(tmp_path / "out", certificate=certified / "bf16.json")
    assert seen.good, seen.held.mismatches
    beside = {file.name for file in (certified / "bf16").iterdir()} - {"config.json", "model.safetensors"}
    assert seen.held.files >= len(beside - {"README.md", "source_scales.safetensors"}) > 0


def test_a_copy_on_a_server_is_held_against_it_as_well(certified, certified_copy):
    pytest.importorskip("fsspec")
    folder = certified_copy("bf16")
    with serving(folder.parent) as server:
        seen = mj.verify(f"{server.url}/bf16", certificate=certified / "bf16.json")
        assert seen.good and seen.held.files == len(folders.converted(folder))
        (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b" ")
        folders.flip_bit(folder, EMBED, 5)
        found = mismatches(mj.verify(f"{server.url}/bf16", certificate=certified / "bf16.json"))
    assert {("tokenizer.json", "file"), (EMBED, "sha256")} <= found


@pytest.mark.parametrize("name", ["hf", "bf16"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_flipped_bit_in_any_file_is_found(certified, tmp_path, name, data):
    folder = tmp_path / name
    if not folder.exists():
        shutil.copytree(certified / name, folder)
    file = folder / data.draw(st.sampled_from(sorted(folders.converted(folder))))
    good = file.read_bytes()
    begins = data.draw(st.booleans())  # half of the flips hit headers and what else stands at the start of a file
    bit = data.draw(st.integers(0, 8 * (min(len(good), 2000) if begins else len(good)) - 1))
    try:
        file.write_bytes(good[: bit // 8] + bytes([good[bit // 8] ^ 1 << bit % 8]) + good[bit // 8 + 1 :])
        try:
            seen = mj.verify(folder, certificate=certified / f"{name}.json")
        except CheckpointError:
            return
        assert not seen.good and seen.held.mismatches
    finally:
        file.write_bytes(good)


def test_changed_tensors_are_named_with_both_digests(certified, certified_copy):
    folder = certified_copy("hf")
    folders.flip_bit(folder, Q_PROJ, 77)
    folders.flip_bit(folder, Q_PROJ + SUFFIX, 3)
    seen = mj.verify(folder, certificate=certified / "hf.json")
    assert {(Q_PROJ, "sha256"), (Q_PROJ + SUFFIX, "sha256")} <= mismatches(seen)
    (changed,) = (each for each in seen.held.mismatches if each.name == Q_PROJ)
    tensors = json.loads((certified / "hf.json").read_bytes())["tensors"]
    ours = {digest.key: digest.sha256 for digest in seen.checkpoints[0].digests}
    assert (changed.expected, changed.got) == (tensors[Q_PROJ]["sha256"], ours[Q_PROJ])


def test_another_dtype_and_scales_that_came_or_went_are_named(certified):
    scaled = folders.scaled_weights(certified / "hf")
    gone = mj.verify(certified / "bf16", certificate=certified / "hf.json")
    assert {name for name, what in mismatches(gone) if what == "missing"} == {key + SUFFIX for key in scaled}
    assert {name for name, what in mismatches(gone) if what == "dtype"} == scaled
    came = mj.verify(certified / "hf", certificate=certified / "bf16.json")
    assert {name for name, what in mismatches(came) if what == "extra"} == {key + SUFFIX for key in scaled}


def test_another_shape_and_missing_layers_are_named(certified, tmp_path):
    synthetic.synthesize(tmp_path / "other", CONFIG.replace(num_hidden_layers=1, vocab_size=8))
    seen = mj.verify(tmp_path / "other", certificate=certified / "hf.json")
    found = mismatches(seen)
    assert (EMBED, "shape") in found
    expected = {key for key in folders.stored(certified / "hf") if ".layers.1." in key}
    assert {name for name, what in found if what == "missing"} == expected


@pytest.mark.parametrize("victim", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_a_change_beside_the_tensors_is_named(certified, certified_copy, victim):
    folder = certified_copy("hf")
    text = (folder / victim).read_text()
    (folder / victim).write_text(text.rstrip() + "\n \n")
    assert mismatches(mj.verify(folder, certificate=certified / "hf.json")) == {(victim, "file")}


def test_a_lost_file_is_named_and_an_extra_one_does_not_matter(certified, certified_copy):
    folder = certified_copy("hf")
    (folder / "tokenizer.json").rename(folder / "notes.json")
    assert mismatches(mj.verify(folder, certificate=certified / "hf.json")) == {("tokenizer.json", "missing")}


def test_a_certificate_may_lie_in_the_folder_that_it_speaks_of(certified_copy):
    folder = certified_copy("hf")
    for _ in range(2):
        mj.verify(folder, output=folder / "certificate.json")
        assert mj.verify(folder, certificate=folder / "certificate.json").good


def test_of_a_certificate_of_two_the_one_that_fits_counts(certified, tmp_path):
    mj.verify(certified / "hf", certified / "bf16", output=tmp_path / "both.json")
    for name in ("hf", "bf16"):
        seen = mj.verify(certified / name, certificate=tmp_path / "both.json")
        assert seen.good and seen.held.path == str(certified / name)
    with pytest.raises(JobError, match="two checkpoints and a certificate"):
        mj.verify(certified / "hf", certified / "bf16", certificate=tmp_path / "both.json")


def test_what_differs_is_cut_short_counted_and_told_its_cause(certified):
    command = "verify", certified / "bf16", "--certificate", certified / "hf.json"
    count = len(run_json(*command, code=1)[0]["held"]["mismatches"])
    short, whole = run(*command, code=1)[0], run(*command, "-v", code=1)[0]
    weights = len(folders.scaled_weights(certified / "hf"))
    assert count > 2 * weights and f"... and {count - 20} more; -v shows all" in short and "more;" not in whole
    assert len(whole.splitlines()) - len(short.splitlines()) == count - 21
    assert f"not as certified: {weights} tensors in another dtype, {weights} missing" in short
    assert "cause: BF16 here, F8_E4M3 in the certificate" in short and "minimax-jax verify FIRST SECOND" in short


def test_exit_codes_and_what_is_shown(certified, certified_copy, tmp_path):
    folder = certified_copy("hf")
    stdout, _ = run("verify", folder, "--certificate", certified / "hf.json", "-q")
    assert stdout.endswith("the same\n") and f"held against {certified / 'hf.json'}" in stdout
    folders.flip_bit(folder, Q_PROJ, 9)
    told, _ = run_json("verify", folder, "--certificate", certified / "hf.json", code=1)
    assert not told["good"] and Q_PROJ in {each["name"] for each in told["held"]["mismatches"]}
    stdout, _ = run("verify", folder, "--certificate", certified / "hf.json", code=1)
    assert Q_PROJ in stdout and stdout.endswith("NOT the same by bytes\n")
    (tmp_path / "c.json").write_text("{}")
    _, stderr = run("verify", folder, "--certificate", tmp_path / "c.json", code=3)
    assert str(tmp_path / "c.json") in stderr
    run("verify", folder, folder, "--certificate", certified / "hf.json", code=2)
    stdout, _ = run("verify", folder, "--sample", "10%")
    assert "3 of 27 entries" in stdout


def test_names_from_a_certificate_cannot_speak_to_the_terminal(certified, tmp_path):
    document = json.loads((certified / "hf.json").read_bytes())
    document["tensors"]["\x1b[31m[bold]x"] = document["tensors"][EMBED]
    digests = [Digest(key=key, **fact | {"shape": tuple(fact["shape"])}) for key, fact in document["tensors"].items()]
    document["checkpoints"][0]["sha256"] = overall(digests)
    document["seal"] = seal(document)
    (tmp_path / "c.json").write_text(json.dumps(document))
    stdout, _ = run("verify", certified / "hf", "--certificate", tmp_path / "c.json", code=1)
    assert "\x1b" not in stdout and "\\x1b[31m[bold]x" in stdout


def test_layers_of_which_the_same_is_to_be_said_are_one_row(certified, certified_copy, tmp_path):
    lines = [line.split() for line in run("verify", certified / "hf", certified / "bf16")[0].splitlines()]
    assert ["each", "of", "0", "to", "1"] in [line[:5] for line in lines]
    folder = certified_copy("hf")
    folders.edit(folder, Q_PROJ + SUFFIX, lambda scale: scale * 2)
    told, _ = run_json("verify", certified / "hf", folder, code=1)
    assert [layer["weights"]["different"] for layer in told["layers"]] == [0, 0, 1]
    assert told["layers"][2]["max_abs"] == told["differences"][0]["max_abs"] > 0
    lines = [line.split() for line in run("verify", certified / "hf", folder, code=1)[0].splitlines()]
    assert ["1", "18", "0", "1"] in [line[:4] for line in lines]
