"""The command line: what it prints where, and with which exit code."""

import inspect
import json
import os
import re
import shutil
import sys
from pathlib import Path

import click
import folders
import pytest
from command_line import process, run, run_json
from remote_cases import CONFIG

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.cli import cli
from minimax_jax.cli.options import Size
from minimax_jax.errors import argument
from minimax_jax.jobs import front

EMBED = "model.embed_tokens.weight"


# --- each command ----------------------------------------------------------------------------------------------------


def test_inspect(made):
    seen, stderr = run_json("inspect", made / "native")
    tensors = folders.stored(made / "native")
    assert (seen["path"], seen["layout"], seen["files"]) == (str(made / "native"), "native", 1)
    assert (seen["tensors"], seen["bytes"]) == (len(tensors), sum(len(data) for _, _, data in tensors.values()))
    assert sum(tally["bytes"] for tally in seen["by_dtype"].values()) == seen["bytes"] and set(seen["by_dtype"]) == {
        "BF16",
        "F32",
    }
    assert sum(tally["tensors"] for tally in seen["by_kind"].values()) == seen["tensors"]
    assert seen["source_scales"]["tensors"] == 6 and seen["config"]["num_local_experts"] == 3 and stderr == ""
    stdout, stderr = run("inspect", made / "native")
    assert (
        "native layout" in stdout and "source scales for a byte-exact FP8 export: 6 tensors" in stdout and stderr == ""
    )


