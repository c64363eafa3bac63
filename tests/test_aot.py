"""The script that compiles ahead of time: what it reads of programs, on programs for eight fake CPU devices."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.aot import hlo, measure, programs, report, targets

LINES = """HloModule m, entry_computation_layout={()->f32[]}

%fused (param_0: f8e4m3fn[4,8,16]) -> bf16[4,8,16] {
  %param_0 = f8e4m3fn[4,8,16]{2,1,0} parameter(0)
  ROOT %convert.1 = bf16[64,8,16]{2,1,0} convert(%param_0)
}

%body (arg: (s32[], bf16[8,1,3]{2,0,1:T(8,128)(2,1)S(1)})) -> (s32[], bf16[8,1,3]) {
  %arg = (s32[], bf16[8,1,3]{2,0,1:T(8,128)}) parameter(0)
  %x = bf16[8,1,3]{2,0,1:T(8,128)(2,1)S(1)} get-tuple-element(%arg), index=1
  %all-reduce-start.1 = bf16[8,1,3]{2,0,1:T(8,128)} all-reduce-start(%x), channel_id=1, to_apply=%add
  %all-reduce-done.1 = bf16[8,1,3]{2,0,1} all-reduce-done(%all-reduce-start.1)
  %two = (f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)S(1)}) all-reduce(%a, %b), channel_id=2
  ROOT %out = (s32[], bf16[8,1,3]) tuple(%i, %all-reduce-done.1)
}

