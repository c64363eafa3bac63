"""Checkpoints of torch.distributed.checkpoint as sources: what torch saved is read here, without torch."""

import collections
import contextlib
import pickle
import shutil
import tracemalloc

import folders
import numpy as np
import pytest
import torch
from dcp_cases import Runs, plain, plain_of, saved
from helpers import config, random_hf
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex
from torch_modules import SIZES

import minimax_jax as mj
import torch_bridge.dcp
from minimax_jax.errors import ConfigError, FormatError, LayoutError
from minimax_jax.io import dcp
from minimax_jax.io.checkpoint import Checkpoint
from minimax_jax.io.dcp_reader import ChunkedArray, DcpReader
from minimax_jax.io.header import TensorInfo
from minimax_jax.jobs.source import open_source
from torch_bridge.arrays import to_torch

FILE = "__0_0.distcp"


def read(folder):
    """Every tensor of a folder, whole, as plain values."""
    contents = dcp.describe(folder)
    arrays = {key: ChunkedArray(each, contents.states).read_region(()) for key, each in contents.tensors.items()}
    return {key: plain(array) for key, array in arrays.items()}


def changed(folder, change):
    """Have torch's own table of contents changed."""
    file = folder / dcp.METADATA_NAME
    table = pickle.loads(file.read_bytes())
    change(table)
    file.write_bytes(pickle.dumps(table))


@pytest.fixture(scope="module")
def odd_ones():
    """Tensors that do not lie in memory row by row, of many dtypes, and what is no tensor."""
    numbers = torch.arange(105.0).reshape(5, 3, 7)
    dtypes = (torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2)
    whole = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    return {
        **{str(dtype): numbers.to(dtype) for dtype in (*dtypes, *whole)},
        "transposed": numbers.transpose(1, 2),
        "turned": numbers.permute(2, 0, 1),
        "part of another": numbers[1:3, :, 2:5],
        "repeated": numbers[:, :1].expand(5, 4, 7),
        "number": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
    }


@pytest.fixture(scope="module")
def folder(odd_ones, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("odd") / "dcp", {**odd_ones, "step": 3, "name": "x"})


def test_what_torch_saved_is_read_whatever_way_it_lies(odd_ones, folder):
    assert read(folder) == {key: plain_of(tensor) for key, tensor in odd_ones.items()}
    assert set(dcp.describe(folder).objects) == {"step", "name"}


@pytest.mark.parametrize("key", ["transposed", "turned", "part of another", "repeated"])
def test_boxes_are_read(odd_ones, folder, key):
    contents = dcp.describe(folder)
    array = ChunkedArray(contents.tensors[key], contents.states)
    for region in ((slice(1, 2),), (slice(0, 2), slice(1, 3)), (slice(1, 2), slice(0, 1), slice(1, 3)), (slice(1, 1),)):
        assert np.array_equal(array.read_region(region), odd_ones[key].numpy()[region])


# ---- a whole model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model by Hugging Face names with what a training saves beside it: as safetensors, and as torch saves it."""
    root, cfg = tmp_path_factory.mktemp("model"), config(**SIZES)
    folders.write(root / "hf", random_hf(cfg), cfg)
    tensors = {key: to_torch(array.copy()) for key, array in folders.arrays(root / "hf").items()}
    saved(root / "dcp", {**tensors, "optim": {"step": torch.tensor(1.0), "lr": 0.1}})
    shutil.copy(root / "hf" / "config.json", root / "dcp")
    return root


def test_a_training_checkpoint_is_a_source_as_any_other(model, tmp_path):
    source, how = model / "dcp", {"leave_out": ["optim."]}
    assert mj.verify(source, model / "hf", by="bytes", **how).good
    seen = mj.inspect(source, **how)
    assert "tensors, " in str(seen) and " files" not in str(seen)  # torch has as many as there were ranks
    assert seen.layout == "hf" and [each.name for each in open_source(source, **how).left_behind] == ["optim.lr"]
    mj.convert(source, tmp_path / "native", dtype="fp8", **how)
    assert mj.verify(tmp_path / "native", model / "hf").good
    with pytest.raises(LayoutError, match=r"optim\.step"):
        mj.inspect(source)


