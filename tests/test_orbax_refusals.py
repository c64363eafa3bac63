"""What cannot be written, saved or read as an Orbax checkpoint is a named error, and nothing is left behind."""

import gc
import shutil
import sys

import folders
import pytest
from orbax_cases import BIAS, GATE_UP, expected

import minimax_jax as mj
from minimax_jax.errors import ConfigError, FormatError, JobError, LayoutError, NumericError
from minimax_jax.jobs.orbax import read, save, write
from minimax_jax.jobs.source import open_source
from minimax_jax.ops.scaled import BlockScaled

# ---- refusals


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dtype": "F16"}, "no such dtype"),
        ({"workers": 0}, "no workers"),
        ({"max_memory_bytes": 10**8}, r"at least \d"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(orbax_source, tmp_path, options, told):
    with pytest.raises(JobError, match=told):
        write(open_source(orbax_source), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_destination_that_is_taken_is_left_alone(orbax_source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(JobError, match="not an empty folder"):
        write(open_source(orbax_source), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]
    with pytest.raises(JobError, match="exists"):
        save(expected(orbax_source, "BF16"), mj.MiniMaxConfig.from_pretrained(orbax_source), tmp_path / "out")


def test_a_failure_leaves_no_more_than_what_is_done(orbax_source, tmp_path):
    mj.convert(orbax_source, tmp_path / "native", dtype="bf16")
    folders.edit(tmp_path / "native", GATE_UP, lambda tensor: tensor * float("nan"))
    with pytest.raises(NumericError, match=r"layers\.0\.") as caught:
        write(open_source(tmp_path / "native"), tmp_path / "out", dtype="F8_E4M3", workers=1)
    assert ["the same command goes on" in note for note in caught.value.__notes__] == [True]
    assert sorted(file.name for file in tmp_path.iterdir()) == [".out.partial", "native"]


def test_without_orbax_the_extra_is_named(orbax_source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(JobError, match=r"pip install 'minimax_jax\[orbax\]'"):
        write(open_source(orbax_source), tmp_path / "out")
    with pytest.raises(JobError, match="not installed"):
        read(tmp_path / "out")


def test_a_tree_that_is_not_the_configs_is_not_saved(orbax_source, tmp_path):
    config, tree = mj.MiniMaxConfig.from_pretrained(orbax_source), expected(orbax_source, "F8_E4M3")
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
def test_a_damaged_folder_is_a_named_error(orbax_written, tmp_path, litter, damage, error, told):
    folder = shutil.copytree(orbax_written / "F8_E4M3", tmp_path / "out")
    damage(folder)
    with pytest.raises(error, match=told):
        read(folder)


# ---- comparison with safetensors


def test_a_missing_chunk_is_damage_and_no_zeros(orbax_source, orbax_written, tmp_path):
    folder = shutil.copytree(orbax_written / "BF16", tmp_path / "out")
    lose(chunk_of(folder, BIAS))
    with pytest.raises(FormatError, match="e_score_correction_bias"):
        mj.verify(folder, orbax_source)
