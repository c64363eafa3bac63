"""What the disk does to a writer, and what is left behind."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from raw_safetensors import library_reads

from minimax_jax.errors import JobError
from minimax_jax.io.jsonfile import write_json_atomic
from minimax_jax.io.shards import TensorOut, lay_out
from minimax_jax.io.writer import Writer


def out(key: str, *shape: int, dtype: str = "U8") -> TensorOut:
    return TensorOut(key=key, dtype=dtype, shape=shape)


def contents(file: Path) -> dict[str, bytes]:
    return {key: data for key, (_, _, data) in library_reads(file.read_bytes()).items()}


def test_files_have_their_full_size_on_disk_before_anything_is_written(tmp_path: Path) -> None:
    with Writer(tmp_path, lay_out([out("a", 1_000_000)])):
        found = (tmp_path / "model.safetensors").stat()
    assert found.st_size > 1_000_000 and found.st_blocks * 512 >= 1_000_000
    assert stat.S_IMODE(found.st_mode) == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("how", ["missing", "not supported"])
def test_without_fallocate_files_get_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def unsupported(*args: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if how == "missing":
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", unsupported)
    with Writer(tmp_path, lay_out([out("a", 1000)])) as writer:
        assert (tmp_path / "model.safetensors").stat().st_size > 1000
        writer.write("a", bytes(1000))
        writer.finish()
    assert contents(tmp_path / "model.safetensors") == {"a": bytes(1000)}


def test_more_than_the_disk_holds_is_refused_before_anything_is_created(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(JobError) as caught:
        Writer(tmp_path, lay_out([out("a", 10**15), out("b", 10**15)], shard_bytes=10**15))
    (problem,) = caught.value.problems
    assert problem.what == "not enough space on the disk" and problem.file == str(tmp_path)
    assert problem.expected is not None and int(problem.expected.split()[0].replace(",", "")) > 2 * 10**15
    assert problem.got is not None and abs(int(problem.got.split()[0].replace(",", "")) - free) < 10**11
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_meanwhile_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fallocate, calls = os.posix_fallocate, iter([True, False])

    def full(fd: int, start: int, nbytes: int) -> None:
        if not next(calls):
            raise OSError(errno.ENOSPC, "No space left on device")
        fallocate(fd, start, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(JobError, match=r"not enough space(.|\n)*00002-of-00002(.|\n)*needed(.|\n)*free"):
        Writer(tmp_path, lay_out([out("a", 10), out("b", 10)], shard_bytes=10))
    assert not list(tmp_path.iterdir())


def test_a_file_size_limit_of_the_process_is_a_named_error(tmp_path: Path) -> None:
    script = f"""
        import resource
        from pathlib import Path
        from minimax_jax.errors import JobError
        from minimax_jax.io.shards import TensorOut, lay_out
        from minimax_jax.io.writer import Writer
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            Writer(Path({str(tmp_path)!r}), lay_out([TensorOut(key="a", dtype="U8", shape=(2000,))]))
        except JobError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert "cannot be given its full size" in done.stdout and "File too large" in done.stdout
    assert not list(tmp_path.iterdir())


def test_files_that_exist_are_never_overwritten(tmp_path: Path) -> None:
    shards = lay_out([out("a", 1), out("b", 1)], shard_bytes=1)
    (tmp_path / shards[1].file_name).write_text("precious")
    with pytest.raises(JobError, match=r"cannot be created(.|\n)*00002-of-00002(.|\n)*File exists"):
        Writer(tmp_path, shards)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {shards[1].file_name: "precious"}


def test_an_index_that_exists_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("precious")
    with pytest.raises(JobError, match=r"exists already(.|\n)*index\.json"):
        Writer(tmp_path, lay_out([out("a", 1), out("b", 1)], shard_bytes=1))
    assert [file.read_text() for file in tmp_path.iterdir()] == ["precious"]


def test_a_folder_that_does_not_exist_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="No such file"):
        Writer(tmp_path / "gone", lay_out([out("a", 1)]))


def test_json_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "index.json"
    write_json_atomic(file, {"key": "é"})
    assert json.loads(file.read_bytes()) == {"key": "é"}

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(JobError, match="Input/output error"):
        write_json_atomic(file, {"key": "new"})
    assert json.loads(file.read_bytes()) == {"key": "é"} and [f.name for f in tmp_path.iterdir()] == ["index.json"]
    with pytest.raises(JobError, match="No such file"):
        write_json_atomic(tmp_path / "gone" / "index.json", {})


def test_data_reaches_the_disk_before_the_header_and_the_index_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, pwrite, replace = os.fsync, os.pwrite, Path.replace

    def name(fd: int) -> str:
        return Path(f"/proc/self/fd/{fd}").readlink().name.replace(tmp_path.name, "folder").split(".")[0]

    def record(event: str, call: Callable[..., Any], *args: Any) -> Any:
        events.append(event)
        return call(*args)

    monkeypatch.setattr(os, "fsync", lambda fd: record(f"sync {name(fd)}", fsync, fd))
    monkeypatch.setattr(
        os,
        "pwrite",
        lambda fd, data, at: record(f"write {'data' if at else 'header'} {name(fd)}", pwrite, fd, data, at),
    )
    monkeypatch.setattr(Path, "replace", lambda old, new: record(f"name {new.name}", replace, old, new))
    with Writer(tmp_path, lay_out([out("a", 1), out("b", 1)], shard_bytes=1, stem="m"), stem="m") as writer:
        writer.write("a", b"a")
        writer.write("b", b"b")
        writer.finish()
    files = ["m-00001-of-00002", "m-00002-of-00002"]
    steps = [f"{step} {file}" for step in ("write data", "sync", "write header", "sync") for file in files]
    index = ["sync folder", "sync ", "name m.safetensors.index.json", "sync folder"]
    assert events == steps + index
