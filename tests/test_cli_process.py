"""The command line as a process: progress, streams, exit codes, interrupts, what it imports."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import folders
import pytest
from command_line import process, run, run_json

from minimax_jax.cli import cli

EMBED = "model.embed_tokens.weight"


# --- progress --------------------------------------------------------------------------------------------------------


def test_plain_progress_lines_go_to_stderr(made, tmp_path, monkeypatch):
    monkeypatch.setattr("minimax_jax.console._LINE_SECONDS", 0)
    commands = {
        "convert": ["convert", made / "hf", tmp_path / "out"],
        "verify": ["verify", made / "hf"],
        "synth": ["synth", tmp_path / "tiny"],
    }
    for what, command in commands.items():
        _, stderr = run_json(*command)
        steps = [what, "certify"] if what == "convert" else [what]
        each = [[line for line in stderr.splitlines() if line.startswith(f"{step}: ")] for step in steps]
        assert stderr.splitlines() == [line for lines in each for line in lines]
        assert all(lines and "\r" not in "".join(lines) and all("B/s, " in line for line in lines) for lines in each)
        for step, lines in zip(steps, each, strict=True):
            assert lines[-1].startswith(f"{step}: 100%, ") and lines[-1].endswith(" 0 s left")


def test_short_jobs_and_quiet_ones_say_nothing(made, tmp_path, monkeypatch):
    assert run("verify", made / "hf")[1] == ""
    monkeypatch.setattr("minimax_jax.console._LINE_SECONDS", 0)
    assert run("verify", made / "hf", "--quiet")[1] == ""


def test_a_terminal_gets_a_bar_and_a_pipe_the_json(made, tmp_path):
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "minimax_jax", "convert", str(made / "hf"), str(tmp_path / "out"), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, env=os.environ | {"TERM": "xterm"}) as child:
        os.close(slave)
        screen = b""
        while chunk := read_terminal(master):  # first: a terminal that nobody reads stops who writes to it
            screen += chunk
        stdout = child.stdout.read()
    os.close(master)
    assert child.returncode == 0 and json.loads(stdout)["destination"] == str(tmp_path / "out")
    assert b"convert" in screen and "━".encode() in screen and b"/s" in screen


def read_terminal(master):
    try:
        return os.read(master, 65536)
    except OSError:  # the other end is closed
        return b""


# --- the process -----------------------------------------------------------------------------------------------------


def test_streams_and_exit_codes_of_the_real_thing(made, tmp_path):
    program = Path(sys.executable).with_name("minimax-jax")
    good = process(program, "inspect", made / "hf", "--json")
    assert good.returncode == 0 and json.loads(good.stdout)["layout"] == "hf" and good.stderr == ""
    bad = process(sys.executable, "-m", "minimax_jax", "plan", tmp_path, "--json")
    assert bad.returncode == 3 and json.loads(bad.stdout)["error"] == "FormatError"
    assert bad.stderr.startswith("error: no safetensors file here\n") and "Traceback" not in bad.stderr
    usage = process(sys.executable, "-m", "minimax_jax", "verify")
    assert usage.returncode == 2 and usage.stdout == "" and usage.stderr.startswith("Usage: ")
    shutil.copytree(made / "hf", tmp_path / "other")
    folders.flip_bit(tmp_path / "other", EMBED, 5)
    different = process(sys.executable, "-m", "minimax_jax", "verify", made / "hf", tmp_path / "other")
    assert different.returncode == 1 and EMBED in different.stdout and different.stderr == ""


@pytest.mark.parametrize("stop,status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_exits_with_its_status_and_the_same_command_goes_on(made, tmp_path, stop, status):
    code = (
        "import os, signal\n"
        "from minimax_jax import cli\n"
        "from minimax_jax.io import points\n"
        "seen = []\n"
        "def stop(name):\n"
        "    seen.append(name)\n"
        f"    len(seen) == 30 and os.kill(os.getpid(), {int(stop)})\n"
        "points.on_reach = stop\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background has it ignored
        "cli.main()\n"
    )
    command = ("convert", made / "hf", tmp_path / "out")
    done = process(sys.executable, "-c", code, *command, "--json")
    assert done.returncode == status and json.loads(done.stdout)["error"] == "Interrupted"
    assert done.stderr.startswith("interrupted\nwhat was done is kept in ") and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    run(*command, "--quiet")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    run("verify", made / "hf", tmp_path / "out", "--quiet")


def test_help_and_version_answer_without_jax(made):
    code = (
        "import sys; from minimax_jax.cli import cli; "
        "cli(sys.argv[1:], standalone_mode=False); print('jax' in sys.modules)"
    )
    for arguments in (["--help"], ["convert", "-h"], ["--version"], ["inspect", made / "hf"], ["plan", made / "hf"]):
        done = process(sys.executable, "-c", code, *arguments)
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False" and done.stderr == ""
    control = process(sys.executable, "-c", code, "verify", made / "hf")
    assert control.stdout.splitlines()[-1] == "True"


def test_help_keeps_its_examples_on_lines_of_their_own():
    assert "\n    minimax-jax convert m2-native m2-back --to hf-fp8 " in run("convert", "--help")[0]
    assert "\n    minimax-jax synth whole --real --sparse " in run("synth", "--help")[0]
    for command in cli.commands:
        assert "--json" in run(command, "--help")[0] and "\\" not in run(command, "--help")[0]


@pytest.mark.parametrize(
    "command", [["convert"], ["plan", "x", "--bad"], ["nonsense"], ["verify", "x", "--by", "taste"], ["--bad", "plan"]]
)
def test_a_usage_error_is_one_json_document_where_that_is_asked_for(command):
    said, told = run_json(*command, code=2)
    assert said["error"] and said["problems"][0]["what"] and "Error: " in told
    assert run(*command, code=2)[0] == ""


def test_a_reader_that_is_gone_is_no_difference(made):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "minimax_jax", "plan", made / "hf"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("option", [["--distributed"], ["--shard-size", "1GB"]])
@pytest.mark.parametrize("to", ["orbax", "dcp"])
def test_what_a_target_does_not_know_is_refused(made, tmp_path, to, option):
    told = run("convert", made / "hf", tmp_path / "out", "--to", to, *option, code=2)[1]
    assert f"means nothing to the target {to}" in told and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["native", "orbax"])
def test_a_destination_inside_of_the_source_is_refused(made, to):
    assert "inside of the source" in run("convert", made / "hf", made / "hf" / "sub" / "out", "--to", to, code=3)[1]
    assert not (made / "hf" / "sub").exists()
