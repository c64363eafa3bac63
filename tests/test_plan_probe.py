"""`plan --probe` and `plan --mesh`: rates and room without a trace; what devices would hold against what they do."""

import os
import shutil
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import run, run_json
from jax.sharding import AxisType

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.jobs import probe as probing
from minimax_jax.jobs.probe import probe
from minimax_jax.jobs.report import duration
from minimax_jax.jobs.source import open_source
from minimax_jax.models.mesh_plan import mesh_plan

CONFIG = synthetic.config(layers=2, experts=8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    synthetic.synthesize(root / "hf", CONFIG, shard_bytes=100_000)
    return root


# --- the probe -------------------------------------------------------------------------------------------------------


def everything(folder):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_probe_measures_and_leaves_nothing_behind(made, tmp_path):
    before = everything(made)
    told, stderr = run_json("plan", made / "hf", "--probe", tmp_path / "not" / "yet")
    seen = told["probe"]
    assert list(tmp_path.iterdir()) == [] and everything(made) == before and stderr == ""
    assert seen["folder"] == str(tmp_path) and seen["needed_bytes"] == told["write_bytes"] and seen["fits"]
    assert 0 < seen["read_bytes"] <= mj.inspect(made / "hf").total.nbytes and seen["read_bytes_per_second"] > 0
    assert 0 < seen["written_bytes"] <= probing.MOST_BYTES and seen["write_bytes_per_second"] > 0
    both = [told[f"{name}_bytes"] / seen[f"{name}_bytes_per_second"] for name in ("read", "write")]
    assert seen["seconds"] == pytest.approx([max(both), sum(both)], rel=0.01, abs=2e-3)
    stdout, _ = run("plan", made / "hf", "--probe", tmp_path)
    assert "free in" in stdout and "read at" in stdout and "at these rates" in stdout and "warning" not in stdout
    assert run_json("plan", made / "hf")[0]["probe"] is None


def test_a_probe_of_a_large_source_is_bounded(tmp_path):
    synthetic.synthesize(tmp_path / "real", synthetic.config(real=True, layers=2), sparse=True)
    seen = probe(mj.plan(tmp_path / "real"), tmp_path)
    assert 0.9 * probing.MOST_BYTES < seen.read_bytes <= probing.MOST_BYTES
    assert len(list(tmp_path.iterdir())) == 1


def test_too_small_a_disk_is_told(made, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - 1000, 1000))
    told, _ = run_json("plan", made / "hf", "--probe", tmp_path, code=1)
    assert (told["probe"]["free_bytes"], told["probe"]["fits"]) == (1000, False)
    assert told["probe"]["written_bytes"] == 0 and told["probe"]["seconds"] is None
    assert "warning: not enough room: " in run("plan", made / "hf", "--probe", tmp_path, code=1)[0]


