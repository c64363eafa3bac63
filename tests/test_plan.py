"""Plans: what a conversion will do, from headers alone. The whole published model stands by as sparse files."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import JobError, RequestError
from minimax_jax.jobs import budget, targets
from minimax_jax.jobs.budget import RUNTIME_BYTES
from minimax_jax.jobs.plan import Copy, Target, plan
from minimax_jax.jobs.report import plan_json
from minimax_jax.jobs.source import open_source

GIB = 2**30
FP8_BYTES, BF16_BYTES = 230_121_630_720, 457_477_079_040
"""Tensor bytes of the published model, and of its bf16 export with the router in float32."""

SCALES, SCALE_BYTES = 47_864, 55_520_256
TARGETS = [("native", "bf16"), ("native", "f32"), ("native", "fp8"), ("hf", "bf16"), ("hf", "f32"), ("hf-fp8", None)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "hf"
    synthetic.synthesize(folder, synthetic.REAL, sparse=True)
    return open_source(folder)


@pytest.fixture(scope="module")
def opened(little):
    return open_source(little)


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    """The published shapes with one layer and two experts."""
    folder = tmp_path_factory.mktemp("little") / "hf"
    synthetic.synthesize(folder, synthetic.config(real=True, layers=1, experts=2), sparse=True)
    return folder


def written(planned):
    """Bytes that the units write, by key."""
    found = Counter()
    for unit in planned.units:
        for output in planned.outputs(unit):
            assert output.offset_bytes >= 0
            found[output.key] += output.nbytes
    return dict(found)


# --- the whole published model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "to,dtype,tensors,nbytes",
    [
        ("native", "bf16", 2 * 62 + 251 + 4 * 62 + 2 * 62, BF16_BYTES),
        ("native", "fp8", 2 * 62 + 251 + 2 * 4 * 62 + 2 * 2 * 62, FP8_BYTES),
        ("hf", "bf16", 96_103 - SCALES, BF16_BYTES),
        ("hf-fp8", None, 96_103, FP8_BYTES),
    ],
)
def test_the_published_model_is_planned_to_the_byte(whole, to, dtype, tensors, nbytes):
    planned = plan(whole, targets.target(to, dtype), workers=2)
    sidecar = SCALE_BYTES if dtype == "bf16" and to == "native" else 0
    stored = [shard.tensors for shard in planned.shards]
    assert sum(map(len, stored)) == tensors
    assert sum(stop - start for shard in stored for start, stop in shard.values()) == nbytes
    assert planned.read_bytes == FP8_BYTES + sidecar  # scales are read twice: for the weights, and for the sidecar
    headers = sum(len(shard.header) for shard in (*planned.shards, *planned.sidecar))
    assert planned.write_bytes == nbytes + headers + sidecar
    assert planned.peak_bytes < 0.6 * 10**9
    sizes = {
        key: stop - start
        for shard in (*planned.shards, *planned.sidecar)
        for key, (start, stop) in shard.tensors.items()
    }
    assert written(planned) == sizes


def test_no_file_of_the_published_model_is_larger_than_asked(whole):
    for shard in plan(whole, targets.target("native"), shard_bytes=5 * 10**9).shards:
        data = sum(stop - start for start, stop in shard.tensors.values())
        assert data <= 5 * 10**9 or len(shard.tensors) == 1


def test_the_peak_does_not_depend_on_layers_and_experts(whole, little):
    large = plan(whole, targets.target("native", "f32"), workers=2)
    assert large.peak_bytes == mj.plan(little, dtype="f32", workers=2).peak_bytes


@pytest.mark.parametrize("dtype", ["bf16", "f32", "fp8"])
def test_by_default_there_are_as_many_workers_as_the_budget_holds(little, monkeypatch, dtype):
    monkeypatch.setattr(budget, "DEFAULT_WORKERS", 8)
    found = [mj.plan(little, dtype=dtype, max_memory_bytes=nbytes).workers for nbytes in (GIB, 2 * GIB, 4 * GIB)]
    assert found == [2, 6, 8]
    assert mj.plan(little, dtype=dtype, max_memory_bytes=4 * GIB, workers=1).workers == 1


# --- a pure function of headers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("to,dtype", TARGETS)
def test_the_same_headers_give_the_same_plan(little, to, dtype):
    def told(planned):
        units = [
            (unit.key, unit.start, unit.stop) if isinstance(unit, Copy) else (unit.entry.keys, unit.first)
            for unit in planned.units
        ]
        return plan_json(planned), units, [shard.header for shard in planned.shards]

    assert told(mj.plan(little, to=to, dtype=dtype)) == told(mj.plan(little, to=to, dtype=dtype))


def test_planning_writes_nothing_and_reads_no_tensor(little, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in (little, *little.iterdir())}
    for to, dtype in TARGETS:
        mj.plan(little, to=to, dtype=dtype)
    assert {file: file.stat().st_mtime_ns for file in (little, *little.iterdir())} == before
    assert list(tmp_path.iterdir()) == []
    assert sum(file.stat().st_blocks for file in little.iterdir()) * 512 < 10**6  # the tensors are holes still


def test_looking_and_planning_answer_without_jax(little):
    code = "import sys, minimax_jax as mj; mj.inspect(sys.argv[1]); mj.plan(sys.argv[1]); print('jax' in sys.modules)"
    command = [sys.executable, "-c", code, str(little)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"
    control = [sys.executable, "-c", code.replace("mj.plan(", "mj.from_hf; mj.plan("), str(little)]
    assert subprocess.run(control, capture_output=True, text=True, check=True).stdout == "True\n"


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("to,dtype", TARGETS)
def test_the_budget_that_an_error_names_is_the_least_that_works(little, to, dtype, workers):
    with pytest.raises(JobError, match="memory budget too small") as caught:
        mj.plan(little, to=to, dtype=dtype, workers=workers, max_memory_bytes=1)
    (problem,) = caught.value.problems
    needed = int(problem.expected.removeprefix("at least ").partition(" ")[0].replace(",", ""))
    assert (
        problem.got == "1 byte"
        and problem.expected.endswith(f"with {workers} worker{'s' * (workers > 1)}")
        and "max_memory_bytes (--max-memory)" in problem.remedy
    )
    assert mj.plan(little, to=to, dtype=dtype, workers=workers, max_memory_bytes=needed).peak_bytes <= needed
    with pytest.raises(JobError, match=f"{needed:,}"):
        mj.plan(little, to=to, dtype=dtype, workers=workers, max_memory_bytes=needed - 1)


@given(st.integers(0, 8 * GIB), st.integers(1, 64), st.sampled_from(TARGETS))
@settings(max_examples=40, deadline=None)
def test_no_plan_is_over_its_budget(opened, max_memory_bytes, workers, target):
    try:
        planned = plan(opened, targets.target(*target), max_memory_bytes=max_memory_bytes, workers=workers)
    except JobError:
        return
    assert planned.peak_bytes <= max_memory_bytes
    assert RUNTIME_BYTES + workers * max(unit.memory_bytes for unit in planned.units) <= max_memory_bytes


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_peak_is_that_of_the_largest_units_at_a_time(opened, workers):
    planned = plan(opened, targets.target("native"), workers=workers)
    largest = sorted((unit.memory_bytes for unit in planned.units), reverse=True)[:workers]
    assert planned.peak_bytes == RUNTIME_BYTES + sum(largest) and len(largest) == workers


def test_a_larger_budget_than_the_default_plans_the_same(little):
    assert plan_json(mj.plan(little)) == plan_json(mj.plan(little, max_memory_bytes=64 * GIB))


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"workers": -1}, {"shard_bytes": 0}, {"max_memory_bytes": -GIB}])
def test_numbers_that_make_no_sense_are_named(little, wrong):
    with pytest.raises(JobError, match=r"no workers|shard size|memory budget"):
        mj.plan(little, **wrong)


# --- targets ---------------------------------------------------------------------------------------------------------


def test_targets_have_names():
    assert targets.target("native") == Target(layout="native", dtype="BF16")
    assert targets.target("hf", "f32") == Target(layout="hf", dtype="F32")
    assert targets.target("hf-fp8") == targets.target("hf-fp8", "fp8") == targets.target("hf", "fp8")


@pytest.mark.parametrize("to,dtype", [("orbit", None), ("native", "fp4"), ("HF", None), ("hf-fp8", "bf16"), ("", "")])
def test_targets_that_make_no_sense_are_refused(little, to, dtype):
    with pytest.raises(RequestError, match=r"no such target|no such dtype|stores FP8"):
        mj.plan(little, to=to, dtype=dtype)
