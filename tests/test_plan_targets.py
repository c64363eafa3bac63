"""Plans of every target, also of those in files that other libraries write: held against what conversions do."""

import click
import pytest
from command_line import run, run_json
from test_streamed import Offered

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.cli import cli
from minimax_jax.errors import JobError, LayoutError, RequestError
from minimax_jax.jobs import front, streamed
from minimax_jax.jobs.streamed import StreamedPlan
from minimax_jax.jobs.targets import TARGETS

STREAMED = ("orbax", "dcp", "maxtext", "maxtext-unscanned")
GIB = 2**30


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "hf"
    synthetic.synthesize(folder, synthetic.config(layers=2, experts=4))
    return folder


def targets(command):
    (kind,) = (option.type for option in cli.commands[command].params if option.name == "to")
    assert isinstance(kind, click.Choice)
    return set(kind.choices)


def test_plan_knows_every_target_that_convert_knows(source):
    assert targets("plan") == targets("convert") == {*TARGETS, *STREAMED}
    for to in targets("plan"):
        assert run_json("plan", source, "--to", to)[0]["tensors"] > 0


@pytest.mark.parametrize("to", STREAMED)
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_what_is_planned_is_what_is_done(source, tmp_path, to, dtype):
    if (dtype, to[:7]) == ("fp8", "maxtext"):
        return
    planned = mj.plan(source, to=to, dtype=dtype, max_memory_bytes=GIB, workers=1)
    done = mj.convert(source, tmp_path / "out", to=to, dtype=dtype, max_memory_bytes=GIB, workers=1)
    assert isinstance(planned, StreamedPlan) and planned.workers == 1 and planned.units > 0
    assert planned.tensors == done.tensors and planned.read_bytes == done.read_bytes and planned.peak_bytes <= GIB
    assert planned.write_bytes <= done.written_bytes < 1.5 * planned.write_bytes
    assert done.read_tensors == mj.inspect(source).total.tensors
    text = str(planned.views().__iter__().__next__())
    assert f"to {to}, weights in" in text


@pytest.mark.parametrize("to", STREAMED)
def test_the_budget_that_an_error_names_is_the_least_that_works(source, to):
    with pytest.raises(JobError, match="memory budget too small") as caught:
        mj.plan(source, to=to, max_memory_bytes=1)
    (problem,) = caught.value.problems
    needed = int(problem.expected.removeprefix("at least ").partition(" ")[0].replace(",", ""))
    assert "max_memory_bytes (--max-memory)" in problem.remedy
    assert mj.plan(source, to=to, max_memory_bytes=needed).peak_bytes <= needed
    with pytest.raises(JobError, match="memory budget too small"):
        mj.plan(source, to=to, max_memory_bytes=needed - 1)


def test_a_probe_and_a_mesh_go_with_every_target(source, tmp_path):
    told = run_json("plan", source, "--to", "orbax", "--probe", tmp_path / "out", "--mesh", "expert=2,tensor=2")[0]
    assert told["probe"]["needed_bytes"] == told["write_bytes"] and told["mesh"]["devices"] == 4
    assert told["files"] == [] and "free in" in run("plan", source, "--to", "dcp", "--probe", tmp_path)[0]


def test_a_layout_that_a_target_cannot_read_is_refused_at_once(source, tmp_path):
    mj.convert(source, tmp_path / "v5", to="transformers-v5")
    with pytest.raises(LayoutError, match="cannot be loaded from this layout"):
        mj.plan(tmp_path / "v5", to="dcp")


def test_a_target_of_another_package_that_cannot_be_planned_says_so(source, monkeypatch):
    offered = Offered(lambda *_, **__: None)
    offered.module = "json"
    for module in (front, streamed):
        monkeypatch.setattr(module, "streamed_targets", lambda: {"elsewhere": offered})
    with pytest.raises(JobError, match="the target elsewhere cannot be planned"):
        mj.plan(source, to="elsewhere")


@pytest.mark.parametrize("to", ["maxtext", "maxtext-unscanned"])
def test_the_same_mistake_is_the_same_error_in_plan_and_convert(source, tmp_path, to):
    for attempt in (
        lambda: mj.plan(source, to=to, dtype="fp8"),
        lambda: mj.convert(source, tmp_path / "o", to=to, dtype="fp8"),
    ):
        with pytest.raises(RequestError, match="has no place for FP8") as caught:
            attempt()
        assert 'dtype="bf16" (--dtype bf16)' in str(caught.value)
