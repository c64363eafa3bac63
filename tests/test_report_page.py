"""The page of a report as text, and the command that writes it."""

import dataclasses
import html
import json
import os
import re
import shutil
import sys

import folders
import numpy as np
import pytest
from command_line import run, run_json
from helpers import random_hf
from report_cases import CONFIG, found, make, overview

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import JobError, LayoutError
from minimax_jax.jobs.difference import Difference
from minimax_jax.jobs.overview import Figures, Scaled
from minimax_jax.layout.specs import specs
from minimax_jax.page.render import render


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def seen(made):
    return overview(made / "hf")


def figures_of(page):
    return json.loads(re.search(r'id="figures">(.*?)</script>', page, re.DOTALL)[1])


def made_up(config):
    """Figures of all weights of a model, random where a page shows them one by one."""
    random = np.random.default_rng(0)
    for key, place in specs(config).places.items():
        if not place.is_scale:
            first, error = random.random(2)
            yield Figures(
                key=key,
                layer=place.entry.layer,
                expert=place.expert if place.entry.row.grouped else None,
                dtype="F8_E4M3",
                shape=place.entry.part_shape,
                squares=first,
                amax=1.0,
                scaled=Scaled(blocks=1, spread=error, errors=error, saturated=0, zeros=0, outliers=()),
                change=Difference(elements=9, differing=9, first_squares=first, error_squares=error),
            )


def test_a_page_of_the_published_size_is_small(seen):
    whole = synthetic.config(layers=62, experts=256)
    page = render(
        dataclasses.replace(
            seen,
            checkpoints=(dataclasses.replace(seen.checkpoints[0], config=whole),) * 2,
            scaled_dtypes=seen.scaled_dtypes * 2,
            weights=tuple(made_up(whole)),
            router_bias=np.random.default_rng(1).random((62, 256), np.float32),
            unusual=((), ()),
        )
    )
    assert len(page.encode()) < 6_000_000
    assert figures_of(page)["changes"]["data"][0]["z"]["shape"] == "62, 256"


def test_a_page_names_no_place_to_fetch_from_and_runs_no_text_of_a_checkpoint(tmp_path):
    name = "<img src=x onerror=alert(1)>"
    folders.write(tmp_path / name, random_hf(CONFIG), CONFIG)
    page = render(overview(tmp_path / name))
    assert "default-src 'none'" in page and not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert "<img" not in page and "&lt;img" in page


def test_a_path_that_is_not_text_is_written_out(made, tmp_path):
    folder = os.fsencode(tmp_path) + b"/h\xff"
    shutil.copytree(os.fsencode(made / "hf"), folder)
    stdout, _ = run("report", os.fsdecode(folder), made / "bf16", "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "h\\udcff" in stdout and re.search(r"<title>\S+/h\\udcff and ", page)
    assert f"From {tmp_path}/h\\udcff to" in page


def test_the_command_writes_the_page_and_tells_the_findings(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stdout, stderr = run("report", made / "hf")
    page = (tmp_path / "report.html").read_text()
    for text in found(overview(made / "hf")):
        assert text in stdout and text in html.unescape(page)
    assert stdout.splitlines()[-1].startswith("wrote report.html") and stderr == ""
    told, stderr = run_json("report", made / "hf", made / "bf16", "-o", "two.html", "--workers", 1)
    assert (told["page"], told["bytes"]) == ("two.html", (tmp_path / "two.html").stat().st_size) and stderr == ""
    assert [each["layout"] for each in told["checkpoints"]] == ["hf", "native"]
    assert [each["text"] for each in told["findings"]] == found(overview(made / "hf", made / "bf16"))
    assert {each["level"] for each in told["findings"]} <= {"warning", "note", "good"}


def test_verbose_shows_more_names(made):
    brief, full = (run("report", made / "hf", "-o", made / "page.html", *more)[0] for more in ([], ["-v"]))
    assert len(full.splitlines()) > len(brief.splitlines())


def test_an_old_page_stays_where_there_is_no_new_one(made, tmp_path):
    page = tmp_path / "report.html"
    synthetic.synthesize(tmp_path / "tiny")
    mj.report(tmp_path / "tiny", output=page)
    old = page.read_text()
    _, stderr = run("report", tmp_path / "nothing", "-o", page, code=3)
    assert "nothing" in stderr and page.read_text() == old
    with pytest.raises(LayoutError, match="architecture"):
        mj.report(made / "hf", tmp_path / "tiny", output=page)
    assert page.read_text() == old and [file.name for file in tmp_path.glob(".*")] == []
    with pytest.raises(JobError, match="report cannot be written"):
        mj.report(made / "hf", output=tmp_path / "no folder" / "report.html")


@pytest.mark.parametrize("module", ["plotly.io", "jinja2"])
def test_what_is_not_installed_is_named_before_any_work(made, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "minimax_jax.page.render")
    _, stderr = run("report", tmp_path / "nothing", "-o", tmp_path / "report.html", code=3)
    assert "pip install 'minimax_jax[report]'" in stderr and module in stderr
