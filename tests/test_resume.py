"""Conversions that are killed: the same job goes on, redoes little, and ends in the same bytes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import folders
import pytest
from resume_cases import Killed, count_units, dies_at

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import JobError
from minimax_jax.io import points
from minimax_jax.io.folder import workshop_of
from minimax_jax.io.journal import journals

KILLED = 9
RUN_UNTIL = """
import os, sys
import minimax_jax as mj
from minimax_jax.io import points
source, out, to, dtype, name, count = sys.argv[1:]
left = [int(count)]
def kill(reached):
    if reached == name or name == "any":
        left[0] -= 1
        if left[0] == 0:
            os._exit(9)
points.on_reach = kill
mj.convert(source, out, to=to, dtype=dtype, shard_bytes=300_000)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "hf"
    synthetic.synthesize(folder, synthetic.config(layers=2, experts=6), shard_bytes=50_000)
    return folder


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The files of an undisturbed run, by target."""
    made = tmp_path_factory.mktemp("whole")
    options = {"native": "bf16", "hf": "f32", "hf-fp8": "fp8"}
    for to, dtype in options.items():
        mj.convert(source, made / to, to=to, dtype=dtype, shard_bytes=300_000)
    return {to: folders.files(made / to) for to in options}


def convert(source, out, **options):
    return mj.convert(source, out, to="native", dtype="bf16", shard_bytes=300_000, **options)


def stop(source, out, monkeypatch, count, name=None, **options):
    """Run a conversion that dies at a moment, with whatever it had open left to the next one."""
    with monkeypatch.context() as patch:
        dies_at(patch, count, name)
        with pytest.raises(Killed):
            convert(source, out, **options)


def test_a_kill_at_every_named_moment_is_survived(source, whole, tmp_path):
    out = tmp_path / "out"
    once = ("before a header", "before the index", "before the rename")
    for name, count in [
        ("before a write", 5),
        ("before the journal", 9),
        ("after the journal", 3),
        *((n, 1) for n in once),
    ]:
        command = [sys.executable, "-c", RUN_UNTIL, source, out, "native", "bf16", name, str(count)]
        assert subprocess.run(command).returncode == KILLED, name
        assert not out.exists()
    command = [sys.executable, "-c", RUN_UNTIL, source, out, "native", "bf16", "never", "1"]
    assert subprocess.run(command).returncode == 0
    assert folders.files(out) == whole["native"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_right_after_the_rename_leaves_a_whole_destination(source, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", RUN_UNTIL, source, out, "native", "bf16", "after the rename", "1"]
    assert subprocess.run(command).returncode == KILLED
    assert mj.verify(source, out).good
    shutil.rmtree(out)
    mj.convert(source, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and mj.verify(source, out).good


@pytest.mark.parametrize(
    ("moment", "count"), [("in the certification", 1), ("in the certification", 20), ("before the rename", 1)]
)
def test_a_kill_around_the_certificate_is_survived(source, whole, tmp_path, monkeypatch, moment, count):
    out = tmp_path / "out"
    convert(source, out, certify=True)
    undisturbed = folders.files(shutil.move(out, tmp_path / "undisturbed"))
    assert "certificate.json" in undisturbed
    stop(source, out, monkeypatch, count, moment, certify=True)
    assert not out.exists()
    made = count_units(monkeypatch)
    convert(source, out, certify=True)
    assert made == [] and folders.files(out) == undisturbed
    assert mj.verify(out, certificate=out / "certificate.json").good


def test_a_certificate_that_a_killed_run_left_is_not_that_of_one_that_makes_none(source, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stop(source, out, monkeypatch, 1, "before the rename", certify=True)
    assert (workshop_of(out) / "out" / "certificate.json").exists()
    convert(source, out)
    assert folders.files(out) == whole["native"]


@pytest.mark.parametrize("count", [1, 7, 38])
def test_only_what_was_not_done_is_done(source, whole, tmp_path, monkeypatch, count):
    out, total = tmp_path / "out", len(mj.plan(source).units)
    command = [sys.executable, "-c", RUN_UNTIL, source, out, "native", "bf16", "after the journal", str(count)]
    assert subprocess.run(command).returncode == KILLED
    made = count_units(monkeypatch)
    convert(source, out)
    assert total - count - 1 <= len(made) <= total - count  # the other thread may have noted one more
    assert folders.files(out) == whole["native"]


@pytest.mark.parametrize("options", [{"workers": 3}, {"max_memory_bytes": 300 * 2**20}, {"check": "all"}])
def test_threads_memory_and_checks_may_change(source, whole, tmp_path, monkeypatch, options):
    stop(source, tmp_path / "out", monkeypatch, 20, "after the journal")
    convert(source, tmp_path / "out", **options)
    assert folders.files(tmp_path / "out") == whole["native"]


def test_work_that_is_not_what_it_was_is_done_again(source, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stop(source, out, monkeypatch, 30, "before the journal", workers=1)  # so that 29 are noted, whatever else is done
    for file in (workshop_of(out) / "out").glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[4096::997] = b"\xa5" * len(content[4096::997])
        file.write_bytes(content)
    made = count_units(monkeypatch)
    convert(source, out)
    assert len(made) > len(mj.plan(source).units) - 29
    assert folders.files(out) == whole["native"]


def test_files_that_are_gone_are_made_again(source, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stop(source, out, monkeypatch, 30, "after the journal")
    shutil.rmtree(workshop_of(out) / "out")
    convert(source, out)
    assert folders.files(out) == whole["native"]


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"\xff\x00", b'{"unit": 1}', b"[]", b'{"unit": "x", "xxh3_128": "y"}', b"[" * 9999]
)
def test_a_damaged_journal_costs_work_and_no_more(source, whole, tmp_path, monkeypatch, damage):
    out = tmp_path / "out"
    stop(source, out, monkeypatch, 30, "after the journal")
    (journal,) = journals(workshop_of(out))
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[5:9] = [damage + b"\n"]
    journal.write_bytes(b"".join(lines)[:-7])  # and the last line torn
    convert(source, out)
    assert folders.files(out) == whole["native"]


def test_the_work_of_another_job_is_refused_and_can_be_thrown_away(source, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stop(source, out, monkeypatch, 30, "after the journal")
    with pytest.raises(JobError, match="target differs") as caught:
        mj.convert(source, out, to="native", dtype="f32", shard_bytes=300_000)
    assert "--restart" in caught.value.problems[0].remedy
    with pytest.raises(JobError, match="division into files differs"):
        mj.convert(source, out, to="native", dtype="bf16", shard_bytes=200_000)
    convert(source, out)
    assert folders.files(out) == whole["native"]
    stop(source, tmp_path / "again", monkeypatch, 30, "after the journal")
    mj.convert(source, tmp_path / "again", to="native", dtype="f32", restart=True)
    assert mj.inspect(tmp_path / "again").layout == "native" and mj.verify(source, tmp_path / "again").good


def test_a_source_that_has_changed_is_refused(source, tmp_path, monkeypatch):
    shutil.copytree(source, tmp_path / "hf")
    out, victim = tmp_path / "out", sorted((tmp_path / "hf").glob("*.safetensors"))[1]
    stop(tmp_path / "hf", out, monkeypatch, 30, "after the journal")
    victim.write_bytes(victim.read_bytes())
    with pytest.raises(JobError, match=r"source file .* differs") as caught:
        convert(tmp_path / "hf", out)
    assert [victim.name in problem.what for problem in caught.value.problems] == [True]


def test_a_source_whose_config_was_corrected_is_refused(source, tmp_path, monkeypatch):
    shutil.copytree(source, tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    stop(tmp_path / "hf", tmp_path / "out", monkeypatch, 30, "after the journal")
    changed = json.loads(config.read_text())
    changed["rms_norm_eps"] = 0.5
    config.write_text(json.dumps(changed))
    with pytest.raises(JobError, match="config of the source differs"):
        convert(tmp_path / "hf", tmp_path / "out")


def test_a_refused_job_leaves_nothing_in_the_work_of_another(source, whole, tmp_path, monkeypatch):
    shutil.copytree(source, tmp_path / "hf")
    stop(source, tmp_path / "out", monkeypatch, 30, "after the journal")
    (tmp_path / "hf" / "chat_template.jinja").write_text("of another job")
    with pytest.raises(JobError, match="another job"):
        convert(tmp_path / "hf", tmp_path / "out")
    convert(source, tmp_path / "out")
    assert folders.files(tmp_path / "out") == whole["native"]


def test_work_is_not_thrown_away_for_a_job_of_another_kind(source, whole, tmp_path, monkeypatch):
    stop(source, tmp_path / "out", monkeypatch, 30, "after the journal")
    with pytest.raises(JobError, match="unfinished work of another job"):
        synthetic.synthesize(tmp_path / "out", synthetic.config())
    convert(source, tmp_path / "out")
    assert folders.files(tmp_path / "out") == whole["native"]


def test_another_version_is_refused(source, tmp_path, monkeypatch):
    stop(source, tmp_path / "out", monkeypatch, 30, "after the journal")
    (journal,) = journals(workshop_of(tmp_path / "out"))
    stamp, rest = journal.read_text().split("\n", 1)
    journal.write_text(json.dumps(json.loads(stamp) | {"version": "0.0.1"}) + "\n" + rest)
    with pytest.raises(JobError, match="version differs") as caught:
        convert(source, tmp_path / "out")
    assert caught.value.problems[0].got == "0.0.1"


def test_what_the_disk_lost_is_found_before_the_destination_appears(source, tmp_path, monkeypatch):
    def damage(reached):
        if reached == "before the journal":
            file = next(Path(workshop_of(tmp_path / "out") / "out").glob("*.safetensors"))
            with file.open("r+b") as stream:
                stream.seek(-2000, 2)
                stream.write(b"\xa5" * 16)

    monkeypatch.setattr(points, "on_reach", damage)
    with pytest.raises(JobError, match="disk does not hold what was written"):
        convert(source, tmp_path / "out", check="all")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    convert(source, tmp_path / "out", check="all")
    assert mj.verify(source, tmp_path / "out").good


@pytest.mark.parametrize("to", ["hf", "hf-fp8"])
def test_other_targets_go_on_as_well(source, whole, tmp_path, monkeypatch, to):
    options = {"to": to, "dtype": {"hf": "f32", "hf-fp8": "fp8"}[to], "shard_bytes": 300_000}
    with monkeypatch.context() as patch:
        dies_at(patch, 25, "after the journal")
        with pytest.raises(Killed):
            mj.convert(source, tmp_path / "out", **options)
    report = mj.convert(source, tmp_path / "out", **options)
    assert folders.files(tmp_path / "out") == whole[to]
    assert report.written_bytes == sum(len(data) for name, data in whole[to].items() if name.endswith(".safetensors"))


def test_the_report_counts_scales_of_both_runs(source, tmp_path, monkeypatch):
    mj.convert(source, tmp_path / "native")
    undisturbed = mj.convert(tmp_path / "native", tmp_path / "undisturbed", to="hf-fp8")
    with monkeypatch.context() as patch:
        dies_at(patch, 25, "after the journal")
        with pytest.raises(Killed):
            mj.convert(tmp_path / "native", tmp_path / "out", to="hf-fp8")
    resumed = mj.convert(tmp_path / "native", tmp_path / "out", to="hf-fp8")
    assert undisturbed.kept_scales == resumed.kept_scales > 0 and resumed.fresh_scales == ()
