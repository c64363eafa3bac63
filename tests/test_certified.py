"""A checkpoint held against an earlier certificate: whatever has changed since is named."""

import json
import math
import shutil

import folders
import ml_dtypes
import numpy as np
import pytest
import torch
from command_line import run, run_json
from folders import SUFFIX
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from servers import serving

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import CheckpointError, FormatError, JobError
from minimax_jax.jobs.certified import FORMAT, read_certificate, seal
from minimax_jax.jobs.digests import Digest, overall
from minimax_jax.jobs.numbers import unusual

CONFIG = synthetic.config(layers=2, experts=3)
EMBED = "model.embed_tokens.weight"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    synthetic.synthesize(root / "hf", CONFIG, shard_bytes=300_000)
    mj.convert(root / "hf", root / "fp8", dtype="fp8")
    mj.convert(root / "hf", root / "bf16")
    for name in ("hf", "bf16"):
        mj.verify(root / name, output=root / f"{name}.json")
    return root


@pytest.fixture
def copy(made, tmp_path):
    def copied(name):
        return shutil.copytree(made / name, tmp_path / name)

    return copied


def weights_renamed(folder):
    """The same files of weights by other names, and an index that names them so."""
    weight_map = {key: file.name for file in folders.weight_files(folder) for key in load_file(file)}
    for name in set(weight_map.values()):
        (folder / name).rename(folder / f"other-{name}")
    renamed = {key: f"other-{name}" for key, name in weight_map.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": renamed}))


def mismatches(seen):
    return {(each.name, each.what) for each in seen.held.mismatches}


def test_what_is_unchanged_fits_its_certificate(made, copy):
    for name in ("hf", "bf16"):
        seen = mj.verify(copy(name), certificate=made / f"{name}.json")
        assert seen.good and seen.held.mismatches == () and seen.held.path == str(made / name)
        assert seen.held.tensors == len(seen.checkpoints[0].digests)
        assert seen.held.files == len(list((made / name).iterdir()))


def test_another_layout_fits_by_its_tensors_its_config_and_the_files_beside_them(made, copy):
    seen = mj.verify(made / "fp8", certificate=made / "hf.json")
    assert seen.good and seen.held.tensors == len(folders.stored(made / "hf"))
    (note,) = seen.held.notes
    assert "another layout" in note and note in run("verify", made / "fp8", "--certificate", made / "hf.json")[0]
    folder = copy("fp8")
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b" ")
    assert mismatches(mj.verify(folder, certificate=made / "hf.json")) == {("tokenizer.json", "file")}


@pytest.mark.parametrize(
    "change", [{"rope_theta": 1e4, "rope_parameters": None}, {"rms_norm_eps": 0.5}, {"eos_token_id": 7}]
)
@pytest.mark.parametrize("name", ["hf", "fp8", "renamed"])
def test_a_changed_config_is_found_in_any_layout(made, copy, name, change):
    folder = copy("hf" if name == "renamed" else name)
    if name == "renamed":
        weights_renamed(folder)
        assert mj.verify(folder, certificate=made / "hf.json").good
    folders.edit_json(folder / "config.json", **change)
    found = mismatches(mj.verify(folder, certificate=made / "hf.json"))
    assert ("config.json", "config") in found and {name for name, _ in found} == {"config.json"}


def test_renamed_weights_fit_and_that_is_said(made, copy):
    folder = copy("hf")
    weights_renamed(folder)
    seen = mj.verify(folder, certificate=made / "hf.json")
    assert seen.good and "files of other names" in seen.held.notes[0]
    assert mj.verify(copy("bf16"), certificate=made / "bf16.json").held.notes == ()


