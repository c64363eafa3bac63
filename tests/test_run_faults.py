"""Conversions that fail: one clear error, and nothing left that could be taken for a checkpoint."""

import errno
import itertools
import os
import shutil
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import folders
import pytest
import torch

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import FormatError, JobError, NumericError
from minimax_jax.jobs.run import run

CONFIG = synthetic.config(layers=1, experts=3)
MOE = "model.layers.0.block_sparse_moe.experts."
EXPERTS = "model.layers.0.mlp.experts."


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "hf"
    synthetic.synthesize(folder, CONFIG, shard_bytes=50_000)
    return folder


@pytest.fixture
def out(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work" / "out"


@pytest.fixture(autouse=True)
def nothing_stays_open():
    def descriptors():
        return sorted(str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())

    before = descriptors()
    yield
    assert [path for path in descriptors() if path not in before] == []
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("convert")]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- the destination -------------------------------------------------------------------------------------------------


def test_a_destination_that_is_taken_is_refused_untouched(source, out):
    out.mkdir()
    (out / "precious").write_text("1")
    with pytest.raises(JobError, match="destination exists") as caught:
        mj.convert(source, out)
    assert caught.value.problems[0].file == str(out) and folders.files(out) == {"precious": b"1"}
    with pytest.raises(JobError, match="destination exists"):
        mj.convert(source, out / "precious")
    with pytest.raises(JobError, match="cannot be written"):
        mj.convert(source, out / "precious" / "below a file")
    with pytest.raises(JobError, match="destination exists"):
        mj.convert(source, source)
    with pytest.raises(JobError, match="cannot be written"):
        mj.convert(source, out / ("x" * 300))
    assert folders.files(out) == {"precious": b"1"} and names(out.parent) == ["out"]


@pytest.mark.parametrize("relative", ["new", "empty", "a/b/c", "link", "./new/", "empty/../new"])
def test_a_destination_may_be_new_or_empty_or_a_link_to_such(source, out, monkeypatch, relative):
    monkeypatch.chdir(out.parent)
    Path("empty").mkdir()
    Path("link").symlink_to("behind the link")
    mj.convert(source, relative)
    assert mj.inspect(relative).layout == "native"
    assert not [path for path in out.parent.rglob("*") if "partial" in path.name or path.name == ".unfinished"]


def test_what_a_dead_run_left_is_replaced(source, out):
    partial = out.with_name(".out.partial")
    partial.mkdir()
    for name in (".unfinished", "model.safetensors", "tokenizer.json"):
        (partial / name).write_text("half")
    mj.convert(source, out)
    assert names(out.parent) == ["out"] and mj.inspect(out).layout == "native"
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_folder_that_is_not_ours_is_left_alone(source, out):
    partial = out.with_name(".out.partial")
    partial.mkdir()
    (partial / "precious").write_text("1")
    with pytest.raises(JobError, match="not ours"):
        mj.convert(source, out)
    assert folders.files(partial) == {"precious": b"1"} and names(out.parent) == [".out.partial"]


def test_of_two_runs_to_one_destination_the_second_is_refused(source, out):
    refused = []

    def meddle(moment):
        if not refused:
            with pytest.raises(JobError, match="another process"):
                mj.convert(source, out)
            refused.append(moment)

    mj.convert(source, out, progress=meddle)
    assert refused and names(out.parent) == ["out"] and mj.verify(source, out).good


def test_a_destination_that_is_taken_meanwhile_is_left_alone(source, out):
    def meddle(moment):
        out.mkdir(exist_ok=True)
        (out / "precious").write_text("1")

    with pytest.raises(JobError, match="renamed") as caught:
        mj.convert(source, out, progress=meddle)
    assert caught.value.problems[0].file == str(out)
    assert folders.files(out) == {"precious": b"1"} and names(out.parent) == [".out.partial", "out"]
    (out / "precious").unlink()
    mj.convert(source, out)
    assert names(out.parent) == ["out"] and mj.verify(source, out).good


