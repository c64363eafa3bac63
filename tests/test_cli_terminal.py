"""What terminals get that pipes do not, shell completion, and what --quiet, --verbose and --help have in common."""

import os
import pty
import re
import shutil
import subprocess
import sys

import folders
import pytest
from command_line import process, run, run_json

from minimax_jax import synthetic
from minimax_jax.cli import cli
from minimax_jax.cli.completion import VARIABLE
from minimax_jax.jobs.sample import require_sample

CONFIG = synthetic.config(layers=1, experts=30)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "hf"
    synthetic.synthesize(folder, CONFIG)
    return folder


# --- colours ---------------------------------------------------------------------------------------------------------


def screen(*arguments, **environment):
    """What a terminal shows of a command: both streams."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "minimax_jax", *map(str, arguments)]
    known = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "CI")}
    environment = known | {"TERM": "xterm-256color", "JAX_PLATFORMS": "cpu"} | environment
    with subprocess.Popen(command, stdout=slave, stderr=slave, env=environment):
        os.close(slave)
        seen = b""
        while chunk := _read(master):
            seen += chunk
    os.close(master)
    return seen


def _read(master):
    try:
        return os.read(master, 65536)
    except OSError:  # the other end is closed
        return b""


@pytest.mark.parametrize(
    ("arguments", "text"), [(["inspect", "/no"], b"error: "), (["inspect", None, "--tree"], b"layers 0")]
)
def test_colours_are_for_terminals_and_no_color_takes_them_off(made, arguments, text):
    arguments = [argument or made for argument in arguments]
    coloured, plain = screen(*arguments), screen(*arguments, NO_COLOR="1")
    assert any(f"\x1b[{code}".encode() in coloured for code in ("31m", "2m", "36m"))
    assert not any(f"\x1b[{code}m".encode() in plain for code in range(30, 38)) and text in plain
    done = process(sys.executable, "-m", "minimax_jax", *arguments)
    assert "\x1b" not in done.stdout + done.stderr and text.decode() in done.stdout + done.stderr


def test_the_bar_has_rate_and_memory(made, tmp_path):
    seen = screen("convert", made, tmp_path / "out", COLUMNS="140")
    assert b"B/s" in seen and b"of memory" in seen and b"import minimax_jax as mj" in seen
    assert 0 < seen.index(b"convert") < seen.index(b"certify")


def test_plain_lines_have_rate_memory_and_time_left(made, monkeypatch):
    monkeypatch.setattr("minimax_jax.console._LINE_SECONDS", 0)
    _, stderr = run("verify", made)
    share, rate, memory, left = stderr.splitlines()[-1].removeprefix("verify: ").split(", ")
    assert (share, left) == ("100%", "0 s left") and memory.endswith("B of memory")
    assert re.fullmatch(r"[1-9][\d.]* [kMG]?B/s", rate)


# --- completion ------------------------------------------------------------------------------------------------------


def completed(words):
    """What bash would be offered for the last of `words`."""
    environment = os.environ | {
        VARIABLE: "bash_complete",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    code = "from minimax_jax.cli import main; main()"
    script = f"import sys; sys.argv[0] = 'minimax-jax'; {code}"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return {tuple(line.split(",", 1)) for line in done.stdout.splitlines()}


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["minimax-jax", "ins"], {("plain", "inspect")}),
        (["minimax-jax", "convert", "a", "b", "--to", "hf"], {("plain", "hf"), ("plain", "hf-fp8")}),
        (["minimax-jax", "convert", "a", "b", "--rest"], {("plain", "--restart")}),
        (["minimax-jax", "inspect", "some/pa"], {("file", "some/pa")}),
        (["minimax-jax", "diff", "a", "b", "--rank", "c"], {("plain", "cosine")}),
    ],
)
def test_commands_options_choices_and_paths_are_completed(words, offered):
    assert offered <= completed(words) and len(completed(words)) <= len(offered) + 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_asks_this_program(shell):
    script = run("completion", shell)[0]
    assert f"{VARIABLE}={shell}_complete" in script and "minimax-jax" in script
    assert run_json("completion", shell)[0] == {"shell": shell, "script": script.rstrip("\n")}
    by_variable = process(sys.executable, "-c", f"import os; os.environ['{VARIABLE}'] = '{shell}_source'; import sys; "
                          "sys.argv[0] = 'minimax-jax'; from minimax_jax.cli import main; main()")  # fmt: skip
    assert by_variable.stdout.strip() == script.strip()


def test_bash_itself_takes_the_script():
    bash = shutil.which("bash")
    assert bash is not None
    script = run("completion", "bash")[0] + "\ncomplete -p minimax-jax\n"
    done = subprocess.run([bash, "-c", script], capture_output=True, text=True, check=True)
    assert "_minimax_jax_completion" in done.stdout and done.stderr == ""


# --- what all commands have ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_has_examples_and_the_common_options(command):
    text = run(command, "--help")[0]
    assert all(option in text for option in ("--json", "-q, --quiet", "-v, --verbose", "-h, --help"))
    examples = text.partition("\n  Examples:\n")[2].splitlines()
    assert examples and all(line.startswith("    ") for line in examples)
    assert any(f"minimax-jax {command}" in line for line in examples)


@pytest.mark.parametrize("command", sorted(set(cli.commands) - {"completion"}))
def test_the_options_of_the_examples_exist(command):
    known = {name for parameter in cli.commands[command].params for name in parameter.opts}
    examples = run(command, "--help")[0].partition("\n  Examples:\n")[2]
    used = {word for line in examples.splitlines() for word in line.split() if word.startswith("-")}
    assert used <= known


def test_verbose_tells_every_problem_every_row_and_where_an_error_arose(made, tmp_path):
    arrays = folders.arrays(made)
    native = {key: array for key, array in arrays.items() if "experts" not in key}
    for expert in range(30):
        for part in ("w1", "w2", "w3"):
            key = f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight"
            native |= {key: arrays[key][: expert + 1], key + "_scale_inv": arrays[key + "_scale_inv"]}
    folders.write(tmp_path / "broken", native, CONFIG)
    _, short = run("inspect", tmp_path / "broken", code=3)
    _, whole = run("inspect", tmp_path / "broken", "-v", code=3)
    assert "more" in short and "Traceback" not in short
    assert "Traceback" in whole and "LayoutError" in whole and whole.count("\n  ") > short.count("\n  ")


def test_verbose_shows_all_differences(made, tmp_path):
    other = tmp_path / "other"
    synthetic.synthesize(other, CONFIG, seed=1)
    for command in ("verify", "diff"):
        short, whole = (run(command, made, other, *more, code=1)[0] for more in ([], ["-v"]))
        assert "more" in short and "... and" not in whole and len(whole.splitlines()) > len(short.splitlines()) + 50


def test_a_sample_that_is_none_is_a_usage_error(made):
    require_sample("5%")
    assert "--sample" in run("diff", made, made, "--sample", "5%%", code=2)[1]
