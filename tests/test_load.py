import functools
import os
import subprocess
import sys

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import arrays, described, weight_files, write
from jax.sharding import AxisType, SingleDeviceSharding

import minimax_jax as mj
from minimax_jax.errors import FormatError, JobError, LayoutError
from minimax_jax.io.reader import Reader
from minimax_jax.models import load as loading
from minimax_jax.models import load_plan
from minimax_jax.models.load import load, load_model
from minimax_jax.models.minimax import MiniMaxForCausalLM
from minimax_jax.models.sharding import Rules, shardings
from minimax_jax.models.stack import stack_layers
from minimax_jax.synthetic import config, synthesize

CONFIG = config(experts=4, hidden_size=384, intermediate_size=192, num_attention_heads=8, num_key_value_heads=2)
"""Halves of hidden, halves of inter and thirds of both do not keep to blocks."""

MESHES = {
    "experts": ({"expert": 4}, None),
    "all three": ({"expert": 2, "tensor": 2, "fsdp": 2}, None),
    "within experts": ({"a": 3, "b": 2}, Rules(expert=None, inter="a", hidden="b", vocab="a", norm="b")),
    "more shards than KV heads": ({"tensor": 4}, Rules(router="tensor")),
    "a part of the devices": ({"fsdp": 3}, None),
}
ON_ANY_MESH = pytest.mark.parametrize("mesh", MESHES)


def mesh_of(axes):
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices)