@pytest.mark.parametrize("victim", ["tokenizer.json", "source_scales.safetensors"])
@pytest.mark.parametrize("how", ["lost", "changed"])
def test_what_lies_beside_renamed_weights_is_found_missing_or_changed(made, copy, victim, how):
    folder = copy("bf16")
    weights_renamed(folder)
    assert mj.verify(folder, certificate=made / "bf16.json").good
    if how == "lost":
        (folder / victim).unlink()
    elif victim == "tokenizer.json":
        (folder / victim).write_bytes((folder / victim).read_bytes() + b" ")
    else:
        folders.flip_bit(folder, "model.layers.0.self_attn.q_proj.weight" + SUFFIX, 3)
    found = mismatches(mj.verify(folder, certificate=made / "bf16.json"))
    assert found == {(victim, "missing" if how == "lost" else "file")}


def test_a_file_that_another_layout_lacks_is_found_missing(made, copy):
    folder = copy("fp8")
    (folder / "tokenizer.json").unlink()
    assert mismatches(mj.verify(folder, certificate=made / "hf.json")) == {("tokenizer.json", "missing")}


@pytest.mark.parametrize("to", ["native", "hf", "transformers-v5", "orbax"])
def test_conversions_fit_the_certificate_of_their_source_sidecar_and_all(made, tmp_path, to):
    if to == "orbax":
        pytest.importorskip("orbax.checkpoint")
    mj.convert(made / "bf16", tmp_path / "out", to=to)
    seen = mj.verify(tmp_path / "out", certificate=made / "bf16.json")
    assert seen.good, seen.held.mismatches
    beside = {file.name for file in (made / "bf16").iterdir()} - {"config.json", "model.safetensors"}
    assert seen.held.files >= len(beside - {"source_scales.safetensors"}) > 0


def test_a_copy_on_a_server_is_held_against_it_as_well(made, copy):
    pytest.importorskip("fsspec")
    folder = copy("bf16")
    with serving(folder.parent) as server:
        seen = mj.verify(f"{server.url}/bf16", certificate=made / "bf16.json")
        assert seen.good and seen.held.files == len(list(folder.iterdir()))
        (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b" ")
        folders.flip_bit(folder, EMBED, 5)
        found = mismatches(mj.verify(f"{server.url}/bf16", certificate=made / "bf16.json"))
    assert {("tokenizer.json", "file"), (EMBED, "sha256")} <= found


