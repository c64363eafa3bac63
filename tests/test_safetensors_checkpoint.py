"""A folder of files and its index: what is opened, and what is refused."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from raw_safetensors import raw_bytes, write_file, write_index

from minimax_jax.errors import FormatError
from minimax_jax.io.beside import side_files
from minimax_jax.io.checkpoint import open_checkpoint
from minimax_jax.io.reader import Reader

FIRST, SECOND = "model-00001-of-00130.safetensors", "model-00002-of-00130.safetensors"
GOOD_MAP = {"a": FIRST, "b": SECOND, "c": SECOND}


def two_files(folder: Path) -> None:
    write_file(folder / FIRST, a=(4,))
    write_file(folder / SECOND, b=(2,), c=(3,))


def refused(path: Path) -> FormatError:
    with pytest.raises(FormatError) as caught:
        open_checkpoint(path)
    return caught.value


def test_an_index_is_trusted_and_the_numbers_in_file_names_are_not(tmp_path: Path) -> None:
    two_files(tmp_path)
    index = write_index(tmp_path, GOOD_MAP)
    write_file(tmp_path / "sidecar.safetensors", z=(1,))
    for path in (tmp_path, index):
        checkpoint = open_checkpoint(path)
        assert {key: info.file.name for key, info in checkpoint.tensors.items()} == GOOD_MAP
        assert (checkpoint.path, checkpoint.index_file, checkpoint.nbytes) == (path, index, 9)
        assert checkpoint.files == (tmp_path / FIRST, tmp_path / SECOND)


def test_without_an_index_the_single_file_counts_alone(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", a=(1,))
    write_file(tmp_path / "adapter.safetensors", z=(1,))
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["a"] and checkpoint.index_file is None


def test_without_either_every_file_counts(tmp_path: Path) -> None:
    two_files(tmp_path)
    write_file(tmp_path / "._hidden.safetensors", z=(1,))
    assert list(open_checkpoint(tmp_path).tensors) == ["a", "b", "c"]


def test_one_file_is_a_checkpoint_whatever_its_name(tmp_path: Path) -> None:
    file = write_file(tmp_path / "weights", a=(1,))
    assert open_checkpoint(file).files == (file,)


def test_an_index_may_name_files_in_sub_folders(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    write_file(tmp_path / "part" / "x.safetensors", a=(1,))
    write_index(tmp_path, {"a": "part/x.safetensors"})
    assert open_checkpoint(tmp_path).tensors["a"].file == tmp_path / "part" / "x.safetensors"


def test_metadata_of_the_files_is_merged_and_the_first_wins(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(raw_bytes({"__metadata__": {"format": "pt"}}))
    (tmp_path / "b.safetensors").write_bytes(raw_bytes({"__metadata__": {"format": "np", "more": "x"}}))
    assert open_checkpoint(tmp_path).metadata == {"format": "pt", "more": "x"}


@pytest.mark.parametrize(
    ("weight_map", "words", "where", "key"),
    [
        ({"a": FIRST, "b": SECOND}, "does not list", SECOND, "c"),
        ({"a": SECOND, "b": FIRST, "c": SECOND}, "in another file than the index says", FIRST, "a"),
        ({**GOOD_MAP, "d": FIRST}, "not in the file that the index names", "model.safetensors.index.json", "d"),
        ({**GOOD_MAP, "d": "gone.safetensors"}, "No such file", "gone.safetensors", None),
        ({**GOOD_MAP, "d": "/etc/passwd"}, "does not name a file in the folder", "model.safetensors.index.json", "d"),
        ({**GOOD_MAP, "d": "../x.safetensors"}, "does not name a file", "model.safetensors.index.json", "d"),
        ({**GOOD_MAP, "d": f"x/../{FIRST}"}, "does not name a file", "model.safetensors.index.json", "d"),
        ({**GOOD_MAP, "d": ""}, "does not name a file", "model.safetensors.index.json", "d"),
        ({**GOOD_MAP, "d": "."}, "does not name a file", "model.safetensors.index.json", "d"),
        ({**GOOD_MAP, "d": "x\0y"}, "does not name a file", "model.safetensors.index.json", "d"),
        ({**GOOD_MAP, "d": "\ud800"}, "does not name a file", "model.safetensors.index.json", "d"),
        ({**GOOD_MAP, "d": "x" * 10_000}, "cannot be reached", "x" * 10_000, None),
        ({**GOOD_MAP, "d": None}, "does not name a file", "model.safetensors.index.json", "d"),
        ({**GOOD_MAP, "d": "folder"}, "not a regular file", "folder", None),
        ({**GOOD_MAP, "d": "pipe"}, "not a regular file", "pipe", None),
        ({**GOOD_MAP, "d": f"./{FIRST}"}, "in another file", FIRST, "a"),
        ({}, "without a weight_map", "model.safetensors.index.json", None),
        ([FIRST], "without a weight_map", "model.safetensors.index.json", None),
        (None, "without a weight_map", "model.safetensors.index.json", None),
    ],
)
def test_an_index_that_is_wrong_is_refused(
    tmp_path: Path, weight_map: object, words: str, where: str, key: str | None
) -> None:
    two_files(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    write_index(tmp_path, weight_map)
    problem = refused(tmp_path).problems[0]
    assert words in str(problem)
    assert (problem.file, problem.key) == (str(tmp_path / where), key)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe{\0}\0", "not valid JSON"),
        (b'{"weight_map": {', "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "twice"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_an_index_that_is_not_json_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    two_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    problem = refused(tmp_path).problems[0]
    assert words in str(problem) and problem.file == str(tmp_path / "model.safetensors.index.json")


def test_an_index_too_long_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors.index.json").open("wb") as stream:
        stream.truncate(10**15 // 1000)
    assert "index too long" in str(refused(tmp_path))


def test_problems_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    two_files(tmp_path)
    (tmp_path / FIRST).write_bytes((tmp_path / FIRST).read_bytes()[:-1])
    write_index(tmp_path, {**GOOD_MAP, "d": "gone.safetensors", "e": "gone too.safetensors"})
    files = [Path(str(problem.file)).name for problem in refused(tmp_path).problems]
    assert files == ["gone too.safetensors", "gone.safetensors", FIRST]


def test_all_that_the_index_has_wrong_is_told_at_once(tmp_path: Path) -> None:
    two_files(tmp_path)
    write_index(tmp_path, {"a": SECOND, "b": SECOND, "d": FIRST, "e": SECOND})
    assert [problem.key for problem in refused(tmp_path).problems] == ["a", "c", "d", "e"]


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    write_file(tmp_path / "x.safetensors", a=(1,), b=(1,))
    write_file(tmp_path / "y.safetensors", b=(1,))
    (problem,) = refused(tmp_path).problems
    assert problem.what == "tensor in two files" and problem.key == "b"
    assert problem.file == str(tmp_path / "y.safetensors") and problem.got == f"also in {tmp_path / 'x.safetensors'}"


def test_two_checkpoints_in_one_folder_are_told_apart_by_path_only(tmp_path: Path) -> None:
    two_files(tmp_path)
    index = write_index(tmp_path, GOOD_MAP)
    single = write_file(tmp_path / "model.safetensors", z=(1,))
    assert "two checkpoints" in str(refused(tmp_path))
    assert list(open_checkpoint(single).tensors) == ["z"]
    assert list(open_checkpoint(index).tensors) == ["a", "b", "c"]


def test_nothing_to_open_is_said_plainly(tmp_path: Path) -> None:
    assert "no safetensors file here" in str(refused(tmp_path))
    assert "No such file" in str(refused(tmp_path / "gone"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.PTH"])
def test_pickles_are_refused_in_words(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / name):
        problem = refused(path).problems[0]
        assert "never read" in problem.what and problem.got == name


def test_a_part_of_what_torch_saves_is_told_for_what_it_is(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it is not distributed
        dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    (problem,) = refused(tmp_path / "dcp" / ".metadata").problems
    assert problem.remedy is not None and "give that folder" in problem.remedy
    (tmp_path / "dcp" / ".metadata").unlink()
    for place in (tmp_path / "dcp", tmp_path / "dcp" / "__0_0.distcp"):
        (problem,) = refused(place).problems
        assert "torch.distributed.checkpoint" in problem.what and ".metadata" in str(problem.expected)


def hub_cache(folder: Path) -> Path:
    revision = folder / "models--org--name" / "snapshots" / "0123abcd"
    blobs = folder / "models--org--name" / "blobs"
    revision.mkdir(parents=True)
    blobs.mkdir()
    write_file(blobs / "cafe", a=(4,))
    write_index(blobs, {"a": FIRST}).rename(blobs / "beef")
    (blobs / "f00d").write_text("{}")
    links = {FIRST: "cafe", "model.safetensors.index.json": "beef", "tokenizer.json": "f00d"}
    for name, blob in links.items():
        (revision / name).symlink_to(Path("../../blobs") / blob)
    return revision


def test_the_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    revision = hub_cache(tmp_path)
    alias = tmp_path / "alias"
    alias.symlink_to(revision)
    for folder in (revision, alias):
        checkpoint = open_checkpoint(folder)
        with Reader(checkpoint) as reader:
            assert reader.read(checkpoint.tensors["a"]).tolist() == [0] * 4
        assert side_files(folder) == (folder / "tokenizer.json",)


def test_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    write_file(tmp_path / "real.safetensors", a=(1,))
    (tmp_path / FIRST).symlink_to("real.safetensors")
    write_index(tmp_path, {"a": FIRST})
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


ESCAPES: dict[str, Callable[[Path, Path], str]] = {
    "absolute": lambda folder, outside: str(outside),
    "relative": lambda folder, outside: os.path.relpath(outside, folder),
    "device": lambda folder, outside: "/dev/zero",
}


@pytest.mark.parametrize("target", ESCAPES)
@pytest.mark.parametrize("indexed", [False, True])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, target: str, indexed: bool) -> None:
    folder = tmp_path / "snapshots" / "rev" if target == "relative" else tmp_path / "in"
    folder.mkdir(parents=True)
    outside = write_file(tmp_path / "secret.safetensors", a=(1,))
    (folder / FIRST).symlink_to(ESCAPES[target](folder, outside))
    if indexed:
        write_index(folder, {"a": FIRST})
    problem = refused(folder).problems[0]
    assert problem.what == "path leaves the folder" and problem.file == str(folder / FIRST)


def test_a_folder_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    write_file(tmp_path / "out" / "x.safetensors", a=(1,))
    (tmp_path / "in" / "part").symlink_to(tmp_path / "out")
    write_index(tmp_path / "in", {"a": "part/x.safetensors"})
    assert "path leaves the folder" in str(refused(tmp_path / "in"))


def test_an_index_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_file(tmp_path / "in" / FIRST, a=(1,))
    index = write_index(tmp_path, {"a": FIRST})
    (tmp_path / "in" / index.name).symlink_to(index)
    assert "path leaves the folder" in str(refused(tmp_path / "in"))


@pytest.mark.parametrize("target", ["nowhere", FIRST])
def test_broken_and_circular_links_are_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / FIRST).symlink_to(target)
    assert "missing or cannot be reached" in str(refused(tmp_path))
