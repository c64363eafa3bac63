"""A conversion that a team shares, threads in the place of its processes: an error of any of them, at any moment."""

import functools
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import folders
import pytest

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import FormatError, Problem
from minimax_jax.io import points
from minimax_jax.jobs import team as teams
from minimax_jax.jobs.certificate import certificate
from minimax_jax.jobs.run import Report
from minimax_jax.jobs.source import open_source
from minimax_jax.jobs.team import PeerFailed, Team
from minimax_jax.jobs.verify import verify

COUNT = 3
here = threading.local()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "hf"
    synthetic.synthesize(folder, synthetic.config(layers=2, experts=6), shard_bytes=50_000)
    return folder


class Meeting:
    """Where threads wait for each other; one that waits for another in vain is not kept for ever."""

    def __init__(self):
        self._barrier, self._told = threading.Barrier(COUNT, timeout=60), [b""] * COUNT

    def gather(self, index, told):
        self._told[index] = told
        self._barrier.wait()
        found = list(self._told)
        self._barrier.wait()
        return None if None in found else found


def in_a_team(do):
    """What `do` of a team returns, or raises, in each of its members, which finds itself in `here`."""
    meeting = Meeting()

    def member(index):
        here.team = Team(index=index, count=COUNT, gather=functools.partial(meeting.gather, index))
        return do(here.team)

    with ThreadPoolExecutor(COUNT) as pool:
        futures = [pool.submit(member, index) for index in range(COUNT)]
    return [future.exception() or future.result() for future in futures]


@pytest.fixture
def convert(source, tmp_path, monkeypatch):
    """Converts, in a team, with a certificate: the reports or errors of all; and what each listener heard."""
    monkeypatch.setattr(teams, "distributed_team", lambda: here.team)

    def convert():
        heard = [[] for _ in range(COUNT)]
        options = {"shard_bytes": 300_000, "certify": True, "distributed": True}
        ended = in_a_team(
            lambda team: mj.convert(source, tmp_path / "out", **options, progress=heard[team.index].append)
        )
        return ended, heard

    return convert


def failing(monkeypatch, which, moment, count):
    """Have one member of a team fail when it reaches a named moment so often, on its own thread."""
    seen = []

    def fail(name):
        if name == moment and hasattr(here, "team") and here.team.index == which:
            seen.append(name)
            if len(seen) == count:
                raise FormatError(Problem(what="a source that fails"))

    monkeypatch.setattr(points, "on_reach", fail)


@pytest.mark.parametrize(
    ("which", "moment", "count"),
    [
        (0, "in the certification", 2),
        (2, "in the certification", 2),
        (0, "before a header", 1),
        (0, "before the rename", 1),
    ],
)
def test_an_error_around_the_certificate_ends_all_and_the_same_again_ends_in_the_same_bytes(
    source, convert, tmp_path, monkeypatch, which, moment, count
):
    alone = mj.convert(source, tmp_path / "out", shard_bytes=300_000, certify=True)
    files = folders.files(shutil.move(tmp_path / "out", tmp_path / "alone"))
    with monkeypatch.context() as patch:
        failing(patch, which, moment, count)
        ended, _ = convert()
    assert [type(error) for error in ended] == [FormatError if i == which else PeerFailed for i in range(COUNT)]
    assert not (tmp_path / "out").exists()
    ended, heard = convert()
    assert [report.certified for report in ended] == [alone.certified] * COUNT
    assert folders.files(tmp_path / "out") == files
    last = [moments[-1] for moments in heard]
    assert {moment.step for moment in last} == {"certify"}
    assert all(0 < moment.done_bytes == moment.total_bytes for moment in last)
    assert sum(moment.total_bytes for moment in last) == mj.inspect(tmp_path / "out").total.nbytes


def test_who_is_stopped_when_all_is_done_leaves_nobody_waiting(convert, tmp_path, monkeypatch):
    gather = Meeting.gather

    def stopped(self, index, told):
        found = gather(self, index, told)
        if index == 2 and (tmp_path / "out").exists():
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Meeting, "gather", stopped)
    ended, _ = convert()
    assert [type(end) for end in ended] == [Report, Report, KeyboardInterrupt]


def test_who_is_stopped_while_it_is_told_of_a_failure_tells_the_others_nothing_more(tmp_path):
    told = []

    def gather(text):
        told.append(text)
        signal.raise_signal(signal.SIGINT)

    team = Team(count=2, gather=gather)
    with pytest.raises(PeerFailed), team.standing_together(tmp_path):
        team.wait()
    assert told == [b""]


def test_a_team_sees_of_two_checkpoints_what_one_alone_sees(source, tmp_path):
    other = shutil.copytree(source, tmp_path / "other")
    folders.edit(other, "lm_head.weight", lambda weight: weight * float("nan"))
    sources = [open_source(source), open_source(other)]
    alone, *seen = verify(*sources), *in_a_team(lambda team: verify(*sources, team=team))
    assert not alone.good and [certificate(one) for one in seen] == [certificate(alone)] * COUNT