def test_a_model_saved_in_a_dict_beside_an_optimiser_has_its_own_names(model, tmp_path):
    tensors = {key: to_torch(array.copy()) for key, array in folders.arrays(model / "hf").items()}
    saved(tmp_path / "dcp", {"model": tensors, "optim": {"model.norm.weight": {"step": torch.tensor(1.0)}}, "step": 3})
    shutil.copy(model / "hf" / "config.json", tmp_path / "dcp")
    assert mj.verify(tmp_path / "dcp", model / "hf", by="bytes", leave_out=["optim."]).good


def test_rows_of_it_are_read_by_a_reader(model):
    source = open_source(model / "dcp", leave_out=["optim."])
    want = folders.arrays(model / "hf")
    with source.reader() as reader:
        for key, info in source.checkpoint.tensors.items():
            rows = reader.read(info, 1, info.shape[0])
            assert rows.tobytes() == want[key][1:].tobytes()
            last = bytearray(3)
            reader.read_into(info.file, info.nbytes - 3, last)
            assert bytes(last) == want[key].tobytes()[-3:]


@pytest.mark.parametrize("turned", [False, True])
def test_reading_takes_the_memory_of_what_is_read(tmp_path, turned):
    """However a tensor lies: a range of its rows is a little of each column where those lie one behind the other."""
    tensor = torch.arange(2**22, dtype=torch.int32).reshape(64, -1)
    folder = saved(tmp_path / "dcp", {"x": tensor.T.contiguous().T if turned else tensor})
    contents = dcp.describe(folder)
    info = TensorInfo(key="x", dtype="I32", shape=tuple(tensor.shape), file=folder / "x", start=0, stop=2**24)
    of_all = Checkpoint(path=folder, tensors={"x": info}, metadata={}, files=(), index_file=None, states={})
    with DcpReader(of_all, contents) as reader:
        for first, stop in ((0, 1), (3, 13), (0, 64)):
            tracemalloc.start()
            rows = reader.read(info, first, stop)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert np.array_equal(rows, tensor[first:stop].numpy()) and peak < rows.nbytes + 2**20 + 2**22 * turned
        parts = [bytearray(2**18 + 7) for _ in range(3)]  # as they are read for a digest
        for number, part in enumerate(parts):
            reader.read_into(info.file, number * len(part), part)
    assert b"".join(parts) == tensor.numpy().tobytes()[: 3 * len(parts[0])]


def test_without_a_config_the_file_is_named(folder):
    with pytest.raises(ConfigError, match=r"copy the model's config\.json into it"):
        mj.inspect(folder)


def test_a_file_that_changes_while_it_is_read_is_an_error(model, tmp_path):
    source = open_source(shutil.copytree(model / "dcp", tmp_path / "dcp"), leave_out=["optim."])
    with pytest.raises(FormatError, match="changed or replaced"), source.reader():
        (tmp_path / "dcp" / dcp.METADATA_NAME).touch()


# ---- damage


def lose_a_file(folder):
    (folder / FILE).rename(folder / "other.distcp")


