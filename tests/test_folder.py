import os
import shutil
import subprocess
import sys

import pytest

from minimax_jax.errors import JobError
from minimax_jax.io import folder as folder_module
from minimax_jax.io.folder import MARK, appearing


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_whole_at_the_end(tmp_path):
    destination = tmp_path / "a" / "out"
    with appearing(destination) as folder:
        (folder / "x").write_text("1")
        assert not destination.exists()
    assert names(destination) == ["x"]
    assert names(destination.parent) == ["out"]


def test_nothing_is_left_of_a_block_that_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), appearing(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_an_empty_destination_is_taken_and_a_full_one_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with appearing(tmp_path / "empty") as folder:
        (folder / "x").touch()
    with pytest.raises(JobError, match="not an empty folder"), appearing(tmp_path / "empty"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match="not an empty folder"), appearing(tmp_path / "file"):
        pass
    assert names(tmp_path / "empty") == ["x"]


def test_a_foreign_folder_in_the_way_is_not_touched(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "precious").touch()
    with pytest.raises(JobError, match="not ours"), appearing(tmp_path / "out"):
        pass
    assert names(tmp_path / ".out.partial") == ["precious"]


def test_two_at_once_are_refused_and_the_first_goes_on(tmp_path):
    with appearing(tmp_path / "out") as folder:
        (folder / "x").touch()
        with pytest.raises(JobError, match="another process"), appearing(tmp_path / "out"):
            pass
        assert names(folder) == ["x"] and names(folder.parent) == [MARK, "out"]
    assert names(tmp_path / "out") == ["x"]


def test_what_a_killed_process_left_is_replaced(tmp_path):
    code = (
        "import os, sys\n"
        "from minimax_jax.io.folder import appearing\n"
        "with appearing(sys.argv[1]) as folder:\n"
        "    (folder / 'old').touch()\n"
        "    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")]).returncode == 9
    assert names(tmp_path) == [".out.partial"]
    with appearing(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert names(tmp_path / "out") == ["new"]
    assert names(tmp_path) == ["out"]


def test_a_mark_that_was_taken_away_before_it_is_locked_is_no_lock(tmp_path, monkeypatch):
    real = folder_module.fcntl.flock

    def late(fd, how):
        shutil.rmtree(tmp_path / ".out.partial")
        real(fd, how)

    monkeypatch.setattr(folder_module.fcntl, "flock", late)
    with pytest.raises(JobError, match="just ended or begun"), appearing(tmp_path / "out"):
        pass
    assert names(tmp_path) == []


def test_what_a_process_left_that_died_before_its_mark_is_taken_over(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    with appearing(tmp_path / "out") as folder:
        (folder / "x").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_mark_goes_last(tmp_path, monkeypatch):
    gone = []
    unlink, rmdir = os.unlink, os.rmdir
    monkeypatch.setattr(os, "unlink", lambda path, **at: (gone.append(str(path)), unlink(path, **at)))
    monkeypatch.setattr(os, "rmdir", lambda path, **at: (gone.append(str(path)), rmdir(path, **at)))
    with appearing(tmp_path / "out") as folder:
        for number in range(9):
            (folder.parent / f".journal.{number}").touch()
    assert [path.rpartition("/")[2] for path in gone[-2:]] == [".unfinished", ".out.partial"] and len(gone) == 11


def test_files_that_a_killed_process_had_not_put_in_place_go(tmp_path):
    with pytest.raises(KeyboardInterrupt), appearing(tmp_path / "out", worth=lambda workshop: True) as folder:
        (folder / ".config.json.0.tmp").touch()
        (folder / "kept").touch()
        raise KeyboardInterrupt
    with appearing(tmp_path / "out", worth=lambda workshop: True):
        pass
    assert names(tmp_path / "out") == ["kept"]
