"""What lies beside the weights of a source: what goes along with them, and what stays behind and is told by name."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import run, run_json

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import FormatError, JobError
from minimax_jax.io.beside import LeftBehind, side_files

CONFIG = synthetic.config(layers=1, experts=2)
OTHERS = {
    "backup.safetensors.index.json": "an index of other weights",
    "certificate.json": "no certificate, but of the name of one",
    "figures": "a folder",
    "link": "a folder",
    "null": "a device",
    "optimizer.pt": "other weights",
    "pipe": "a FIFO",
    "plug": "a socket",
    "x.gguf": "other weights",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    mj.synthesize(tmp_path / "hf", CONFIG, shard_bytes=60_000)
    return tmp_path / "hf"


def clutter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of `OTHERS`, and things that nobody is told of."""
    for name in ("backup.safetensors.index.json", "optimizer.pt", "x.gguf", ".gitattributes"):
        (folder / name).touch()
    (folder / "certificate.json").write_text('{"of": "my diploma"}')
    (folder / "figures").mkdir()
    (folder / "figures" / "a.png").touch()
    (folder / ".cache").mkdir()
    (folder / "link").symlink_to(folder.parent)
    (folder / "null").symlink_to("/dev/null")
    os.mkfifo(folder / "pipe")
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as plug:
        plug.bind("plug")


def told(found: tuple[LeftBehind, ...]) -> dict[str, str]:
    return {each.name: each.what for each in found}


