"""Orbax checkpoints: what `write` streams and `save` saves, against `from_hf`, the safetensors library and Orbax."""

import gc
import shutil
import subprocess
import sys

import folders
import jax
import numpy as np
import pytest
from helpers import FP8, bits, differences, native_of, quantize
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.dtypes import DTYPES
from minimax_jax.errors import ConfigError, FormatError, JobError, LayoutError, NumericError
from minimax_jax.io import orbax as files
from minimax_jax.io import points
from minimax_jax.jobs import orbax_plan
from minimax_jax.jobs.orbax import read, save, write
from minimax_jax.jobs.source import open_source
from minimax_jax.ops.scaled import BlockScaled

SUFFIX = "_scale_inv"
GATE_UP = "model.layers.0.mlp.experts.gate_and_up_projs"
BIAS = "model.layers.0.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An FP8 checkpoint in several files; among its tensors, one that is all zeros."""
    folder = tmp_path_factory.mktemp("source") / "hf"
    synthetic.synthesize(folder, synthetic.config(layers=1, experts=8), shard_bytes=300_000)
    folders.edit(folder, "model.layers.0.block_sparse_moe.e_score_correction_bias", lambda tensor: tensor * 0)
    return folder


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    """The source in Orbax, by dtype of its block-scaled weights."""
    folder = tmp_path_factory.mktemp("written")
    for dtype in ("BF16", "F32", "F8_E4M3"):
        write(open_source(source), folder / dtype, dtype=dtype)
    return folder


def stored(tree):
    """A tree with each `BlockScaled` taken apart."""
    parts = {}
    for key, leaf in tree.items():
        parts |= {key: leaf.values, key + SUFFIX: leaf.scale_inv} if isinstance(leaf, BlockScaled) else {key: leaf}
    return parts


def expected(source, dtype):
    keep = dtype == "F8_E4M3"
    return mj.from_hf(
        folders.arrays(source), mj.MiniMaxConfig.from_pretrained(source), dtype=None if keep else DTYPES[dtype]
    )


def assert_same(got, want):
    assert {key: type(leaf) is BlockScaled for key, leaf in got.items()} == {
        key: type(leaf) is BlockScaled for key, leaf in want.items()
    }
    assert differences(stored(got), stored(want)) == []
    for key, leaf in want.items():
        if isinstance(leaf, BlockScaled):
            assert (got[key].block, got[key].parts) == (leaf.block, leaf.parts)


# ---- streamed


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F8_E4M3"])
def test_what_is_written_is_what_from_hf_makes(source, written, dtype):
    got = read(written / dtype)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(got))
    assert_same(got, expected(source, dtype))


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_what_is_written_is_what_plain_numpy_makes(source, written, dtype):
    config = mj.MiniMaxConfig.from_pretrained(source)
    assert differences(read(written / dtype), native_of(folders.arrays(source), config, DTYPES[dtype])) == []


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_orbax_alone_loads_it_and_says_what_is_in_it(source, written, dtype):
    want = stored(expected(source, dtype))
    got = ocp.load(written / dtype)
    assert differences(got, want) == []
    told = ocp.metadata(written / dtype).metadata
    assert {key: (leaf.shape, leaf.dtype) for key, leaf in told.items()} == {
        key: (array.shape, array.dtype) for key, array in want.items()
    }
    assert not np.asarray(got[BIAS]).any()  # zeros are there, not left out