ENTRY %main.3 (p: f8e4m3fn[4,8,16]) -> bf16[4,8,16] {
  %p = f8e4m3fn[4,8,16]{2,1,0} parameter(0)
  %s = f32[32,2]{1,0} copy(%q)
  %while.1 = (s32[], bf16[8,1,3]) while(%init), condition=%cond, body=%body, backend_config={TRIPS}
  %gather = (bf16[2,16]{1,0}, bf16[8,16]{1,0}) all-gather-start(%s), channel_id=3, dimensions={0}
  %done = bf16[8,16]{1,0} all-gather-done(%gather)
  %big = f32[99,99]{1,0} fusion(%s), kind=kLoop, calls=%fused
  ROOT %fusion.1 = bf16[4,8,16]{2,1,0} fusion(%p), kind=kLoop, calls=%fused
}
"""
SAYING = LINES.replace("{TRIPS}", '{"known_trip_count":{"n":"62"}}')


def found(text: str, loops: int = 1):
    return {
        (own.operation, own.shape, own.result_bytes, own.times)
        for own in hlo.collectives(hlo.instructions(text), loops)
    }


def test_collectives_are_counted_as_often_as_their_loop_runs():
    gather = ("all-gather", "bf16[8,16]", 256, 1)
    assert found(SAYING) == {
        ("all-reduce", "bf16[8,1,3]", 48, 62),
        ("all-reduce", "f32[8], f32[8]", 64, 62),
        gather,
    }
    assert {own[3] for own in found(LINES, loops=7) - {gather}} == {7}
    assert {own[3] for own in found(SAYING, loops=7) - {gather}} == {62}


def test_kernels_are_what_a_gpu_runs():
    assert hlo.kernels(hlo.instructions(SAYING)) == 5  # copy, while, all-gather, two fusions


@pytest.mark.parametrize(
    ("matrices", "largest"),
    [
        ({16 * 8}, (1024, "bf16[4,8,16]")),
        ({99 * 99}, (99 * 99 * 4, "f32[99,99]")),
        ({64}, (256, "f32[32,2]")),
        ({5}, (0, "")),
    ],
)
def test_the_largest_weights_are_floats_in_memory_whose_last_axes_are_a_matrix(matrices, largest):
    assert hlo.largest_weights(hlo.instructions(SAYING), matrices) == largest


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ("f32[]", [4]),
        ("(bf16[2,3]{1,0:T(8,128)(2,1)}, u8[5], pred[7]{0}, s32[0])", [12, 5, 7, 0]),
        ("f8e4m3fn[4,8]{1,0}", [32]),
        ("f8e4m3b11fnuz[3]", [3]),
        ("token[]", []),
    ],
)
def test_bytes_of_types(shape, sizes):
    assert list(hlo.array_bytes(shape)) == sizes


# ---- real programs, of XLA's CPU compiler


def program(function, *arguments, kind="op", **fields):
    target = SimpleNamespace(kind="v5e", name="cpu x 8")
    return programs.Program(
        name="a program", kind=kind, target=target, function=function, arguments=arguments, **fields
    )


@pytest.fixture
def share():
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("expert"))


def test_a_program_within_its_limits_passes(share):
    x = targets.shape((16, 256), jnp.float32, share)
    row = measure.measure(program(lambda x: 2 * x, x, out=share, least_bytes=2 * 2 * 256 * 4))
    assert (row.argument_bytes, row.output_bytes, row.temporary_bytes) == (2048, 2048, 0)
    assert (row.collectives, row.error) == ((), "")
    assert row.checks == {
        "fits": True,
        "no collective": True,
        "temporaries below 5%": True,
        "traffic at most 1.25x": True,
    }
    assert row.passed


def test_a_collective_and_too_much_memory_fail(share, monkeypatch):
    x = targets.shape((16, 256), jnp.float32, share)
    kind = targets.Kind(platform="tpu", memory_bytes=1000, needs="nothing")
    monkeypatch.setitem(targets.KINDS, "v5e", kind)
    row = measure.measure(program(lambda x: x.sum(0), x, kind="load"))
    assert [own.operation for own in row.collectives] == ["all-reduce"]
    assert row.collectives[0].result_bytes == 256 * 4
    assert row.checks == {"fits": False, "no collective": False}
    assert not row.passed


def test_a_loop_over_layers_may_not_dequantise_them_all(share):
    codes = targets.shape((6, 8, 32, 64), jnp.int8, NamedSharding(share.mesh, PartitionSpec(None, "expert")))
    x = targets.shape((32,), jnp.float32, NamedSharding(share.mesh, PartitionSpec()))
    limits = {"kind": "decode", "matrices": frozenset({32 * 64}), "layer_bytes": 32 * 64 * 4}

    def layer(x, codes):
        summed = lax.psum(x @ lax.optimization_barrier(codes[0].astype(jnp.float32)), "expert")
        return summed[:32], None

    def one(x, codes):
        return lax.scan(layer, x, codes)[0]

    def all_at_once(x, codes):
        wide = lax.optimization_barrier(codes[:, 0].astype(jnp.float32))
        return lax.psum(lax.scan(lambda x, w: ((x @ w)[:32], None), x, wide)[0], "expert")

    verdicts = []
    for function in (one, all_at_once):
        specs = (PartitionSpec(), PartitionSpec(None, "expert"))
        spread = jax.shard_map(function, mesh=share.mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
        row = measure.measure(program(spread, x, codes, **limits))
        assert row.accessed_bytes is None
        verdicts.append(row.checks["one layer at a time"])
        assert row.checks["no weights between chips"]
    assert verdicts == [True, False]


def test_a_program_that_jaxlib_cannot_read_is_read_from_what_the_compiler_wrote(tmp_path):
    def newer():
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Unknown opcode")

    (tmp_path / "module_0000.jit_f.after_optimizations.txt").write_text(SAYING)
    (tmp_path / "module_0000.jit_f.before_optimizations.txt").write_text("")
    assert measure._text(SimpleNamespace(as_text=newer), tmp_path) == hlo.instructions(SAYING)


def test_what_does_not_compile_is_a_row_that_fails(share):
    def refuse(x):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 17G of 15.75G\nmore")

    row = measure.measure(program(refuse, targets.shape((8,), jnp.float32, share)))
    assert not row.passed
    assert row.error == "RESOURCE_EXHAUSTED: 17G of 15.75G"


# ---- the table


def row_of(**fields) -> measure.Row:
    return measure.Row(**{"target": "v5e x 8", "program": "decode", "checks": {"fits": True}} | fields)


def test_the_table_says_what_was_measured():
    moved = hlo.Collective(operation="all-reduce", shape="bf16[8,3072]", result_bytes=49152, times=62)
    rows = [
        row_of(
            argument_bytes=29_980_000_000, accessed_bytes=1.5e9, least_bytes=10**9, seconds=2e-3, collectives=(moved,)
        ),
        row_of(checks={"fits": False, "no collective": True}, kernels=2),
        row_of(checks={"compiles": False}, error="RESOURCE_EXHAUSTED"),
    ]
    text = report.markdown({"One": rows, "None": []}, {"jax": "1.2"}, "small")
    lines = [line for line in text.splitlines() if line.startswith("| v5e")]
    cells = ["v5e x 8", "decode", "29.98 GB", "0 B", "0 B", "1.5 GB (1.50x)", "2.00 ms", ""]
    cells += ["62 x all-reduce bf16[8,3072] (49.15 kB)", "PASS"]
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == cells
    assert lines[1].endswith("| 2 | none | FAIL: fits |")
    assert lines[2].endswith("| FAIL: compiles (RESOURCE_EXHAUSTED) |")
    assert {line.count("|") for line in lines} == {11}
    assert "jax 1.2" in text
    assert "## None" not in text
    found = json.loads(report.document({"One": rows}, {"jax": "1.2"}))
    assert found["sections"]["One"][0]["collectives"][0] | {"times": 62} == {**vars(moved)}
    assert "FAIL: fits" in report.line(rows[1])


def test_a_compiler_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(targets.KINDS, "v5e", targets.Kind(platform="tpu", memory_bytes=1, needs="no_such.module"))
    monkeypatch.setitem(targets.KINDS, "h100", targets.Kind(platform="cuda", memory_bytes=1, needs="json.decoder"))
    assert targets.missing("v5e") == "no_such.module"
    assert targets.missing("h100") is None
    assert targets.versions()["jax"] == jax.__version__


def test_operations_have_the_real_shapes_and_the_least_traffic(monkeypatch):
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))
    monkeypatch.setattr(targets.Target, "mesh", lambda self, **axes: mesh)
    cases = list(programs.operations(targets.Target(kind="v5e", topology="2x4", chips=8)))
    gate = next(case for case in cases if "group gate" in case.name)
    out = jax.eval_shape(gate.function, *gate.arguments)
    assert out.shape == (256, 3072, 2 * 1536)
    codes, scales = 2 * 32 * 1536 * 3072, 2 * 32 * 12 * 24 * 4
    assert gate.least_bytes == codes + scales + 2 * codes
    assert np.dtype(out.dtype) == jnp.bfloat16