def different(got, want):
    got, want = described(got), described(want)
    return [key for key in got.keys() | want.keys() if got.get(key) != want.get(key)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One model in every form that can be loaded."""
    path = tmp_path_factory.mktemp("load")
    synthesize(path / "hf-fp8", CONFIG, shard_bytes=2**21)
    synthesize(path / "hf-bf16", CONFIG, scaled="BF16")
    mj.convert(path / "hf-fp8", path / "native-fp8", to="native", dtype="fp8")
    mj.convert(path / "hf-fp8", path / "native-bf16", to="native", dtype="bf16")
    return path


@pytest.fixture(scope="module")
def whole(folder):
    """What an unsharded conversion makes of a form of the model."""

    return functools.cache(lambda form, dtype: mj.from_hf(mj.read_tree(folder / form), CONFIG, dtype=dtype))


@pytest.fixture
def small_units(monkeypatch):
    """So little memory for a unit that a shard takes several, and the last of them is smaller."""
    monkeypatch.setattr(load_plan, "_UNIT_BYTES", 400_000)
    monkeypatch.setattr(load_plan, "LEAST_UNIT_BYTES", 1)


# ---- the same values, on any mesh


@ON_ANY_MESH
def test_fp8_dequantised_equals_an_unsharded_conversion(folder, whole, mesh):
    check(folder / "hf-fp8", whole("hf-fp8", jnp.bfloat16), mesh, jnp.bfloat16)


@pytest.mark.parametrize("mesh", ["within experts", "more shards than KV heads"])
def test_fp8_kept_equals_an_unsharded_conversion(folder, whole, mesh):
    check(folder / "hf-fp8", whole("hf-fp8", None), mesh, None)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("hf-bf16", None),
        ("hf-bf16", jnp.float32),
        ("native-bf16", jnp.bfloat16),
        ("native-fp8", None),
        ("native-fp8", jnp.float32),
    ],
)
def test_other_forms_equal_an_unsharded_conversion(folder, whole, form, dtype):
    want = whole("hf-fp8" if form == "native-bf16" else form.replace("native", "hf"), dtype)
    check(folder / form, want, "within experts", dtype)


def check(path, want, mesh, dtype):
    axes, rules = MESHES[mesh]
    mesh = mesh_of(axes)
    got = load(path, mesh=mesh, rules=rules, dtype=dtype)
    assert different(got, want) == []
    scaled = any(isinstance(leaf, mj.BlockScaled) for leaf in want.values())
    wanted = shardings(CONFIG, mesh, rules=rules, scaled="F8_E4M3" if scaled else "BF16")
    assert jax.tree.leaves(jax.tree.map(lambda leaf: leaf.sharding, got)) == jax.tree.leaves(wanted)


@pytest.mark.parametrize(("form", "dtype"), [("hf-fp8", jnp.bfloat16), ("hf-fp8", None), ("native-fp8", jnp.bfloat16)])
def test_in_many_units(folder, whole, form, dtype, small_units):
    got = load(folder / form, mesh=mesh_of({"expert": 2}), dtype=dtype, workers=3)
    assert different(got, whole("hf-fp8", dtype)) == []


@pytest.mark.parametrize("dtype", [jnp.float16, None], ids=str)
def test_stacked(folder, whole, dtype, small_units):
    mesh = mesh_of({"expert": 2})
    got = load(folder / "hf-fp8", mesh=mesh, dtype=dtype, stacked=True)
    assert different(got, stack_layers(whole("hf-fp8", dtype), CONFIG)) == []
    wanted = shardings(CONFIG, mesh, scaled="F8_E4M3" if dtype is None else "BF16", stacked=True)
    assert jax.tree.leaves(jax.tree.map(lambda leaf: leaf.sharding, got)) == jax.tree.leaves(wanted)


def test_every_code_even_nan(tmp_path):
    cfg = helpers.config(num_local_experts=2, num_hidden_layers=1)
    hf = helpers.random_hf(cfg)
    for array in hf.values():
        if array.dtype == helpers.FP8:
            array.view(np.uint8)[:8, :32] = np.arange(256).reshape(8, 32)
    path = write(tmp_path / "model", hf, cfg)
    rules = Rules(expert=None, inter="x", q_heads=None, kv_heads=None, vocab=None)
    for dtype in (jnp.bfloat16, jnp.float32, None):
        got = load(path, mesh=mesh_of({"x": 2}), rules=rules, dtype=dtype)
        assert different(got, mj.from_hf(hf, cfg, dtype=dtype)) == []


def test_names_without_a_prefix(tmp_path, folder, whole):
    bare = write(tmp_path / "bare", helpers.without_prefix(arrays(folder / "hf-fp8")), CONFIG)
    assert different(load(bare, mesh=mesh_of({"expert": 2})), whole("hf-fp8", jnp.bfloat16)) == []


def test_without_a_mesh_all_goes_to_the_default_device(folder, whole):
    device = jax.devices()[5]
    with jax.default_device(device):
        got = load(folder / "hf-fp8", dtype=None)
    assert different(got, whole("hf-fp8", None)) == []
    assert {leaf.sharding for leaf in jax.tree.leaves(got)} == {SingleDeviceSharding(device)}


def test_arrays_survive_donation(folder, whole):
    # numpy memory that a CPU array shares must not be written to through another
    mesh = mesh_of({"data": 2})
    got = load(folder / "hf-bf16", mesh=mesh, dtype=None)
    name = "model.embed_tokens.weight"
    want = np.asarray(got[name])
    shards = [shard.data for shard in got[name].addressable_shards]
    jax.jit(lambda x: -x, donate_argnums=0)(shards[0]).block_until_ready()
    np.testing.assert_array_equal(helpers.bits(shards[1]), helpers.bits(want))


# ---- bytes


@ON_ANY_MESH
def test_one_process_reads_every_byte_once(folder, mesh, monkeypatch):
    counted = []
    preadv = os.preadv

    def count(fd, buffers, start):
        done = preadv(fd, buffers, start)
        counted.append(done)
        return done

    source = loading.open_source(folder / "hf-fp8")
    monkeypatch.setattr(loading, "open_source", lambda path, **_: source)  # headers are read before the count begins
    monkeypatch.setattr(os, "preadv", count)
    axes, rules = MESHES[mesh]
    moments = []
    load(folder / "hf-fp8", mesh=mesh_of(axes), rules=rules, dtype=None, progress=moments.append)
    assert sum(counted) == source.checkpoint.nbytes
    assert moments[-1].done_bytes == moments[-1].total_bytes == source.checkpoint.nbytes
    done = [moment.done_bytes for moment in moments]
    assert done == sorted(done)
    assert len(done) > 20


MEASURE = """
import sys
import jax, jax.numpy as jnp
import minimax_jax as mj

def status_bytes(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

jnp.zeros(8).block_until_ready()
with open("/proc/self/clear_refs", "w") as reset:  # getrusage would count the memory of the process before exec
    reset.write("5")
start = status_bytes("VmRSS")
tree = mj.load(sys.argv[1], max_memory_bytes=int(sys.argv[2]), workers=2)
print(status_bytes("VmHWM") - start - sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
"""


def test_host_memory_stays_within_the_budget(tmp_path):
    experts, budget_bytes = 12, 2**29  # arrays of 420 MB, from 220 MB of files
    synthesize(tmp_path / "model", config(real=True, layers=1, experts=experts, vocab_size=256), sparse=True)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "model"), str(budget_bytes)]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) <= budget_bytes


# ---- what cannot be


def test_a_file_that_is_cut_short_meanwhile_names_file_key_and_array(tmp_path, monkeypatch):
    synthesize(tmp_path / "model", CONFIG)
    (file,) = weight_files(tmp_path / "model")
    key = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    info = loading.open_source(tmp_path / "model").checkpoint.tensors[key]
    read_into = Reader.read_into

    def cut_and_read(self, location, start, buffer):
        if start == info.start:
            os.truncate(file, start + 100)
        read_into(self, location, start, buffer)

    monkeypatch.setattr(Reader, "read_into", cut_and_read)
    with pytest.raises(FormatError) as caught:
        load(tmp_path / "model", mesh=mesh_of({"expert": 4}), workers=1)
    problem = caught.value.problems[0]
    assert problem.file == str(file)
    assert problem.key == key
    assert "model.layers.1.mlp.experts.gate_and_up_projs: [0:192, 0:384]" in problem.what


def test_a_budget_that_is_too_small(folder):
    with pytest.raises(JobError, match="memory budget too small"):
        load(folder / "hf-fp8", max_memory_bytes=2**20)
    with pytest.raises(JobError, match="no workers"):
        load(folder / "hf-fp8", workers=0)


def test_rules_need_a_mesh_and_fit_it(folder):
    with pytest.raises(JobError, match="rules without a mesh"):
        load(folder / "hf-fp8", rules=Rules())
    with pytest.raises(JobError, match="does not divide"):
        load(folder / "hf-fp8", mesh=mesh_of({"expert": 3}))


def test_unsupported_arguments(folder, tmp_path):
    with pytest.raises(LayoutError, match="unsupported dtype of weights"):
        load(folder / "hf-fp8", dtype=jnp.float8_e4m3fn)
    with pytest.raises(FormatError):
        load(tmp_path / "nothing")
    with pytest.raises(JobError, match="Auto axes"):
        load_model(folder / "hf-fp8", mesh=jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Explicit,)))


def test_layers_of_several_dtypes_cannot_be_stacked_as_they_are(tmp_path, folder):
    hf = arrays(folder / "hf-fp8")
    key = "model.layers.1.self_attn.q_proj.weight"
    hf[key] = np.zeros(hf[key].shape, helpers.BF16)
    del hf[key + helpers.SUFFIX]
    path = write(tmp_path / "mixed", hf, CONFIG)
    with pytest.raises(LayoutError, match="layers differ in dtype") as caught:
        load(path, dtype=None, stacked=True)
    assert {problem.key for problem in caught.value.problems} == {"model.layers.self_attn.q_proj.weight"}
    stacked = load(path, dtype=jnp.bfloat16, stacked=True)
    assert different(stacked, stack_layers(mj.from_hf(hf, CONFIG), CONFIG)) == []


# ---- models


@pytest.mark.parametrize(("stacked", "axes"), [(False, {"expert": 2, "tensor": 2}), (True, {"expert": 2})])
def test_a_loaded_model_computes_what_an_unsharded_one_does(folder, whole, stacked, axes):
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 9)).astype(np.int32)
    forward = jax.jit(lambda model, tokens: model(tokens))
    want = forward(MiniMaxForCausalLM(CONFIG, whole("hf-fp8", jnp.float32), dtype=jnp.float32), tokens)
    model = load_model(folder / "hf-fp8", mesh=mesh_of(axes), dtype=jnp.float32, stacked=stacked)
    np.testing.assert_allclose(forward(model, tokens), want, rtol=0, atol=5e-6)  # of up to 1.4, 1e-6 was seen
    assert model.model.dtype == jnp.float32


def test_a_loaded_model_may_stay_fp8(folder):
    model = load_model(folder / "hf-fp8", mesh=mesh_of({"expert": 4}), dtype=None)
    layer = model.model.layers[0]
    weight = layer.mlp.experts.gate_and_up_projs.get_value()
    assert weight.values.sharding.shard_shape(weight.shape) == (1, 384, 384)
    assert model.model.dtype == jnp.bfloat16


def test_the_package_exports_the_names():
    assert mj.load is load
    assert mj.load_model is load_model
    assert mj.Rules is Rules