def test_plan(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned, stderr = run_json("plan", made / "hf", "--dtype", "fp8", "--shard-size", "100kB", "--workers", 1)
    assert (planned["source_layout"], planned["target_layout"], planned["target_dtype"]) == ("hf", "native", "F8_E4M3")
    mj.convert(made / "hf", tmp_path / "out", dtype="fp8", shard_bytes=100_000)
    files = {file.name: file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")}
    assert {file["name"]: file["bytes"] for file in planned["files"]} == files and len(files) > 2
    assert planned["write_bytes"] == sum(files.values()) and planned["tensors"] == len(folders.stored(tmp_path / "out"))
    assert planned["read_bytes"] == mj.inspect(made / "hf").total.nbytes and stderr == ""
    assert planned["peak_memory_bytes"] > 0 and planned["units"] > 10
    stdout, stderr = run("plan", made / "hf")
    assert "model.safetensors" in stdout and "source_scales.safetensors" in stdout and stderr == ""


def test_convert_and_back(made, tmp_path):
    told, _ = run_json("convert", made / "native", tmp_path / "back", "--to", "hf-fp8", "--quiet")
    assert told["destination"] == str(tmp_path / "back") and told["fresh_scales"] == []
    assert told["kept_source_scales"] == sum(key.endswith("_scale_inv") for key in folders.stored(made / "hf"))
    assert told["tensors"] == len(folders.stored(tmp_path / "back")) and told["seconds"] > 0
    assert told["written_bytes"] == (tmp_path / "back" / "model.safetensors").stat().st_size
    assert folders.stored(tmp_path / "back") == folders.stored(made / "hf")
    stdout, stderr = run("convert", made / "hf", tmp_path / "native", "-q", "--max-memory", "1GB")
    assert stdout.startswith(f"wrote {tmp_path / 'native'}: ") and stderr == ""
    assert folders.stored(tmp_path / "native") == folders.stored(made / "native")


def test_verify(made, tmp_path):
    seen, _ = run_json("verify", made / "hf", made / "native", "-o", tmp_path / "certificate.json")
    assert seen == json.loads((tmp_path / "certificate.json").read_bytes()) and seen["good"] and seen["by"] == "value"
    seen, _ = run_json("verify", made / "hf", made / "native", "--by", "bytes", code=1)
    assert not seen["good"] and len(seen["differences"]) == seen["weights"]["equal"] > 0
    stdout, _ = run("verify", made / "hf", made / "native", "--by", "bytes", code=1)
    assert "NOT the same by bytes" in stdout and seen["differences"][0]["key"] in stdout
    stdout, _ = run("verify", made / "hf", made / "native")
    assert stdout.endswith("the same\n")
    alone, _ = run_json("verify", made / "hf")
    assert alone["weights"] is None and alone["checkpoints"][0]["sha256"] == seen["checkpoints"][0]["sha256"]
    assert alone["checkpoints"][0]["sha256"] in run("verify", made / "hf")[0]


def test_verify_shows_some_differences_and_counts_the_rest(made, monkeypatch):
    scaled = sum(key.endswith("_scale_inv") for key in folders.stored(made / "hf"))
    for shown in (scaled, 4):
        monkeypatch.setattr("minimax_jax.jobs.verify_report._SHOWN", shown)
        stdout, _ = run("verify", made / "hf", made / "native", "--by", "bytes", code=1)
        assert sum("F8_E4M3 / BF16" in line for line in stdout.splitlines()) == shown
        assert (f"... and {scaled - shown} more" in stdout) == (shown < scaled)


def test_synth(tmp_path):
    seen, _ = run_json("synth", tmp_path / "tiny", "--layers", 1, "--experts", 2, "--dtype", "bf16", "--seed", 3, "-q")
    assert (
        seen["layout"] == "hf" and set(seen["by_dtype"]) == {"BF16", "F32"} and seen["config"]["num_local_experts"] == 2
    )
    synthetic.synthesize(tmp_path / "same", synthetic.config(layers=1, experts=2), seed=3, scaled="BF16")
    assert folders.files(tmp_path / "tiny") == folders.files(tmp_path / "same")
    whole, _ = run_json(
        "synth", tmp_path / "real", "--real", "--layers", 1, "--experts", 2, "--sparse", "--shard-size", "100MB"
    )
    assert whole["bytes"] == mj.inspect(tmp_path / "real").total.nbytes > 10**9 and whole["files"] > 3
    assert "hf layout" in run("synth", tmp_path / "text", "-q")[0]


def test_demo(tmp_path):
    seen, stderr = run_json("demo", tmp_path / "demo")
    assert seen["good"] and seen["by"] == "bytes" and seen["weights"]["different"] == seen["weights"]["equal"] == 0
    assert seen == json.loads((tmp_path / "demo" / "certificate.json").read_bytes())
    assert stderr.count("the same by") == 3 and "NOT" not in stderr
    assert folders.stored(tmp_path / "demo" / "hf-fp8-from-native-bf16") == folders.stored(tmp_path / "demo" / "hf-fp8")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").touch()
    _, stderr = run("demo", tmp_path / "taken", code=3)
    assert "a folder of its own" in stderr and [file.name for file in (tmp_path / "taken").iterdir()] == ["precious"]


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", ["inspect {}/no", "plan {}/no", "convert {}/no {}/out", "verify {}/no", "verify {hf} {}/no"]
)
def test_bad_input_exits_with_3_and_names_the_file(made, tmp_path, command):
    arguments = [part.format(tmp_path, tmp_path, hf=made / "hf") for part in command.split()]
    stdout, stderr = run(*arguments, code=3)
    assert stdout == "" and stderr.startswith("error: no checkpoint can be opened here\n")
    assert f"file: {tmp_path}/no\n" in stderr and "Traceback" not in stderr
    told, also = run_json(*arguments, code=3)
    assert told["error"] == "FormatError" and also == stderr
    assert told["problems"] == [
        {"what": "no checkpoint can be opened here", "file": f"{tmp_path}/no", "key": None, "expected": None}
        | {"got": "No such file or directory", "remedy": None}
    ]


def test_every_problem_is_told(made, tmp_path):
    tensors = folders.arrays(made / "hf")
    dropped = [EMBED, "model.norm.weight"]
    folders.write(tmp_path / "hf", {key: array for key, array in tensors.items() if key not in dropped}, CONFIG)
    told, stderr = run_json("convert", tmp_path / "hf", tmp_path / "out", code=3)
    assert told["error"] == "LayoutError" and [problem["key"] for problem in told["problems"]] == dropped
    assert "2 problems" in stderr and all(key in stderr for key in dropped) and not (tmp_path / "out").exists()


def test_nan_exits_with_3_and_names_the_weight(made, tmp_path):
    shutil.copytree(made / "native", tmp_path / "native")
    key = "model.layers.0.self_attn.q_proj.weight"
    folders.edit(tmp_path / "native", key, lambda weight: weight * float("nan"))
    told, stderr = run_json("convert", tmp_path / "native", tmp_path / "out", "--to", "hf-fp8", "-q", code=3)
    assert told["error"] == "NumericError" and told["problems"][0]["key"] == key and key in stderr
    assert not (tmp_path / "out").exists() and ".out.partial" in told["notes"][0]


@pytest.mark.parametrize(
    "command",
    [
        "convert {}",
        "convert {} out --to gguf",
        "convert {} out --dtype fp4",
        "convert {} out --to hf-fp8 --dtype bf16",
        "convert {} out --to maxtext --dtype fp8",
        "plan {} --dtype fp8 --to maxtext-unscanned",
        "plan {} --to orbax --shard-size 1GB",
        "convert {} out --to dcp --distributed",
        "verify {0} {0} --certificate out",
        "plan {} --dtype f32 --to hf-fp8",
        "convert {} out --max-memory much",
        "plan {} --shard-size 0",
        "plan {} --shard-size -5GB",
        "plan {} --workers 0",
        "verify {} --by colour",
        "synth out --layers 0",
        "nonsense",
        "inspect",
    ],
)
def test_usage_errors_exit_with_2_before_anything_is_done(made, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    stdout, stderr = run(*command.format(made / "hf").split(), code=2)
    assert stdout == "" and stderr.startswith("Usage: ") and "Error: " in stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["inspect {}", "plan {}", "convert {} {}-out", "verify {} {}"])
def test_an_unknown_attribute_is_refused_until_it_is_named(made, tmp_path, command):
    folder = shutil.copytree(made / "hf", tmp_path / "hf")
    folders.edit_json(folder / "config.json", colour="red", taste="sour")
    arguments = command.format(folder, folder).split()
    told, stderr = run_json(*arguments, code=3)
    assert {problem["key"] for problem in told["problems"]} == {"colour", "taste"} and "--ignore-attribute" in stderr
    told, _ = run_json(*arguments, "--ignore-attribute", "colour", code=3)
    assert [problem["key"] for problem in told["problems"]] == ["taste"]
    run_json(*arguments, "--ignore-attribute", "colour", "--ignore-attribute", "taste")


def test_names_from_files_cannot_speak_to_the_terminal(made, tmp_path):
    tensors = folders.arrays(made / "hf") | {"evil\x1b[2J\n\u202e": folders.arrays(made / "hf")["model.norm.weight"]}
    folders.write(tmp_path / "h\x1bf", tensors, CONFIG)
    _, stderr = run("inspect", tmp_path / "h\x1bf", code=3)
    assert "unexpected tensor" in stderr and "evil\\x1b[2J" in stderr
    assert "\x1b" not in stderr and "\u202e" not in stderr


def test_paths_that_are_not_text_can_be_told(made, tmp_path):
    folder = os.fsencode(tmp_path) + b"/h\xff"
    shutil.copytree(os.fsencode(made / "hf"), folder)
    done = process(sys.executable, "-m", "minimax_jax", "inspect", os.fsdecode(folder))
    assert done.returncode == 0 and "h\\udcff" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("command", ["inspect {}", "plan {}", "convert {} out", "verify {}", "diff {} {}", "report {}"])
def test_what_looks_like_a_name_of_the_hub_is_told_its_url(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    told, _ = run_json(*command.format("org/name", "org/name").split(), code=3)
    assert told["problems"][0]["remedy"] == "if it is a repository of the hub: hf://org/name"
    for other in (tmp_path / "org" / "name", "./org/name/deeper", "name"):
        assert "hf://" not in run("inspect", other, code=3)[1]
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert "hf://" not in run("inspect", "org/name", code=3)[1]


def test_every_option_that_the_library_names_is_one_of_the_command_line():
    known = {name for command in cli.commands.values() for option in command.params for name in option.opts}
    told = {argument(name).split("(")[1].rstrip(")") for name in inspect.signature(front.convert).parameters}
    told -= {"--path", "--destination", "--progress"}
    sources = [file for file in Path(mj.__file__).parent.rglob("*.py") if "cli" not in file.parts]
    named = {option for file in sources for option in re.findall(r"[\"' (](--[a-z][a-z-]+)", file.read_text())}
    assert told <= known and named - {"--help"} <= known and len(named) > 3


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,nbytes",
    [
        ("1", 1),
        ("300000000", 300_000_000),
        ("7B", 7),
        ("5GB", 5 * 10**9),
        ("5 gb", 5 * 10**9),
        ("4GiB", 4 * 2**30),
        ("1.5MiB", 3 * 2**19),
        ("2kB", 2000),
        ("2KiB", 2048),
        ("1TB", 10**12),
        ("1e3MB", 10**9),
        (42, 42),
    ],
)
def test_sizes(text, nbytes):
    assert Size().convert(text, None, None) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GB", "5XB", "5GBs", "-1", "-5GB", "0", "0.1", "nan", "inf", "1e999", "5GB5", "five"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(click.BadParameter, match="not a size"):
        Size().convert(text, None, None)
