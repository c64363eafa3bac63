"""The script that kills, breaks and corrupts: its short form is green, and it can fail."""

import sys
from pathlib import Path

from command_line import process

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SABOTAGED = """
import sys
sys.path.insert(0, {benchmarks!r})
import reliability
from trials import inputs
inputs.REFUSED.clear()
inputs.REFUSED["nothing wrong at all"] = lambda folder: None
inputs.REFUSED["a crash"] = lambda folder: (folder / "config.json").write_text("{{}}") and None
plan = inputs.front.plan
inputs.front.plan = lambda folder: 1 / 0 if (folder / "config.json").read_text() == "{{}}" else plan(folder)
sys.exit(reliability.main(["--quick", "--only", "inputs"]))
"""
WRONG = """
import sys
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
from minimax_jax.io import points
from trials import kills
from trials.jobs import Job
folder = Path({folder!r})
(folder / ".again.partial").mkdir()
(folder / ".again.partial" / ".journal.0").write_text("stamp\\nunit\\n")
def run(out):
    out.mkdir(exist_ok=True)
    (out / "model").write_bytes(b"half" if out.name == "bytes" else b"whole")
    points.reach(kills.PIECE_DONE)
job = Job(name="x", run=run, expected={{"model": b"whole"}}, seconds=1, moments={{kills.PIECE_DONE: 1}})
for name in ("bytes", "again", "right"):
    wrong = kills._goes_on(job, folder / name)
    print(wrong or "nothing", kills._outcome("x", [(1, wrong)]).good)
"""


def test_the_short_form_is_green_and_writes_the_note(tmp_path):
    ended = process(sys.executable, BENCHMARKS / "reliability.py", "--quick", "--output", tmp_path / "note.md")
    assert ended.returncode == 0, ended.stderr
    note = (tmp_path / "note.md").read_text()
    assert note.count("| ok |") > 80 and "BAD" not in note and "SIGKILL before the rename" in note
    assert "| SIGKILL in the certification |" in note


def test_what_is_let_through_and_what_crashes_make_it_fail():
    ended = process(sys.executable, "-c", SABOTAGED.format(benchmarks=str(BENCHMARKS)))
    assert ended.returncode == 1
    assert "BAD     1 nothing wrong at all: let through" in ended.stderr
    assert "BAD     1 a crash: a crash: ZeroDivisionError" in ended.stderr


def test_other_bytes_and_work_done_twice_after_a_kill_would_be_seen(tmp_path):
    script = WRONG.format(benchmarks=str(BENCHMARKS), folder=str(tmp_path))
    ended = process(sys.executable, "-c", script)
    told = ["other bytes False", "1 pieces done where 0 were left False", "nothing True"]
    assert ended.stdout.splitlines() == told, ended.stderr