# --- the disk and the files ------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_stops_it_at_once(source, out, monkeypatch):
    needed = mj.plan(source).write_bytes
    usage = namedtuple("usage", "total used free")
    moments = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed - 1))
    with pytest.raises(JobError, match="not enough space") as caught:
        mj.convert(source, out, progress=moments.append)
    assert caught.value.problems[0].expected == f"{needed:,} bytes needed"
    assert caught.value.problems[0].got == f"{needed - 1:,} bytes free"
    assert not moments and names(out.parent) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed))
    mj.convert(source, out)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("call,code,kind", [("pwrite", errno.ENOSPC, JobError), ("preadv", errno.EIO, FormatError)])
def test_a_disk_that_fails_in_the_middle_leaves_nothing(source, out, monkeypatch, call, code, kind, workers):
    planned, real, calls = mj.plan(source, workers=workers), getattr(os, call), itertools.count(1)
    stopped, shutdown = threading.Event(), ThreadPoolExecutor.shutdown

    def stop(pool, **options):
        shutdown(pool, wait=False, cancel_futures=True)
        stopped.set()
        shutdown(pool, **options)

    def failing(*args):
        number = next(calls)
        if number > 9:  # what is under way goes on until the first error has stopped the rest
            stopped.wait(60)
        if number > 8:
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", stop)
    monkeypatch.setattr(os, call, failing)
    with pytest.raises(kind) as caught:
        run(planned, out)
    (problem,) = caught.value.problems
    assert problem.got == os.strerror(code) and problem.file and problem.file.endswith(".safetensors")
    assert 8 < next(calls) - 1 <= 8 + workers + 1 < len(planned.units) and names(out.parent) == [".out.partial"]
    assert "the same command goes on" in caught.value.__notes__[0]
    monkeypatch.undo()
    run(planned, out)
    assert names(out.parent) == ["out"] and mj.verify(source, out).good


def test_a_source_that_is_cut_after_planning_is_found(source, out, tmp_path):
    shutil.copytree(source, tmp_path / "hf")
    planned = mj.plan(tmp_path / "hf")
    victim = planned.source.checkpoint.files[3]
    with victim.open("r+b") as stream:
        stream.truncate(victim.stat().st_size - 1)
    with pytest.raises(FormatError, match="truncated") as caught:
        run(planned, out)
    assert caught.value.problems[0].file == str(victim) and not out.exists()
    victim.unlink()
    with pytest.raises(FormatError, match="cannot be opened") as caught:
        run(planned, out)
    assert caught.value.problems[0].file == str(victim) and not out.exists()


def test_a_side_file_that_is_lost_is_found_before_the_work(source, out, tmp_path):
    shutil.copytree(source, tmp_path / "hf")
    (tmp_path / "hf" / "merges.txt").symlink_to("nowhere")
    moments = []
    with pytest.raises(FormatError, match=r"merges\.txt"):
        mj.convert(tmp_path / "hf", out, progress=moments.append)
    assert not moments and names(out.parent) == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_run_goes_on(source, out, kind):
    def interrupt(moment):
        raise kind

    with pytest.raises(kind):
        mj.convert(source, out, progress=interrupt)
    assert names(out.parent) == [".out.partial"]
    mj.convert(source, out)
    assert names(out.parent) == ["out"] and mj.verify(source, out).good


# --- numbers ---------------------------------------------------------------------------------------------------------


def poison(value):
    def change(weight):
        weight[1, 3, CONFIG.intermediate_size + 7] = value  # the half of expert 1 that becomes `w3`
        return weight

    return change


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("to", ["native", "hf-fp8"])
@pytest.mark.parametrize("sidecar", [True, False])
def test_nan_in_a_weight_to_be_quantised_is_named(source, out, tmp_path, to, value, sidecar):
    mj.convert(source, tmp_path / "native")
    folders.edit(tmp_path / "native", EXPERTS + "gate_and_up_projs", poison(value))
    if not sidecar:
        (tmp_path / "native" / folders.SIDECAR).unlink()
    with pytest.raises(NumericError, match="NaN or infinity") as caught:
        mj.convert(tmp_path / "native", out, to=to, dtype="fp8")
    assert [problem.key for problem in caught.value.problems] == [MOE + "1.w3.weight"]
    assert not out.exists()
    mj.convert(tmp_path / "native", out, to="hf", restart=True)
    w3 = folders.arrays(out)[MOE + "1.w3.weight"]
    assert str(w3[7, 3]) == str(value)