def test_side_files_and_config_lie_beside(source, written):
    for dtype, block in [("BF16", None), ("F8_E4M3", (128, 128))]:
        assert (written / dtype / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
        assert mj.MiniMaxConfig.from_pretrained(written / dtype).weight_block_size == block


def test_the_report_and_the_progress_add_up(source, tmp_path):
    moments = []
    report = write(open_source(source), tmp_path / "out", dtype="F8_E4M3", workers=1, progress=moments.append)
    tensors = folders.arrays(source)
    nbytes = sum(array.nbytes for array in tensors.values())
    assert (report.read_bytes, report.written_bytes) == (nbytes, nbytes)
    assert moments[-1].done_bytes == moments[-1].total_bytes == nbytes
    assert report.tensors == len(ocp.load(tmp_path / "out"))
    assert (report.kept_scales, report.fresh_scales) == (0, ())


def test_a_native_source_comes_out_the_same(source, written, tmp_path):
    mj.convert(source, tmp_path / "native", dtype="fp8")
    write(open_source(tmp_path / "native"), tmp_path / "out", dtype="BF16")
    assert_same(read(tmp_path / "out"), read(written / "BF16"))


def test_float_weights_get_back_their_source_scales(source, written, tmp_path):
    mj.convert(source, tmp_path / "native", dtype="bf16")
    report = write(open_source(tmp_path / "native"), tmp_path / "out", dtype="F8_E4M3")
    assert report.kept_scales == len(folders.scaled_weights(source))
    assert_same(read(tmp_path / "out"), read(written / "F8_E4M3"))


def test_float_weights_without_source_scales_get_fresh_ones(source, tmp_path):
    mj.convert(source, tmp_path / "hf", to="hf")
    report = write(open_source(tmp_path / "hf"), tmp_path / "out", dtype="F8_E4M3")
    assert set(report.fresh_scales) == folders.scaled_weights(source)
    weights, got = folders.arrays(tmp_path / "hf"), read(tmp_path / "out")
    for expert in (0, 7):
        codes, scales = quantize(weights[f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight"])
        down = got["model.layers.0.mlp.experts.down_projs"]
        assert np.array_equal(bits(down.values[expert]), bits(codes.T))
        assert np.array_equal(bits(down.scale_inv[expert]), bits(scales.T))


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_many_small_chunks_and_units_at_a_time_give_the_same(source, written, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(files, "CHUNK_BYTES", 40_000)  # several chunks in most arrays, the last one not full
    monkeypatch.setattr(orbax_plan, "_UNIT_BYTES", 1)  # an expert in each unit: several write to one chunk of scales
    write(open_source(source), tmp_path / "out", dtype=dtype, workers=4)
    assert len(list((tmp_path / "out" / "state" / "model.embed_tokens.weight").iterdir())) == 5  # 4 x 78 rows of 264
    assert_same(read(tmp_path / "out"), read(written / dtype))


@pytest.mark.parametrize(
    ("shape", "itemsize", "rows"),
    [
        ((256, 3072, 3072), 2, 1),  # gate and up, bfloat16: a file for each expert
        ((256, 3072, 3072), 4, 1),  # more than a chunk in one row
        ((256, 24, 24), 4, 256),  # their scales
        ((200064, 3072), 2, 5461),  # the embedding
        ((3072,), 2, 3072),
        ((1, 1), 1, 1),
    ],
)
def test_chunks_of_the_published_shapes(shape, itemsize, rows):
    assert files.chunk_rows(shape, itemsize) == rows


# ---- shardings


def mesh(*sizes):
    return jax.make_mesh(sizes, ("expert", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def sharded(tree, over, *, rows=None, cols=None):
    """A sharding for each leaf: grouped ones over both axes of a mesh, all else over none."""

    def of(leaf):
        grouped = len(leaf.shape) == 3
        return NamedSharding(over, P(rows, None, cols) if grouped else P())

    def both(leaf):
        if not isinstance(leaf, BlockScaled):
            return of(leaf)
        scales = NamedSharding(over, P(rows) if leaf.ndim == 3 else P())
        return BlockScaled.tree_unflatten((leaf.block, leaf.parts), (of(leaf), scales))

    return {key: both(leaf) for key, leaf in tree.items()}


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
@pytest.mark.parametrize("sizes", [(8, 1), (2, 4)])
def test_it_is_read_onto_a_mesh(source, written, dtype, sizes):
    want = expected(source, dtype)
    shardings = sharded(want, mesh(*sizes), rows="expert", cols="fsdp")
    got = read(written / dtype, shardings=shardings)
    assert_same(got, want)
    for leaf, own in zip(jax.tree.leaves(got), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding == own
    shape = jax.tree.leaves(got[GATE_UP])[0].addressable_shards[0].data.shape
    assert shape == (8 // sizes[0], 256, 144 // sizes[1])


def test_one_sharding_serves_all(source, written):
    everywhere = NamedSharding(mesh(4, 2), P())
    got = read(written / "F8_E4M3", shardings=everywhere)
    assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(got))
    assert_same(got, expected(source, "F8_E4M3"))


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_a_tree_saved_from_one_mesh_is_read_onto_another(source, dtype, tmp_path):
    config, want = mj.MiniMaxConfig.from_pretrained(source), expected(source, dtype)
    placed = jax.device_put(want, sharded(want, mesh(4, 2), rows="expert", cols="fsdp"))
    save(placed, config, tmp_path / "out")
    onto = sharded(want, mesh(2, 4), rows="fsdp")
    got = read(tmp_path / "out", shardings=onto)
    assert_same(got, want)
    assert jax.tree.leaves(got[GATE_UP])[0].addressable_shards[0].data.shape[0] == 2
    assert_same(read(tmp_path / "out"), want)
    held = mj.verify(tmp_path / "out", source).comparisons
    assert {found.relation for found in held} == ({"identical"} if dtype == "F8_E4M3" else {"identical", "equal"})


def test_shardings_that_are_missing_or_do_not_fit_are_told_at_once(source, written):
    over = mesh(8, 1)
    shardings = sharded(expected(source, "F8_E4M3"), over)
    del shardings[BIAS]
    shardings[GATE_UP] = NamedSharding(over, P())  # and none for its scales
    shardings["model.norm.weight"] = NamedSharding(over, P(None, "expert"))
    with pytest.raises(LayoutError) as caught:
        read(written / "F8_E4M3", shardings=shardings)
    found = {problem.key: problem.what for problem in caught.value.problems}
    missing, wrong = "no sharding is given", "sharding does not fit"
    assert found == {BIAS: missing, GATE_UP + SUFFIX: missing, "model.norm.weight": wrong}


# ---- refusals


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dtype": "F16"}, "no such dtype"),
        ({"workers": 0}, "no workers"),
        ({"max_memory_bytes": 10**8}, r"at least \d"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(source, tmp_path, options, told):
    with pytest.raises(JobError, match=told):
        write(open_source(source), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_destination_that_is_taken_is_left_alone(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(JobError, match="not an empty folder"):
        write(open_source(source), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]
    with pytest.raises(JobError, match="exists"):
        save(expected(source, "BF16"), mj.MiniMaxConfig.from_pretrained(source), tmp_path / "out")


def test_a_failure_leaves_nothing_behind(source, tmp_path):
    mj.convert(source, tmp_path / "native", dtype="bf16")
    folders.edit(tmp_path / "native", GATE_UP, lambda tensor: tensor * float("nan"))
    with pytest.raises(NumericError, match=r"layers\.0\."):
        write(open_source(tmp_path / "native"), tmp_path / "out", dtype="F8_E4M3")
    assert [file.name for file in tmp_path.iterdir()] == ["native"]


def test_without_orbax_the_extra_is_named(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(JobError, match=r"pip install 'minimax_jax\[orbax\]'"):
        write(open_source(source), tmp_path / "out")
    with pytest.raises(JobError, match="not installed"):
        read(tmp_path / "out")


def test_a_tree_that_is_not_the_configs_is_not_saved(source, tmp_path):
    config, tree = mj.MiniMaxConfig.from_pretrained(source), expected(source, "F8_E4M3")
    with pytest.raises(LayoutError, match="missing tensor"):
        save({key: leaf for key, leaf in tree.items() if key != BIAS}, config, tmp_path / "out")
    leaf = tree[GATE_UP]
    other = BlockScaled.tree_unflatten(((64, 128), leaf.parts), (leaf.values, leaf.scale_inv))
    with pytest.raises(LayoutError, match="wrong blocks of scales"):
        save({**tree, GATE_UP: other}, config, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---- damage


@pytest.fixture
def litter():
    """Orbax leaves behind coroutines of a load that failed: collected here, where nobody minds them."""
    yield
    gc.collect()


def chunk_of(folder, key):
    return max((folder / "state" / key).glob("[0-9]*"), key=lambda file: file.name)


def lose(file):
    shutil.rmtree(file) if file.is_dir() else file.unlink()


def shorten(file):
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("damage", "error", "told"),
    [
        (lambda folder: lose(chunk_of(folder, GATE_UP)), FormatError, "gate_and_up_projs"),
        (lambda folder: shorten(chunk_of(folder, GATE_UP)), FormatError, "gate_and_up_projs"),
        (lambda folder: lose(folder / "state" / GATE_UP), FormatError, "incomplete"),
        (lambda folder: lose(folder / "state" / "_METADATA"), FormatError, "incomplete"),
        (lambda folder: lose(folder / "state"), FormatError, "incomplete"),
        (lose, FormatError, "not an Orbax checkpoint"),
        (lambda folder: lose(folder / "config.json"), ConfigError, "config.json"),
        (lambda folder: folders.edit_json(folder / "config.json", vocab_size=77), LayoutError, "embed_tokens"),
    ],
)
def test_a_damaged_folder_is_a_named_error(written, tmp_path, litter, damage, error, told):
    folder = shutil.copytree(written / "F8_E4M3", tmp_path / "out")
    damage(folder)
    with pytest.raises(error, match=told):
        read(folder)


# ---- comparison with safetensors


@pytest.mark.parametrize(("dtype", "relations"), [("F8_E4M3", {"identical"}), ("BF16", {"identical", "equal"})])
def test_it_compares_with_the_source(source, written, dtype, relations):
    moments = []
    found = mj.verify(written / dtype, source, progress=moments.append).comparisons
    assert {comparison.key for comparison in found} == {
        key for key in folders.arrays(source) if not key.endswith(SUFFIX)
    }
    assert {comparison.relation for comparison in found} == relations
    assert moments[-1].done_bytes == moments[-1].total_bytes


def test_one_flipped_bit_is_found(source, written, tmp_path):
    folder = shutil.copytree(written / "BF16", tmp_path / "out")
    file = folder / "state" / GATE_UP / "0.0.0"
    data = bytearray(file.read_bytes())
    data[1] ^= 1  # expert 0, row 0, column 0: of gate
    file.write_bytes(data)
    found = mj.verify(folder, source).comparisons
    (changed,) = (comparison for comparison in found if comparison.relation == "different")
    assert (changed.key, changed.differing) == ("model.layers.0.block_sparse_moe.experts.0.w1.weight", 1)


def test_a_missing_chunk_is_damage_and_no_zeros(source, written, tmp_path):
    folder = shutil.copytree(written / "BF16", tmp_path / "out")
    lose(chunk_of(folder, BIAS))
    with pytest.raises(FormatError, match="e_score_correction_bias"):
        mj.verify(folder, source)


def test_another_model_is_not_compared(written, tmp_path):
    synthetic.synthesize(tmp_path / "other", synthetic.config(layers=2, experts=8))
    with pytest.raises(LayoutError, match="num_hidden_layers"):
        mj.verify(written / "BF16", tmp_path / "other")


# ---- as a source like any other


@pytest.mark.parametrize(
    ("stored", "to", "dtype"), [("F8_E4M3", "hf-fp8", "fp8"), ("BF16", "hf", "bf16"), ("F8_E4M3", "native", "bf16")]
)
def test_it_converts_to_what_the_native_folder_converts_to(source, written, tmp_path, stored, to, dtype):
    mj.convert(source, tmp_path / "native", dtype={"F8_E4M3": "fp8", "BF16": "bf16"}[stored])
    for name, start in (("ours", written / stored), ("theirs", tmp_path / "native")):
        mj.convert(start, tmp_path / name, to=to, dtype=dtype)
    ours, theirs = folders.files(tmp_path / "ours"), folders.files(tmp_path / "theirs")
    assert ours == theirs


def test_it_is_loaded_onto_a_mesh(source, written):
    loaded = mj.load(written / "F8_E4M3", mesh=mesh(2, 2), dtype=None)
    assert_same(loaded, expected(source, "F8_E4M3"))


def test_work_of_a_source_that_was_changed_is_refused(written, tmp_path, monkeypatch):
    folder = shutil.copytree(written / "BF16", tmp_path / "in")
    seen = []

    def stop(name):
        seen.append(name)
        if len(seen) == 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(points, "on_reach", stop)
        mj.convert(folder, tmp_path / "out", to="hf")
    file = folder / "state" / GATE_UP / "0.0.0"
    file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(JobError, match=r"source file .* differs"):
        mj.convert(folder, tmp_path / "out", to="hf")


def test_it_is_inspected_planned_and_read_as_views(source, written):
    seen = mj.inspect(written / "F8_E4M3")
    assert seen.layout == "native" and mj.plan(written / "F8_E4M3", to="hf-fp8").write_bytes
    assert_same(mj.read_tree(written / "F8_E4M3"), expected(source, "F8_E4M3"))


# ---- cross-checks


def test_orbax_reads_what_we_write_in_safetensors(source, tmp_path):
    mj.convert(source, tmp_path / "native", dtype="fp8")
    mj.convert(tmp_path / "native", tmp_path / "back", to="hf-fp8", shard_bytes=300_000)
    context = ocp.Context()
    context.checkpoint_layout = ocp.options.CheckpointLayout.SAFETENSORS
    with context:
        got = ocp.load(tmp_path / "back")
    assert any(array.dtype == FP8 for array in got.values())
    assert differences(got, folders.arrays(source)) == []


def test_orbax_is_not_imported_before_it_is_used():
    statement = "import sys, minimax_jax, minimax_jax.jobs.orbax, minimax_jax.jobs.orbax_source; "
    command = [sys.executable, "-c", statement + "print(*sys.modules)"]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "minimax_jax.io.orbax" in modules
    assert not {"orbax", "orbax.checkpoint", "tensorstore"} & set(modules)