def test_an_interrupted_probe_leaves_nothing_behind(made, tmp_path, monkeypatch):
    def stop(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        probe(mj.plan(made / "hf"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(made):
    assert "cannot be written" in run("plan", made / "hf", "--probe", "/proc/no", code=3)[1]


@pytest.mark.parametrize("length", [246, 247, 300])
def test_a_name_that_no_conversion_could_make_is_refused(made, tmp_path, length):
    longest = os.pathconf(tmp_path, "PC_NAME_MAX") - len("..partial")
    destination = tmp_path / ("x" * length)
    if length <= longest:
        run("plan", made / "hf", "--probe", destination)
        return
    told = run("plan", made / "hf", "--probe", destination, code=3)[1]
    assert "name too long" in told and "choose a shorter one" in told and "Traceback" not in told
    assert "File name too long" in run("convert", made / "hf", destination, code=3)[1]  # as would be


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (99.4, "99 s"), (100, "1 min 40 s"), (3600, "1 h 00 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


# --- the mesh --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F32"])
@pytest.mark.parametrize(
    "mesh", [{"expert": 8}, {"expert": 4, "tensor": 2}, {"fsdp": 4, "tensor": 2}, {"data": 8}], ids=str
)
def test_a_device_holds_what_was_planned(made, mesh, dtype):
    source = open_source(made / "hf")
    planned = mesh_plan(source, mesh, dtype=dtype)
    devices = jax.make_mesh(tuple(mesh.values()), tuple(mesh), axis_types=(AxisType.Auto,) * len(mesh))
    kept = {"BF16": jnp.bfloat16, "F32": jnp.float32, "F8_E4M3": None}[dtype]
    tree = mj.load(made / "hf", mesh=devices, dtype=kept)
    held: dict[str, int] = {}
    names = {entry.native: entry.row.native for entry in source.survey.entries}
    for name, leaf in tree.items():
        for array in jax.tree.leaves(leaf):
            (shard,) = (one for one in array.addressable_shards if one.device == devices.devices.flat[0])
            held[names[name]] = held.get(names[name], 0) + shard.data.nbytes
    assert {share.kind: share.device_bytes for share in planned.shares} == held
    assert planned.devices == 8 and planned.device_bytes == sum(held.values())


def test_what_divides_reads_what_it_holds_and_what_does_not_reads_more(made):
    source = open_source(made / "hf")
    whole = mesh_plan(source, {"expert": 8}, dtype="F8_E4M3")
    assert whole.read_bytes == whole.device_bytes and whole.warnings == ()
    cut = mesh_plan(source, {"fsdp": 4}, dtype="F8_E4M3")  # hidden 256 in shards of 64, blocks of 128
    assert sum("cut blocks of 128" in warning for warning in cut.warnings) == 6
    assert all("along hidden" in warning for warning in cut.warnings)
    apart = (
        cut.device_bytes - sum(np.prod(spec.shape) for spec in source.survey.specs.hf() if spec.dtype == "F8_E4M3") / 4
    )
    scales = sum(spec.nbytes for spec in source.survey.specs.hf() if spec.key.endswith("_scale_inv"))
    assert apart > scales  # every device holds all of the scales


def test_heads_that_stay_whole_axes_that_do_nothing_and_what_does_not_divide(tmp_path):
    config = synthetic.config(layers=1, experts=8)
    synthetic.synthesize(tmp_path / "hf", config)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    assert heads > kv_heads
    mesh = f"expert=2,tensor={heads},data=3"
    told = run_json("plan", tmp_path / "hf", "--mesh", mesh)[0]["mesh"]
    assert told["devices"] == 6 * heads and told["by_kind"] and len(told["warnings"]) >= 2
    assert any(f"{kv_heads} KV heads" in warning for warning in told["warnings"])
    assert any("nothing is split over data=3" in warning for warning in told["warnings"])
    told = run_json("plan", tmp_path / "hf", "--mesh", "expert=3", code=1)[0]["mesh"]
    assert told["by_kind"] == {} and told["read_bytes"] == 0
    assert all("does not divide" in warning and "multiple of 3" in warning for warning in told["warnings"])
    stdout, _ = run("plan", tmp_path / "hf", "--mesh", "expert=3", code=1)
    assert "cannot be loaded onto a mesh of expert=3" in stdout and "warning: axis expert" in stdout


@pytest.mark.parametrize(
    "mesh", ["expert", "expert=0", "expert=-1", "=4", "expert=4,expert=2", "a b=2", "", "expert=²"]
)
def test_what_is_no_mesh_is_refused(made, mesh):
    assert "is not a mesh such as" in run("plan", made / "hf", "--mesh", mesh, code=2)[1]


def test_many_files_are_cut_short_unless_all_are_wanted(made):
    short, whole = (run("plan", made / "hf", "--shard-size", "1kB", *more)[0] for more in ([], ["-v"]))
    count = len(run_json("plan", made / "hf", "--shard-size", "1kB")[0]["files"]) - 1
    assert whole.count("model-0") == count > 20 and short.count("model-0") == 20
    assert f"... and {count - 20} more files" in short and "source_scales" in short
