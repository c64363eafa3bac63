"""Several processes that share one conversion, under jax.distributed on this machine."""

import shutil
import signal
import subprocess
import sys

import folders
import members
import pytest

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.io.folder import workshop_of
from minimax_jax.io.journal import journals

MEMBER = """
import os, sys
from minimax_jax import cli
from minimax_jax.errors import FormatError, Problem
from minimax_jax.io import points
moment, die_after = sys.argv.pop(1), int(sys.argv.pop(1))
seen = []
def die(name):
    if name == moment:
        seen.append(name)
        if len(seen) == die_after:
            os.kill(os.getpid(), 9)
        if len(seen) == -die_after - 1:
            raise FormatError(Problem(what="a source that fails"))
points.on_reach = die
cli.main()
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "hf"
    synthetic.synthesize(folder, synthetic.config(layers=2, experts=6), shard_bytes=50_000)
    return folder


def together(count, *command, die_after=None, moment="after the journal"):
    """Run a command in `count` processes that know of each other; the statuses they end with and what they said."""
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{members.free_port()}", "JAX_NUM_PROCESSES": str(count)}
    deaths = die_after or {}
    group = [
        members.start("-c", MEMBER, moment, deaths.get(index, -1), *command, **shared, JAX_PROCESS_ID=str(index))
        for index in range(count)
    ]
    if any(count > 0 for count in deaths.values()):  # until the coordinator misses its heartbeat
        group[next(iter(deaths))].wait(members.SECONDS)
        for member in group:
            member.kill()
    return members.finish(group)


def alone(source, out):
    """The files that one process leaves in the same place, and the digest that it reports."""
    report = mj.convert(source, out, shard_bytes=300_000, certify=True)
    files = folders.files(out)
    shutil.rmtree(out)
    return files, report.certified


def test_processes_share_a_conversion_and_end_in_the_same_bytes(source, tmp_path):
    files, certified = alone(source, tmp_path / "out")
    command = ("convert", source, tmp_path / "out", "--distributed", "--shard-size", "300KB", "--json")
    statuses, said = together(3, *command)
    assert statuses == [0, 0, 0], said
    assert all(f'"certified": "{certified}"' in stdout for stdout, _ in said)
    assert folders.files(tmp_path / "out") == files and "certificate.json" in files
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_loss_of_a_process_is_survived_by_the_same_command(source, tmp_path):
    files, _ = alone(source, tmp_path / "out")
    command = ("convert", source, tmp_path / "out", "--distributed", "--shard-size", "300KB", "--json")
    statuses, said = together(2, *command, die_after={1: 5})
    assert statuses[1] == -signal.SIGKILL, said
    assert not (tmp_path / "out").exists() and len(journals(workshop_of(tmp_path / "out"))) == 2
    statuses, said = together(2, *command, die_after={0: 5}, moment="in the certification")
    assert statuses[0] == -signal.SIGKILL and not (tmp_path / "out").exists(), said
    statuses, said = together(2, *command)
    assert statuses == [0, 0], said
    assert folders.files(tmp_path / "out") == files


@pytest.mark.parametrize("which", [0, 1])
def test_an_error_in_one_process_ends_all_of_them_in_words(source, tmp_path, which):
    command = ("convert", source, tmp_path / "out", "--distributed", "--shard-size", "300KB", "--json")
    statuses, said = together(2, *command, die_after={which: -5})
    assert statuses == [3, 3], said  # who waits in vain is ended by jax, with another status
    assert "a source that fails" in said[which][1] and "another process of the team failed" in said[1 - which][1]
    assert not (tmp_path / "out").exists() and journals(workshop_of(tmp_path / "out"))
    mj.convert(source, tmp_path / "out", shard_bytes=300_000)  # one process alone goes on with the work of two
    assert mj.verify(source, tmp_path / "out").good


def test_a_destination_that_is_taken_ends_all_of_them(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    statuses, said = together(2, "convert", source, tmp_path / "out", "--distributed")
    assert statuses == [3, 3] and "destination exists" in said[0][1] and "Traceback" not in said[1][1]


def test_without_a_group_it_is_refused_in_words(source, tmp_path, monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run(
        [sys.executable, "-m", "minimax_jax", "convert", source, tmp_path / "out", "--distributed"],
        capture_output=True,
        text=True,
        timeout=members.SECONDS,
    )
    assert done.returncode == 3 and "JAX_COORDINATOR_ADDRESS" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