def cut_a_file(folder):
    with (folder / FILE).open("r+b") as file:
        file.truncate((folder / FILE).stat().st_size // 2)


def cut_the_table(folder):
    file = folder / dcp.METADATA_NAME
    file.write_bytes(file.read_bytes()[:-20])


def lose_a_chunk(folder):
    changed(folder, lambda table: table.state_dict_metadata["turned"].chunks.clear())


def repeat_a_chunk(folder):
    changed(folder, lambda table: table.state_dict_metadata["turned"].chunks.extend(_parts(table, [(6, 1)])))


def move_a_chunk(folder):
    """As many elements as the tensor has, but not of each place one."""
    parts = [(0, 4), (3, 3)]
    changed(folder, lambda table: setattr(table.state_dict_metadata["turned"], "chunks", _parts(table, parts)))


def _parts(table, parts):
    """Chunks of a tensor from some row on, and of how many."""
    for first, _ in parts:
        place = MetadataIndex("turned", (first, 0, 0))
        table.storage_data[place] = table.storage_data[MetadataIndex("turned", (0, 0, 0))]
    return [ChunkStorageMetadata(torch.Size((first, 0, 0)), torch.Size((rows, 5, 3))) for first, rows in parts]


def store_a_chunk_nowhere(folder):
    changed(folder, lambda table: table.storage_data.pop(MetadataIndex("turned", (0, 0, 0))))


def leave_the_folder(folder):
    changed(folder, lambda table: setattr(next(iter(table.storage_data.values())), "relative_path", "../x.distcp"))


def compress(folder):
    changed(folder, lambda table: setattr(next(iter(table.storage_data.values())), "transform_descriptors", ["zstd"]))


def make_it_no_table(folder):
    changed(folder, lambda table: table.__setattr__("state_dict_metadata", [BytesStorageMetadata()]))


DAMAGE = {
    lose_a_file: "missing",
    cut_a_file: "truncated",
    cut_the_table: "table of contents cannot be read",
    lose_a_chunk: "gaps or overlaps",
    repeat_a_chunk: "gaps or overlaps",
    move_a_chunk: "gaps or overlaps",
    store_a_chunk_nowhere: "stored nowhere",
    leave_the_folder: "no file of the folder",
    compress: "extension",
    make_it_no_table: "no tables of tensors",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_named_before_anything_is_read(folder, tmp_path, damage):
    copy = shutil.copytree(folder, tmp_path / "dcp")
    damage(copy)
    with pytest.raises(FormatError, match=DAMAGE[damage]) as caught:
        dcp.describe(copy)
    assert damage is lose_a_file or "remedy: " in str(caught.value)


def test_a_table_of_contents_alone_is_told_as_a_part_of_a_checkpoint(folder, tmp_path):
    shutil.copy(folder / dcp.METADATA_NAME, tmp_path)
    with pytest.raises(FormatError, match=r"a part of a checkpoint of torch.*\n.*\n.*and \*\.distcp files"):
        mj.inspect(tmp_path)


def test_a_chunk_that_is_another_than_the_table_says_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "dcp")

    def swap(table):
        one, other = (MetadataIndex(f"torch.{dtype}", (0, 0, 0)) for dtype in ("int8", "uint8"))
        table.storage_data[one], table.storage_data[other] = table.storage_data[other], table.storage_data[one]

    changed(copy, swap)
    with pytest.raises(FormatError, match="another chunk than the table of contents says") as caught:
        read(copy)
    assert "I8 [5, 3, 7]" in str(caught.value) and "U8 [5, 3, 7]" in str(caught.value)


# ---- code in tables


def test_nothing_that_a_table_names_is_run(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "dcp")
    mark = tmp_path / "it-ran"
    changed(copy, lambda table: setattr(table, "planner_data", Runs(mark)))
    assert dcp.describe(copy).tensors.keys() == dcp.describe(folder).tensors.keys()  # that part of it is of no use here
    with pytest.raises(FormatError, match="would run code"):
        torch_bridge.dcp.load({}, copy)
    assert not mark.exists()
    with contextlib.closing(pickle.loads((copy / dcp.METADATA_NAME).read_bytes()).planner_data):
        assert mark.exists()


def test_no_other_table_than_the_one_that_was_looked_at_is_loaded(folder, tmp_path):
    """torch takes a table of one process where that of all is false, as an empty dict is."""
    copy = shutil.copytree(folder, tmp_path / "dcp")
    mark = tmp_path / "it-ran"
    table = collections.OrderedDict()
    table.__dict__.update(pickle.loads((copy / dcp.METADATA_NAME).read_bytes()).__dict__, state_dict_metadata={})
    (copy / dcp.METADATA_NAME).write_bytes(pickle.dumps(table))
    (copy / "__0.metadata").write_bytes(pickle.dumps(Runs(mark)))
    with pytest.raises(FormatError, match="no table of contents"):
        torch_bridge.dcp.load({}, copy)
    assert not mark.exists()