@pytest.mark.parametrize("to", ["native", "hf", "orbax", "dcp"])
def test_what_stays_behind_is_told_and_fails_no_conversion(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    clean = mj.convert(folder, tmp_path / "clean", to=to)
    clutter(folder, monkeypatch)
    report = mj.convert(folder, tmp_path / "out", to=to)
    assert clean.left_behind == () and told(report.left_behind) == OTHERS
    assert told(mj.inspect(folder).left_behind) == told(mj.plan(folder, to=to).source.left_behind) == OTHERS
    out, wanted = ({file.name for file in (tmp_path / name).iterdir()} for name in ("out", "clean"))
    assert out == wanted
    assert mj.inspect(tmp_path / "out").left_behind == ()


def test_commands_say_it_by_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clutter(folder, monkeypatch)
    listed = [{"name": name, "what": what} for name, what in OTHERS.items()]
    commands = {"inspect": [], "plan": [], "convert": [tmp_path / "out"]}
    for command, more in commands.items():
        assert run_json(command, folder, *more)[0]["left_behind"] == listed
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        words = " ".join(run(command, folder, *more)[0].split())
        assert all(f"{name} ({what})" in words for name, what in OTHERS.items()), words


def test_many_are_told_in_few_words(folder: Path) -> None:
    for number in range(500):
        (folder / f"old-{number:03}").mkdir()
    words = run("inspect", folder)[0]
    assert "old-019 (a folder) and 480 more" in " ".join(words.split()) and "old-020" not in words
    assert len(mj.inspect(folder).left_behind) == 500


def test_a_name_that_is_no_text_is_told_as_one(folder: Path) -> None:
    (folder / os.fsdecode(b"odd-\xff[red]\x1b")).mkdir()
    assert told(mj.inspect(folder).left_behind) == {"odd-\\xff[red]\x1b": "a folder"}
    assert "odd-\\\\xff[red]\\x1b" in "".join(run("inspect", folder)[0].split("\n"))


def test_what_the_checkpoint_is_made_of_does_not_stay_behind(folder: Path, tmp_path: Path) -> None:
    mj.convert(folder, tmp_path / "native")  # with a sidecar
    mj.verify(tmp_path / "native", output=tmp_path / "native" / "certificate.json")
    mj.convert(folder, tmp_path / "orbax", to="orbax")
    for name in ("native", "orbax"):
        assert mj.inspect(tmp_path / name).left_behind == ()
    (tmp_path / "orbax" / "metrics").mkdir()
    assert told(mj.inspect(tmp_path / "orbax").left_behind) == {"metrics": "a folder"}
    index = folder / "model.safetensors.index.json"
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    (folder / "part").mkdir()
    (folder / shards[0]).rename(folder / "part" / shards[0])
    index.write_text(index.read_text().replace(shards[0], f"part/{shards[0]}"))
    for path in (folder, index):
        assert mj.inspect(path).left_behind == ()


@pytest.mark.parametrize(("to", "name"), [("dcp", "__0_0_0.distcp"), ("orbax", "commit_success.txt")])
def test_what_has_the_name_of_something_that_is_written_does_not_take_its_place(
    folder: Path, tmp_path: Path, to: str, name: str
) -> None:
    (folder / name).write_text("another")
    report = mj.convert(folder, tmp_path / "out", to=to)
    assert (tmp_path / "out" / name).read_bytes() != b"another"
    assert [each.name for each in report.left_behind] == [name]


def test_weights_are_no_side_file_whatever_their_name(folder: Path, tmp_path: Path) -> None:
    index, shard = folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors"))[0]
    shard.rename(folder / "README.md")
    index.write_text(index.read_text().replace(shard.name, "README.md"))
    report = mj.convert(folder, tmp_path / "out")
    assert report.left_behind == () and "minimax_jax wrote this" in (tmp_path / "out" / "README.md").read_text()
    assert len(mj.verify(folder).checkpoints[0].files) == len(list(folder.iterdir()))


@pytest.mark.parametrize("to", ["native", "orbax", "dcp"])
def test_side_files_that_cannot_be_copied_are_told_before_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    with (folder / "notes.bin.txt").open("wb") as stream:
        stream.truncate(8 * 10**12)
    worked: list[object] = []
    with pytest.raises(JobError, match="no room for the side files") as caught:
        mj.convert(folder, tmp_path / "out", to=to, progress=worked.append)
    assert caught.value.problems[0].file == str(folder / "notes.bin.txt")
    (folder / "notes.bin.txt").unlink()
    monkeypatch.setattr("minimax_jax.jobs.card._may_read", lambda file: file.name != "tokenizer.json")
    with pytest.raises(JobError, match="side file may not be read") as caught:  # of a user who is not root
        mj.convert(folder, tmp_path / "out", to=to, progress=worked.append)
    assert caught.value.problems[0].file == str(folder / "tokenizer.json")
    assert worked == [] and [place.name for place in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("put", [os.mkfifo, Path.mkdir])
def test_a_card_that_is_no_file_is_no_card(folder: Path, tmp_path: Path, put: Callable[[Path], None]) -> None:
    put(folder / "README.md")
    report = mj.convert(folder, tmp_path / "out")
    assert [each.name for each in report.left_behind] == ["README.md"]
    assert "minimax_jax wrote this" in (tmp_path / "out" / "README.md").read_text()


def test_side_files_are_those_that_go_along_with_the_weights(tmp_path: Path) -> None:
    kept = ["LICENSE", "chat_template.jinja", "generation_config.json", "merges.txt", "tokenizer.model", "vocab.json"]
    left = [
        "certificate.json",
        ".gitattributes",
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "optimizer.pt",
        "model.gguf",
    ]
    for name in kept + left:
        (tmp_path / name).touch()
    (tmp_path / "figures").mkdir()
    os.mkfifo(tmp_path / "pipe")
    expected = tuple(tmp_path / name for name in kept)
    assert side_files(tmp_path) == expected
    assert side_files(tmp_path / "model.safetensors.index.json") == expected
    assert side_files(tmp_path / "model.safetensors") == ()


def test_side_files_that_are_lost_or_lie_elsewhere_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / "a.txt").symlink_to("nowhere")
    (folder / "b.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError) as caught:
        side_files(folder)
    assert [problem.file for problem in caught.value.problems] == [str(folder / "a.txt"), str(folder / "b.txt")]