@pytest.mark.parametrize("name", ["hf", "bf16"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_flipped_bit_in_any_file_is_found(made, copy, name, data):
    folder = made / f"flipped-{name}"
    if not folder.exists():
        shutil.copytree(made / name, folder)
    file = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    good = file.read_bytes()
    begins = data.draw(st.booleans())  # half of the flips hit headers and what else stands at the start of a file
    bit = data.draw(st.integers(0, 8 * (min(len(good), 2000) if begins else len(good)) - 1))
    try:
        file.write_bytes(good[: bit // 8] + bytes([good[bit // 8] ^ 1 << bit % 8]) + good[bit // 8 + 1 :])
        try:
            seen = mj.verify(folder, certificate=made / f"{name}.json")
        except CheckpointError:
            return
        assert not seen.good and seen.held.mismatches
    finally:
        file.write_bytes(good)


def test_changed_tensors_are_named_with_both_digests(made, copy):
    folder = copy("hf")
    folders.flip_bit(folder, Q_PROJ, 77)
    folders.flip_bit(folder, Q_PROJ + SUFFIX, 3)
    seen = mj.verify(folder, certificate=made / "hf.json")
    assert {(Q_PROJ, "sha256"), (Q_PROJ + SUFFIX, "sha256")} <= mismatches(seen)
    (changed,) = (each for each in seen.held.mismatches if each.name == Q_PROJ)
    tensors = json.loads((made / "hf.json").read_bytes())["tensors"]
    ours = {digest.key: digest.sha256 for digest in seen.checkpoints[0].digests}
    assert (changed.expected, changed.got) == (tensors[Q_PROJ]["sha256"], ours[Q_PROJ])


def test_another_dtype_and_scales_that_came_or_went_are_named(made):
    scaled = folders.scaled_weights(made / "hf")
    gone = mj.verify(made / "bf16", certificate=made / "hf.json")
    assert {name for name, what in mismatches(gone) if what == "missing"} == {key + SUFFIX for key in scaled}
    assert {name for name, what in mismatches(gone) if what == "dtype"} == scaled
    came = mj.verify(made / "hf", certificate=made / "bf16.json")
    assert {name for name, what in mismatches(came) if what == "extra"} == {key + SUFFIX for key in scaled}


def test_another_shape_and_missing_layers_are_named(made, tmp_path):
    synthetic.synthesize(tmp_path / "other", CONFIG.replace(num_hidden_layers=1, vocab_size=8))
    seen = mj.verify(tmp_path / "other", certificate=made / "hf.json")
    found = mismatches(seen)
    assert (EMBED, "shape") in found
    expected = {key for key in folders.stored(made / "hf") if ".layers.1." in key}
    assert {name for name, what in found if what == "missing"} == expected


@pytest.mark.parametrize("victim", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_a_change_beside_the_tensors_is_named(made, copy, victim):
    folder = copy("hf")
    text = (folder / victim).read_text()
    (folder / victim).write_text(text.rstrip() + "\n \n")
    assert mismatches(mj.verify(folder, certificate=made / "hf.json")) == {(victim, "file")}


def test_a_lost_file_is_named_and_an_extra_one_does_not_matter(made, copy):
    folder = copy("hf")
    (folder / "tokenizer.json").rename(folder / "notes.json")
    assert mismatches(mj.verify(folder, certificate=made / "hf.json")) == {("tokenizer.json", "missing")}


def test_a_certificate_may_lie_in_the_folder_that_it_speaks_of(copy):
    folder = copy("hf")
    for _ in range(2):
        mj.verify(folder, output=folder / "certificate.json")
        assert mj.verify(folder, certificate=folder / "certificate.json").good


def test_of_a_certificate_of_two_the_one_that_fits_counts(made, tmp_path):
    mj.verify(made / "hf", made / "bf16", output=tmp_path / "both.json")
    for name in ("hf", "bf16"):
        seen = mj.verify(made / name, certificate=tmp_path / "both.json")
        assert seen.good and seen.held.path == str(made / name)
    with pytest.raises(JobError, match="two checkpoints and a certificate"):
        mj.verify(made / "hf", made / "bf16", certificate=tmp_path / "both.json")


def test_what_differs_is_cut_short_counted_and_told_its_cause(made):
    command = "verify", made / "bf16", "--certificate", made / "hf.json"
    count = len(run_json(*command, code=1)[0]["held"]["mismatches"])
    short, whole = run(*command, code=1)[0], run(*command, "-v", code=1)[0]
    weights = len(folders.scaled_weights(made / "hf"))
    assert count > 2 * weights and f"... and {count - 20} more; -v shows all" in short and "more;" not in whole
    assert len(whole.splitlines()) - len(short.splitlines()) == count - 21
    assert f"not as certified: {weights} tensors in another dtype, {weights} missing" in short
    assert "cause: BF16 here, F8_E4M3 in the certificate" in short and "minimax-jax verify FIRST SECOND" in short


# --- the certificate itself ------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_flipped_bit_in_a_certificate_is_found(made, tmp_path, data):
    good = (made / "bf16.json").read_bytes()
    bit = data.draw(st.integers(0, 8 * len(good) - 1))
    (tmp_path / "c.json").write_bytes(good[: bit // 8] + bytes([good[bit // 8] ^ 1 << bit % 8]) + good[bit // 8 + 1 :])
    with pytest.raises(FormatError):
        read_certificate(tmp_path / "c.json")


def without(document, *path):
    *steps, last = path
    inner = document
    for step in steps:
        inner = inner[step]
    del inner[last]


def put(document, value, *path):
    *steps, last = path
    inner = document
    for step in steps:
        inner = inner[step]
    inner[last] = value


FORGED = {
    "no options": lambda d: without(d, "options"),
    "options of another kind": lambda d: put(d, [], "options"),
    "no checkpoints": lambda d: put(d, [], "checkpoints"),
    "three checkpoints": lambda d: put(d, d["checkpoints"] * 3, "checkpoints"),
    "checkpoints of another kind": lambda d: put(d, 5, "checkpoints"),
    "no tensors": lambda d: without(d, "tensors"),
    "tensors of another kind": lambda d: put(d, [1], "tensors"),
    "a tensor without digest": lambda d: without(d, "tensors", EMBED, "sha256"),
    "a tensor that went": lambda d: without(d, "tensors", EMBED),
    "a shape that is none": lambda d: put(d, [-1], "tensors", EMBED, "shape"),
    "a list of no digests": lambda d: put(d, [], "tensors", EMBED),
    "a path that is no text": lambda d: put(d, 7, "checkpoints", 0, "path"),
    "a file without size": lambda d: put(d, "x", "checkpoints", 0, "files", "config.json", "bytes"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_sealed_certificate_of_a_wrong_form_is_refused(made, tmp_path, case):
    document = json.loads((made / "bf16.json").read_bytes())
    FORGED[case](document)
    document["seal"] = seal(document)
    (tmp_path / "c.json").write_text(json.dumps(document))
    with pytest.raises(FormatError, match="form") as caught:
        mj.verify(made / "bf16", certificate=tmp_path / "c.json")
    assert caught.value.problems[0].file == str(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "known form"),
        (json.dumps({"format": FORMAT}).encode(), "seal"),
        (json.dumps({"format": FORMAT + "0"}).encode(), "known form"),
        (b'{"format":' + b"[" * 900 + b"]" * 900 + b"}", "known form|not valid JSON"),
        (b'{"format":"' + FORMAT.encode() + b'","x":' + b"[" * 970 + b"]" * 970 + b"}", "form|seal|not valid JSON"),
    ],
)
def test_what_is_no_certificate_is_refused_before_the_work(made, tmp_path, content, words):
    (tmp_path / "c.json").write_bytes(content)
    moments = []
    with pytest.raises(FormatError, match=words):
        mj.verify(made / "hf", certificate=tmp_path / "c.json", progress=moments.append)
    assert not moments


def test_a_certificate_says_with_what_it_was_made(made):
    told = json.loads((made / "hf.json").read_bytes())
    assert told["versions"]["numpy"] == np.__version__ and told["versions"]["python"].startswith("3.")
    assert set(told["versions"]) == {"python", "minimax_jax", "jax", "jaxlib", "numpy", "ml_dtypes"}
    assert told["options"] == {"by": "value", "sample": None} and told["seal"] == seal(told)
    assert [layer["layer"] for layer in told["layers"]] == [None, 0, 1]
    files = told["checkpoints"][0]["files"]
    assert {name: fact["bytes"] for name, fact in files.items()} == {
        file.name: file.stat().st_size for file in (made / "hf").iterdir()
    }
    assert {fact["of"] for name, fact in files.items() if name.endswith(".safetensors")} == {"header"}


# --- samples ---------------------------------------------------------------------------------------------------------


def test_a_sample_is_always_the_same_part_in_any_layout(made):
    keys = {}
    for asked in ("1", "10%", 6, "100%"):
        parts = [mj.verify(made / name, sample=asked) for name in ("hf", "fp8", "hf")]
        assert len({tuple(part.checkpoints[0].digests) for part in parts}) == 1
        keys[asked] = {digest.key for digest in parts[0].checkpoints[0].digests}
        assert parts[0].sample.entries == {"1": 1, "10%": 3, 6: 6, "100%": 27}[asked] and parts[0].sample.of == 27
    assert keys["1"] < keys["10%"] < keys[6] < keys["100%"] == set(folders.stored(made / "hf"))


def test_a_sample_compares_and_counts_its_part_alone(made):
    moments = []
    seen = mj.verify(made / "hf", made / "bf16", sample="20%", progress=moments.append)
    weights = {comparison.key for comparison in seen.comparisons}
    assert seen.good and weights == {d.key for d in seen.checkpoints[0].digests if not d.key.endswith(SUFFIX)}
    assert len(weights) < len(folders.stored(made / "bf16")) and moments[-1].done_bytes == moments[0].total_bytes


def test_a_sample_and_a_certificate_meet_in_what_both_know(made, copy, tmp_path):
    mj.verify(made / "hf", sample=9, output=tmp_path / "nine.json")
    nine = mj.verify(made / "hf", certificate=tmp_path / "nine.json")
    four = mj.verify(made / "hf", certificate=tmp_path / "nine.json", sample=4)
    whole = mj.verify(made / "hf", certificate=made / "hf.json", sample=4)
    assert nine.good and four.good and whole.good
    assert (nine.sample.entries, four.sample.entries, whole.sample.entries) == (9, 4, 4)
    sampled = {digest.key for digest in nine.checkpoints[0].digests}
    folder = copy("hf")
    inside = next(key for key in folders.stored(made / "hf") if key in sampled)
    outside = next(key for key in folders.stored(made / "hf") if key not in sampled)
    folders.flip_bit(folder, outside, 5)
    assert not mismatches(mj.verify(folder, certificate=tmp_path / "nine.json")) & {(outside, "sha256")}
    folders.flip_bit(folder, inside, 5)
    assert (inside, "sha256") in mismatches(mj.verify(folder, certificate=tmp_path / "nine.json"))


@pytest.mark.parametrize("asked", ["0", "0%", "-1", "101%", "1.5", "x", "%", "", "nan%", "inf", "1e3", "٣"])
def test_samples_that_make_no_sense_are_refused(made, asked):
    with pytest.raises(JobError, match="no such sample"):
        mj.verify(made / "hf", sample=asked)
    run("verify", made / "hf", "--sample", asked, code=2)


# --- numbers that a sound checkpoint does not hold -------------------------------------------------------------------


def test_unusual_codes_scales_and_floats_are_counted_and_change_nothing(made, copy):
    folder = copy("hf")

    def codes(weight):
        weight.view(torch.uint8)[0, :3] = torch.tensor([0x7F, 0xFF, 0x7E], dtype=torch.uint8)
        return weight

    def scales(values):
        def change(scale):
            scale[0, : len(values)] = torch.tensor(values)
            return scale

        return change

    down = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    folders.edit(folder, Q_PROJ, codes)
    folders.edit(folder, Q_PROJ + SUFFIX, scales([math.inf, math.nan]))
    folders.edit(folder, down + SUFFIX, lambda scale: torch.tensor([-1e-40, -0.0]).reshape(scale.shape))
    folders.edit(folder, EMBED, lambda weight: weight.index_fill_(0, torch.tensor([1]), -math.inf))
    (seen,) = mj.verify(folder).checkpoints
    assert {(each.key, each.what): each.count for each in seen.unusual} == {
        (Q_PROJ, "NaN"): 2,
        (Q_PROJ + SUFFIX, "NaN"): 1,
        (Q_PROJ + SUFFIX, "infinity"): 1,
        (down + SUFFIX, "zero scale"): 1,
        (down + SUFFIX, "subnormal scale"): 1,
        (down + SUFFIX, "negative scale"): 1,
        (EMBED, "infinity"): CONFIG.hidden_size,
    }
    assert mj.verify(folder, folder, by="bytes").good
    assert "unusual numbers" in run("verify", folder)[0] and mj.verify(made / "hf").checkpoints[0].unusual == ()


# --- on the command line ---------------------------------------------------------------------------------------------


def test_exit_codes_and_what_is_shown(made, copy, tmp_path):
    folder = copy("hf")
    stdout, _ = run("verify", folder, "--certificate", made / "hf.json", "-q")
    assert stdout.endswith("the same\n") and f"held against {made / 'hf.json'}" in stdout
    folders.flip_bit(folder, Q_PROJ, 9)
    told, _ = run_json("verify", folder, "--certificate", made / "hf.json", code=1)
    assert not told["good"] and Q_PROJ in {each["name"] for each in told["held"]["mismatches"]}
    stdout, _ = run("verify", folder, "--certificate", made / "hf.json", code=1)
    assert Q_PROJ in stdout and stdout.endswith("NOT the same by bytes\n")
    (tmp_path / "c.json").write_text("{}")
    _, stderr = run("verify", folder, "--certificate", tmp_path / "c.json", code=3)
    assert str(tmp_path / "c.json") in stderr
    run("verify", folder, folder, "--certificate", made / "hf.json", code=2)
    stdout, _ = run("verify", folder, "--sample", "10%")
    assert "3 of 27 entries" in stdout


def test_names_from_a_certificate_cannot_speak_to_the_terminal(made, tmp_path):
    document = json.loads((made / "hf.json").read_bytes())
    document["tensors"]["\x1b[31m[bold]x"] = document["tensors"][EMBED]
    digests = [Digest(key=key, **fact | {"shape": tuple(fact["shape"])}) for key, fact in document["tensors"].items()]
    document["checkpoints"][0]["sha256"] = overall(digests)
    document["seal"] = seal(document)
    (tmp_path / "c.json").write_text(json.dumps(document))
    stdout, _ = run("verify", made / "hf", "--certificate", tmp_path / "c.json", code=1)
    assert "\x1b" not in stdout and "\\x1b[31m[bold]x" in stdout


def test_layers_of_which_the_same_is_to_be_said_are_one_row(made, copy, tmp_path):
    lines = [line.split() for line in run("verify", made / "hf", made / "bf16")[0].splitlines()]
    assert ["each", "of", "0", "to", "1"] in [line[:5] for line in lines]
    folder = copy("hf")
    folders.edit(folder, Q_PROJ + SUFFIX, lambda scale: scale * 2)
    told, _ = run_json("verify", made / "hf", folder, code=1)
    assert [layer["weights"]["different"] for layer in told["layers"]] == [0, 0, 1]
    assert told["layers"][2]["max_abs"] == told["differences"][0]["max_abs"] > 0
    lines = [line.split() for line in run("verify", made / "hf", folder, code=1)[0].splitlines()]
    assert ["1", "18", "0", "1"] in [line[:4] for line in lines]


@pytest.mark.parametrize("at_once", [7, 2**17])
@pytest.mark.parametrize("name", ["F8_E4M3", "BF16", "F16", "F32"])
def test_unusual_numbers_are_those_that_numpy_counts(monkeypatch, name, at_once):
    monkeypatch.setattr("minimax_jax.jobs.numbers._AT_ONCE", at_once)
    dtype = DTYPES[name]
    bits = np.random.default_rng(0).integers(0, 256, 6000 * dtype.itemsize, dtype=np.uint8)
    special = np.array([0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 1e-40, -1e-40], np.float32)
    tensor = np.concatenate([bits.view(dtype), special.astype(dtype)]).reshape(4, -1)
    with np.errstate(invalid="ignore"):  # signalling NaN
        wide = tensor.astype(np.float64)
    tiny = ml_dtypes.finfo(dtype).smallest_normal
    expected = {
        "NaN": np.isnan(wide).sum(),
        "infinity": np.isinf(wide).sum(),
        "zero scale": (wide == 0).sum(),
        "subnormal scale": ((wide != 0) & (np.abs(wide) < float(tiny))).sum(),
        "negative scale": (wide < 0).sum(),
    }
    kinds = ["NaN", "infinity", *(["zero scale", "subnormal scale", "negative scale"] if name != "F8_E4M3" else [])]
    found = {each.what: each.count for each in unusual("x", tensor, is_scale=True)}
    assert found == {kind: expected[kind] for kind in kinds if expected[kind]} and found["NaN"] > 1
    assert {each.what for each in unusual("x", tensor, is_scale=False)} <= {"NaN", "infinity"}
