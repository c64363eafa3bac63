"""Conversions to torch's DCP that are killed: where items lie, and what torch and the disk may do meanwhile."""

import errno
import json
import os

import pytest
from resume_cases import convert, goes_on, in_workshop, make_small, stop, streamed_source, undisturbed

from minimax_jax.errors import JobError
from minimax_jax.io.folder import workshop_of
from minimax_jax.io.journal import journals
from torch_bridge import chunks


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return streamed_source(tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    return undisturbed(source, tmp_path_factory.mktemp("whole"), ["dcp"])


def noted(out):
    (journal,) = journals(workshop_of(out))
    return journal, journal.read_text().splitlines(keepends=True)


def test_items_that_lie_elsewhere_than_their_turn_is_are_written_again(source, whole, tmp_path, monkeypatch):
    """A record that is true of the bytes, but not of where they belong, is not believed."""
    out, total = tmp_path / "out", whole["dcp"][1]
    stop(source, out, monkeypatch, "dcp", total)
    journal, lines = noted(out)
    moved = json.loads(lines[5])
    (file, offset, length), *rest = moved["items"]
    content = in_workshop(out, file)[0].read_bytes()[offset : offset + length]
    last = in_workshop(out, "*.distcp")[-1]
    with in_workshop(out, file)[0].open("ab") as stream:
        moved["items"] = [[file, stream.tell(), length], *rest]
        stream.write(content)
    journal.write_text("".join([*lines[:5], json.dumps(moved) + "\n", *lines[6:]]))
    last.write_bytes(last.read_bytes() + b"more than belongs there")
    assert goes_on(source, out, monkeypatch, "dcp", whole) == 1


@pytest.mark.parametrize(
    "items", [None, 7, [], [["../../x", 0, 1]], [["__0_0_0.distcp", -1, 8]], [["__0_0_0.distcp", 0, 2**60]], [[1]]]
)
def test_a_record_that_makes_no_sense_costs_its_unit(source, whole, tmp_path, monkeypatch, items):
    out, total = tmp_path / "out", whole["dcp"][1]
    stop(source, out, monkeypatch, "dcp", total)
    journal, lines = noted(out)
    journal.write_text("".join([lines[0], json.dumps(json.loads(lines[1]) | {"items": items}) + "\n", *lines[2:]]))
    assert goes_on(source, out, monkeypatch, "dcp", whole) == 1


def test_another_torch_and_other_units_are_another_job(source, tmp_path, monkeypatch):
    stop(source, tmp_path / "out", monkeypatch, "dcp", 5)
    with monkeypatch.context() as patch:
        patch.setattr("torch.__version__", "1.0")
        with pytest.raises(JobError, match="its torch differs"):
            convert(source, tmp_path / "out", "dcp")
    monkeypatch.setattr(chunks, "_UNIT_BYTES", 50_000)
    with pytest.raises(JobError, match="division into files differs"):
        convert(source, tmp_path / "out", "dcp")


def test_a_disk_that_fails_is_an_error_and_no_more(source, whole, tmp_path, monkeypatch):
    """torch is in C++ when it writes."""
    real, left = os.pwrite, [40]

    def full(fd, data, offset):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(JobError, match="file cannot be written"):
            convert(source, tmp_path / "out", "dcp")
    assert not (tmp_path / "out").exists()
    assert goes_on(source, tmp_path / "out", monkeypatch, "dcp", whole) < whole["dcp"][1]
