"""The model card and the certificate that a conversion leaves, and what of a folder goes into what is made from it."""

import json
import re
import shutil
from types import SimpleNamespace

import folders
import pytest
from command_line import run, run_json
from huggingface_hub import ModelCard
from servers import Handler, serving

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import RequestError
from minimax_jax.jobs import streamed
from minimax_jax.jobs.loading import lines_to_load

CARD, CERTIFICATE = "README.md", "certificate.json"
TARGETS = ["native", "hf", "hf-fp8", "transformers-v5", "orbax", "maxtext", "maxtext-unscanned", "dcp"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "hf"
    synthetic.synthesize(folder, synthetic.config(layers=1, experts=2))
    return folder


def front(folder):
    """The front matter as the hub's own library reads it."""
    return ModelCard.load(folder / CARD).data.to_dict()


@pytest.mark.parametrize("to", TARGETS)
def test_every_target_has_a_card_that_says_what_it_is_and_how_it_is_loaded(made, tmp_path, to):
    mj.convert(made, tmp_path / "out", to=to)
    text = (tmp_path / "out" / CARD).read_text()
    form = to.removesuffix("-fp8")
    dtype = "F8_E4M3" if to == "hf-fp8" else "BF16"
    library = "transformers" if form in ("hf", "transformers-v5") else "minimax_jax"
    assert front(tmp_path / "out") == {"library_name": library, "tags": ["minimax_m2", "minimax_jax", form]}
    assert f"\n- layout: {form}\n- dtypes: {dtype};" in text
    assert "\n- made from: a checkpoint in the hf layout, weights in F8_E4M3\n" in text
    (code,) = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert code.splitlines() == list(lines_to_load(form, dtype, "'FOLDER'"))


def test_the_card_is_the_same_wherever_and_whenever_it_is_written(made, tmp_path):
    (tmp_path / "deep").mkdir()
    mj.convert(made, tmp_path / "one")
    made_elsewhere = tmp_path / "deep" / "source"
    synthetic.synthesize(made_elsewhere, synthetic.config(layers=1, experts=2))
    mj.convert(made_elsewhere, tmp_path / "deep" / "two", workers=1, shard_bytes=100_000)
    text = (tmp_path / "one" / CARD).read_text()
    assert text == (tmp_path / "deep" / "two" / CARD).read_text()
    assert str(tmp_path) not in text and "deep" not in text


@pytest.mark.parametrize("to", ["native", "orbax", "dcp"])
def test_a_card_that_somebody_wrote_goes_along(made, tmp_path, to):
    source = shutil.copytree(made, tmp_path / "source")
    (source / CARD).write_bytes(b"\xff theirs")
    mj.convert(source, tmp_path / "out", to=to)
    assert (tmp_path / "out" / CARD).read_bytes() == b"\xff theirs"


def test_a_card_of_ours_and_a_certificate_stay_where_they_are(made, tmp_path):
    run("convert", made, tmp_path / "native")
    mj.convert(tmp_path / "native", tmp_path / "back", to="hf-fp8")
    assert not (tmp_path / "back" / CERTIFICATE).exists()
    text = (tmp_path / "back" / CARD).read_text()
    assert "made from: a checkpoint in the native layout, weights in BF16" in text and "sha256" not in text


def test_a_card_whose_mark_was_taken_out_is_somebodys(made, tmp_path):
    mj.convert(made, tmp_path / "native")
    card = tmp_path / "native" / CARD
    card.write_text("\n".join(line for line in card.read_text().splitlines() if not line.startswith("<!--")))
    mj.convert(tmp_path / "native", tmp_path / "out", dtype="f32")
    assert (tmp_path / "out" / CARD).read_bytes() == card.read_bytes()


@pytest.mark.parametrize("name", ["org/a b", "a: b/c", "org", "org/a/b", '"]: x', ""])
def test_what_is_no_name_of_a_repository_is_not_taken_over(made, tmp_path, name):
    mj.convert(made, tmp_path / "native")
    card = tmp_path / "native" / CARD
    card.write_text(card.read_text().replace("tags:", f'base_model: "{name}"\ntags:'))
    mj.convert(tmp_path / "native", tmp_path / "back", to="hf")
    assert "base_model" not in front(tmp_path / "back")


def test_a_card_on_a_server_is_told_apart_as_well(made, tmp_path):
    pytest.importorskip("fsspec")
    mj.convert(made, tmp_path / "native")
    with serving(tmp_path, Handler) as server:
        mj.convert(f"{server.url}/native", tmp_path / "ours", to="hf")
        (tmp_path / "native" / CARD).write_text("theirs")
        mj.convert(f"{server.url}/native", tmp_path / "theirs", to="hf")
    assert "the native layout" in (tmp_path / "ours" / CARD).read_text()
    assert (tmp_path / "theirs" / CARD).read_text() == "theirs"


@pytest.mark.parametrize("to", ["hf-fp8", "orbax", "dcp"])
def test_the_command_leaves_a_certificate_that_holds_and_a_card_that_names_it(made, tmp_path, to):
    told, _ = run_json("convert", made, tmp_path / "out", "--to", to)
    assert mj.verify(tmp_path / "out", certificate=tmp_path / "out" / CERTIFICATE).good
    document = json.loads((tmp_path / "out" / CERTIFICATE).read_bytes())
    assert told["certified"] == document["checkpoints"][0]["sha256"]
    text = (tmp_path / "out" / CARD).read_text()
    assert told["certified"] in text and "- made from: a checkpoint in the hf layout, weights in F8_E4M3\n" in text
    assert CARD not in document["checkpoints"][0]["files"]
    assert document["checkpoints"][0]["path"] == str(tmp_path / "out")


def test_the_certificate_of_a_conversion_is_the_one_that_verify_writes(made, tmp_path):
    assert mj.convert(made, tmp_path / "out").certified is None
    mj.verify(tmp_path / "out", output=tmp_path / "of verify.json")
    shutil.rmtree(tmp_path / "out")
    mj.convert(made, tmp_path / "out", certify=True)
    assert (tmp_path / "out" / CERTIFICATE).read_bytes() == (tmp_path / "of verify.json").read_bytes()


def test_certify_leaves_the_same_in_a_folder_that_has_none_and_holds_it_against_one(made, tmp_path):
    done = mj.convert(made, tmp_path / "out", certify=True)
    before = folders.files(tmp_path / "out")
    assert mj.certify(tmp_path / "out") == done.certified
    (tmp_path / "out" / CERTIFICATE).unlink()
    assert mj.certify(tmp_path / "out") == done.certified
    assert folders.files(tmp_path / "out") == before


def test_an_attribute_that_is_ignored_in_the_source_is_in_the_output(made, tmp_path):
    source = shutil.copytree(made, tmp_path / "source")
    folders.edit_json(source / "config.json", sparkles=3)
    run("convert", source, tmp_path / "out", "--ignore-attribute", "sparkles")
    seen = mj.verify(tmp_path / "out", certificate=tmp_path / "out" / CERTIFICATE, ignore=["sparkles"])
    assert seen.good and "sparkles" in seen.checkpoints[0].unread


@pytest.fixture
def elsewhere(monkeypatch):
    """A target of another package, of a name that the command line knows, which makes no certificates."""

    def write(source, destination, **how):
        return mj.convert(source.path, destination)

    offered = SimpleNamespace(name="dcp", load=lambda: write)
    monkeypatch.setattr(streamed, "entry_points", lambda group: [offered])


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("options", "said"), [(["--no-certify"], None), (["--to", "dcp"], "the package that writes dcp")]
)
def test_without_a_certificate_the_reason_is_told_to_who_asked_for_none_of_it(made, tmp_path, options, said):
    stdout, _ = run("convert", made, tmp_path / "out", *options)
    lines = [line for line in stdout.splitlines() if line.startswith("cert")]
    assert [line.partition(", because ")[0] for line in lines] == ["certificate: none"] * (said is not None)
    assert said is None or said in lines[0]
    assert run_json("convert", made, tmp_path / "json", *options)[0]["certified"] is None
    assert not (tmp_path / "out" / CERTIFICATE).exists() and "sha256" not in (tmp_path / "out" / CARD).read_text()


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    "asked",
    [
        ["--certify", "--to", "dcp"],
        ["--push", "hf://org/name", "--to", "dcp"],
        ["--push", "hf://org/name", "--distributed"],
    ],
)
def test_what_could_not_be_certified_or_pushed_in_the_end_is_refused_at_the_start(made, tmp_path, asked):
    _, said = run("convert", made, tmp_path / "out", *asked, code=2)
    assert asked[0] in said
    assert not (tmp_path / "out").exists()


def test_a_push_without_a_certificate_is_refused(made, tmp_path):
    assert "--no-certify" in run("convert", made, tmp_path / "out", "--push", "hf://a/b", "--no-certify", code=2)[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("elsewhere")
def test_in_python_it_is_refused_as_well(made, tmp_path):
    with pytest.raises(RequestError, match="certify"):
        mj.convert(made, tmp_path / "out", certify=True, to="dcp")
    assert not (tmp_path / "out").exists()
