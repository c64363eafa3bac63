"""Uploads by the hub's real client, against a stand-in of the hub's calls on this machine."""

import json
import sys

import folders
import pytest
import torch
from click.testing import CliRunner
from command_line import run_json
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file
from servers import COMMIT, serving
from upload_handler import UploadHandler

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.cli import cli
from minimax_jax.errors import FormatError, JobError, LayoutError
from minimax_jax.jobs import certifying
from minimax_jax.jobs.verify import verify

# Of the client, about how it calls the library that it builds on.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPOSITORY = "hf://org/made"
TOKEN = "hf_standin"
HTTP = sys.modules[errors.HTTPError.__module__]  # the library that the client builds on


@pytest.fixture
def hub(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's own waits
    with serving(tmp_path / "hub", UploadHandler) as running:
        for name, value in {
            "ENDPOINT": running.url,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_PROGRESS_BARS": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
        yield running


@pytest.fixture
def source(tmp_path):
    synthetic.synthesize(tmp_path / "hf", synthetic.config(layers=1, experts=2), shard_bytes=200_000)
    return tmp_path / "hf"


def convert(*arguments):
    return CliRunner().invoke(cli, ["convert", *map(str, arguments)], catch_exceptions=False)


def test_a_conversion_is_pushed_whole_with_certificate_and_card(source, hub, tmp_path, monkeypatch):
    (source / "README.md").unlink(missing_ok=True)
    readings = []
    monkeypatch.setattr(certifying, "verify", lambda *args, **more: readings.append(args) or verify(*args, **more))
    result = convert(source, tmp_path / "native", "--push", REPOSITORY, "--private", "--json")
    assert result.exit_code == 0, result.output
    assert len(readings) == 1  # and not again to push
    told = json.loads(result.stdout)["pushed"]
    assert told["commit"].endswith(COMMIT)
    assert folders.files(hub.folder / "repository") == folders.files(tmp_path / "native")
    assert {"certificate.json", "README.md", "config.json"} <= folders.files(tmp_path / "native").keys()
    assert json.loads((hub.folder / "created.json").read_bytes())["visibility"] == "private"
    tokens = {
        headers.get("authorization") for path, headers in zip(hub.requests, hub.headers, strict=True) if "org" in path
    }
    assert tokens == {f"Bearer {TOKEN}"}
    assert mj.verify(hub.folder / "repository", certificate=tmp_path / "native" / "certificate.json").good
    assert told["sha256"] in (tmp_path / "native" / "README.md").read_text()


def test_a_card_that_is_there_stays_and_a_second_push_is_the_same(source, hub):
    (source / "README.md").write_text("ours")
    assert not mj.push(source, REPOSITORY).card
    first = folders.files(hub.folder / "repository")
    assert first["README.md"] == b"ours"
    mj.push(source, REPOSITORY)
    assert folders.files(hub.folder / "repository") == first


def test_the_card_names_the_repository_that_it_came_from(source, hub):
    (source / "README.md").unlink(missing_ok=True)
    mj.push(source, REPOSITORY, origin=f"hf://MiniMaxAI/MiniMax-M2@{COMMIT}?keep=0")
    text = (source / "README.md").read_text()
    front = text.split("---\n")[1]
    assert front.splitlines() == [
        "library_name: transformers",
        'base_model: "MiniMaxAI/MiniMax-M2"',
        *("tags:", "- minimax_m2", "- minimax_jax", "- hf"),
    ]
    assert COMMIT not in text


@pytest.mark.parametrize("call", ["/api/repos/create", "/commit/main"])
def test_what_fails_leaves_the_output_whole_and_says_how_to_go_on(source, hub, tmp_path, call):
    hub.faults.status = lambda path: 403 if path.endswith(call) else None
    result = convert(source, tmp_path / "native", "--push", REPOSITORY)
    assert result.exit_code == 3
    assert f"minimax-jax push {tmp_path / 'native'} {REPOSITORY}" in " ".join(result.stderr.split())
    assert mj.verify(source, tmp_path / "native").good
    hub.faults.status = lambda path: None
    mj.push(tmp_path / "native", REPOSITORY)
    assert folders.files(hub.folder / "repository") == folders.files(tmp_path / "native")


@pytest.mark.parametrize(
    "error",
    [
        OSError(),
        RuntimeError(),
        ValueError(" \n"),
        HTTP.ReadTimeout(""),
        HTTP.ConnectError(""),
        ConnectionError("\n\n"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("call", ["create_repo", "upload_folder"])
def test_an_error_without_words_is_told_in_one_line_by_its_kind(source, hub, tmp_path, monkeypatch, call, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(f"huggingface_hub.HfApi.{call}", fail)
    result = CliRunner().invoke(cli, ["push", str(source), REPOSITORY])
    assert result.exit_code == 3
    lines = [line.strip() for line in result.stderr.splitlines()]
    assert lines[0] == "error: upload to the hub failed; the folder is whole"
    assert [line for line in lines if line.startswith(("file:", "got:"))] == [
        f"file: {REPOSITORY}",
        f"got: {type(error).__name__}",
    ]
    assert mj.verify(source, certificate=source / "certificate.json").good


@pytest.mark.parametrize("words", ["no room\nand a long story", "\n  no room  \n"])
def test_of_an_error_with_many_words_the_first_line_is_told(source, hub, monkeypatch, words):
    def fail(*_, **__):
        raise OSError(words)

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", fail)
    with pytest.raises(JobError, match="upload to the hub failed") as caught:
        mj.push(source, REPOSITORY)
    assert caught.value.problems[0].got == "no room"


def test_an_endpoint_that_is_no_url_is_told(source, hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "nonsense://127.0.0.1")
    with pytest.raises(JobError, match="upload to the hub failed") as caught:
        mj.push(source, REPOSITORY)
    assert caught.value.problems[0].got


def test_what_is_not_as_certified_is_not_pushed(source, hub):
    mj.verify(source, output=source / "certificate.json")
    folders.flip_bit(source, "model.norm.weight", 3)
    with pytest.raises(JobError, match="not what its certificate says"):
        mj.push(source, REPOSITORY)
    assert hub.requests == []


def test_a_certificate_of_other_files_with_the_same_tensors_does_not_go_up(source, hub):
    mj.verify(source, output=source / "certificate.json")
    file = next(source.glob("*.safetensors"))
    save_file(load_file(file), file, {"format": "pt"})
    assert mj.verify(source, certificate=source / "certificate.json").held.notes
    with pytest.raises(JobError, match="not what its certificate says"):
        mj.push(source, REPOSITORY)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["figures/key", ".key", ".hidden/key"])
def test_no_link_takes_a_file_of_elsewhere_along(source, hub, tmp_path, name):
    (tmp_path / "secret").write_text("of the user")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match="path leaves the folder") as caught:
        mj.push(source, REPOSITORY)
    assert caught.value.problems[0].file == str(source / name) and list((tmp_path / "hub").iterdir()) == []
    (source / name).unlink()
    (source / name).symlink_to(source / "tokenizer.json")
    mj.push(source, REPOSITORY)


def test_a_certificate_of_a_sample_is_no_ground_to_push(source, hub, tmp_path):
    mj.convert(source, tmp_path / "out")
    mj.verify(tmp_path / "out", sample="1", output=tmp_path / "out" / "certificate.json")
    with pytest.raises(JobError, match="sample"):
        mj.push(tmp_path / "out", REPOSITORY)
    assert hub.requests == []


def test_tensors_that_are_left_out_go_up_with_their_files_and_the_report_says_so(source, hub):
    vision = {"vision.norm.weight": torch.ones(2, 3)}
    save_file(vision, source / "more.safetensors")
    index = source / "model.safetensors.index.json"
    weight_map = json.loads(index.read_bytes())["weight_map"]
    folders.edit_json(index, weight_map=weight_map | dict.fromkeys(vision, "more.safetensors"))
    with pytest.raises(LayoutError, match=r"vision\.norm\.weight"):
        mj.push(source, REPOSITORY)
    assert hub.requests == []
    told, _ = run_json("push", source, REPOSITORY, "--leave-out", "vision")
    assert [part["tensors"] for part in told["left_out"]] == [list(vision)]
    there = hub.folder / "repository"
    assert folders.files(there) == folders.files(source) and "more.safetensors" in folders.files(there)
    assert not vision.keys() & json.loads((there / "certificate.json").read_bytes())["tensors"].keys()
    assert mj.verify(there, certificate=there / "certificate.json", leave_out=["vision"]).good


def test_a_card_of_ours_is_written_anew_and_keeps_what_it_knows(source, hub, tmp_path):
    mj.convert(source, tmp_path / "native")
    before = (tmp_path / "native" / "README.md").read_text()
    pushed = mj.push(tmp_path / "native", REPOSITORY, origin="hf://org/origin")
    after = (tmp_path / "native" / "README.md").read_text()
    assert pushed.card and pushed.sha256 in after and 'base_model: "org/origin"' in after
    made_from = "- made from: a checkpoint in the hf layout, weights in F8_E4M3"
    assert made_from in before.splitlines() and made_from in after.splitlines()
    mj.push(tmp_path / "native", REPOSITORY)
    assert (tmp_path / "native" / "README.md").read_text() == after


@pytest.mark.parametrize(
    "name", ["hf/model.safetensors", "hf/model.safetensors.index.json", "nowhere", "hf://org/tiny"]
)
def test_what_is_not_a_folder_is_not_pushed(source, hub, tmp_path, name):
    path = name if "://" in name else tmp_path / name
    with pytest.raises(JobError, match="not a folder") as caught:
        mj.push(path, REPOSITORY)
    assert caught.value.problems[0].got == str(path) and caught.value.problems[0].remedy
    assert hub.requests == []
    assert not {"certificate.json", "README.md"} & folders.files(source).keys()


BAD_NAMES = ["na me", "a--b", "-a", "a.", "a.git", "\u00e4", "a" * 100, "a:b"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_the_hub_does_not_take_are_refused_before_any_work(source, hub, tmp_path, name):
    result = convert(source, tmp_path / "native", "--push", f"hf://org/{name}")
    assert result.exit_code == 3 and "not a name that the hub takes" in result.stderr
    assert not (tmp_path / "native").exists() and hub.requests == []


@pytest.mark.parametrize("url", ["org/name", "hf://name", "hf://org/name@main", "hf://org/name/folder", "s3://a/b"])
def test_other_places_are_refused_before_any_work(source, tmp_path, url):
    assert convert(source, tmp_path / "native", "--push", url).exit_code == 3
    assert not (tmp_path / "native").exists()


def test_without_the_client_the_extra_is_named(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    result = convert(source, tmp_path / "native", "--push", REPOSITORY)
    assert result.exit_code == 3
    assert "minimax_jax[hub]" in result.stderr
    assert not (tmp_path / "native").exists()
