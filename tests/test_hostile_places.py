"""Folders that somebody prepared: links, pipes and devices where files are looked for, names that no text can hold."""

import json
import os
import socket
from pathlib import Path

import folders
import pytest
from command_line import run

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import ConfigError, FormatError, JobError

INDEX = "model.safetensors.index.json"
CALLS = [mj.inspect, mj.plan, mj.verify, mj.read_tree]


@pytest.fixture
def folder(tmp_path):
    synthetic.synthesize(tmp_path / "hf", synthetic.config(layers=1, experts=2), shard_bytes=60_000)
    return tmp_path / "hf"


def a_pipe(file, _):
    os.mkfifo(file)


def a_folder(file, _):
    file.mkdir()


def a_socket(file, _):
    directory = os.open(file.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(f"/proc/self/fd/{directory}/{file.name}")
    finally:
        os.close(directory)


def a_device(file, _):
    file.symlink_to("/dev/zero")


def a_link_out(file, content):
    elsewhere = file.parents[1] / f"elsewhere-{file.name}"
    elsewhere.write_bytes(content)
    file.symlink_to(elsewhere)


def a_link_through_a_folder(file, content):
    a_link_out(file, content)
    target = file.readlink()
    file.unlink()
    (file.parent / "sub").symlink_to(target.parent)
    file.symlink_to(Path("sub") / target.name)


def a_link_to_itself(file, _):
    file.symlink_to(file.name)


PLACES = [a_pipe, a_folder, a_socket, a_device, a_link_out, a_link_through_a_folder, a_link_to_itself]


@pytest.mark.parametrize("put", PLACES)
@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00001-of-00007.safetensors"])
def test_what_is_no_file_of_the_folder_is_refused_by_name_and_never_waited_for(folder, tmp_path, put, name):
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    put(folder / name, content)
    kind = ConfigError if name == "config.json" else FormatError
    for call in CALLS:
        with pytest.raises(kind) as caught:
            call(folder)
        assert {Path(problem.file).name for problem in caught.value.problems} == {name}
    with pytest.raises(kind):
        mj.convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".*")) == []


def test_links_that_stay_in_the_folder_are_followed(folder, tmp_path):
    for name in ("config.json", INDEX, "model-00001-of-00007.safetensors"):
        (folder / name).rename(folder / f".real-{name}")
        (folder / name).symlink_to(f".real-{name}")
    assert mj.verify(folder).good
    mj.convert(folder, tmp_path / "out")


def test_a_config_in_the_cache_of_the_hub_is_a_link_that_is_followed(folder, tmp_path):
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "abc").mkdir(parents=True)
    for file in folder.iterdir():
        file.rename(repository / "blobs" / file.name)
        (repository / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{file.name}")
    assert mj.inspect(repository / "snapshots" / "abc").layout == "hf"


def test_the_config_of_an_orbax_checkpoint_is_no_link_out_either(folder, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    mj.convert(folder, tmp_path / "orbax", to="orbax")
    file = tmp_path / "orbax" / "config.json"
    content = file.read_bytes()
    file.unlink()
    a_link_out(file, content)
    with pytest.raises(ConfigError, match="path leaves the folder"):
        mj.inspect(tmp_path / "orbax")


# ---- destinations


def test_a_destination_that_links_to_itself_is_an_error(folder, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(JobError, match="destination exists and is not an empty folder"):
        mj.convert(folder, tmp_path / "loop")
    assert "error: destination exists" in run("convert", folder, tmp_path / "loop", code=3)[1]
    assert (tmp_path / "loop").is_symlink() and list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("mark", [False, True])
def test_a_workshop_that_is_a_link_is_not_ours_to_empty(folder, tmp_path, mark):
    victim = tmp_path / "victim"
    victim.mkdir()
    if mark:
        (victim / ".unfinished").touch()
        (victim / "precious").write_text("kept")
    (tmp_path / ".out.partial").symlink_to(victim)
    before = folders.files(victim)
    for restart in (False, True):
        with pytest.raises(JobError, match="not ours stands in the way"):
            mj.convert(folder, tmp_path / "out", restart=restart)
    assert folders.files(victim) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", [".", "..", "../hf", "../link", "../link/out", "out"])
def test_a_destination_that_is_the_source_or_holds_it_or_lies_in_it_is_refused(folder, tmp_path, to):
    (tmp_path / "link").symlink_to(folder)
    before = folders.files(folder)
    with pytest.raises(JobError):
        mj.convert(folder, folder / to)
    assert folders.files(folder) == before


def test_a_source_that_cannot_be_written_to_is_all_that_is_needed(folder, tmp_path):
    mj.convert(folder, tmp_path / "expected")
    for place in (*folder.iterdir(), folder):
        place.chmod(place.stat().st_mode & ~0o222)
    before = {file: file.stat() for file in folder.iterdir()}
    try:
        mj.convert(folder, tmp_path / "out")
        assert mj.verify(folder, tmp_path / "out").good
        assert folders.files(tmp_path / "out") == folders.files(tmp_path / "expected")
        assert all(file.stat().st_mtime_ns == was.st_mtime_ns for file, was in before.items())
        assert before.keys() == set(folder.iterdir())
    finally:
        folder.chmod(0o755)


# ---- names


def odd(name):
    """A name of the file system that is no UTF-8."""
    return os.fsdecode(name)


def test_names_that_are_no_text_are_read_written_certified_and_shown(folder, tmp_path):
    place = folder.rename(tmp_path / odd(b"hf-\xff"))
    (place / odd(b"notes-\xfe.txt")).write_text("words")
    out, certificate = tmp_path / odd(b"out-\xff"), tmp_path / odd(b"c-\xff.json")
    mj.convert(place, out)
    assert (out / odd(b"notes-\xfe.txt")).read_text() == "words"
    mj.verify(place, output=certificate)
    seen = mj.verify(place, certificate=certificate)
    assert seen.good and seen.held.files == len(folders.files(place))
    files = json.loads(certificate.read_text(encoding="utf-8"))["checkpoints"][0]["files"]
    assert "notes-\\xfe.txt" in files
    (place / odd(b"notes-\xfe.txt")).write_text("others")
    found = mj.verify(place, certificate=certificate).held.mismatches
    assert [(each.name, each.what) for each in found] == [("notes-\\xfe.txt", "file")]


@pytest.mark.parametrize("command", ["inspect", "plan", "verify", "convert", "report"])
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_commands_take_names_that_are_no_text(folder, tmp_path, command, more):
    place = folder.rename(tmp_path / odd(b"hf-\xff"))
    to = {"convert": [tmp_path / odd(b"out-\xff")], "report": ["-o", tmp_path / odd(b"r-\xff.html")]}.get(command, [])
    run(command, place, *to, *more)


def test_a_shard_by_a_name_that_is_no_text_is_read_and_certified(folder, tmp_path):
    (folder / INDEX).unlink()
    victim = next(folder.glob("*.safetensors"))
    victim.rename(folder / odd(b"model-\xff.safetensors"))
    mj.verify(folder, output=tmp_path / "c.json")
    assert mj.verify(folder, certificate=tmp_path / "c.json").held.notes == ()
