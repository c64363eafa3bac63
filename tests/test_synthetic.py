import json
import math

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from minimax_jax.errors import JobError
from minimax_jax.io.checkpoint import INDEX_NAME, open_checkpoint
from minimax_jax.layout.check import survey
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.specs import specs
from minimax_jax.synthetic import REAL, TINY, config, synthesize, values

SUFFIX = "_scale_inv"
RAGGED = config(hidden_size=160, intermediate_size=200, vocab_size=70, layers=1, experts=3, num_experts_per_tok=1)
SMALL_BLOCKS = config(
    hidden_size=37, intermediate_size=22, vocab_size=70, head_dim=6, rotary_dim=4, weight_block_size=(5, 8)
)


def torch_tensors(folder):
    """Every tensor, as the safetensors library reads it."""
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def raw(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def file_names(folder):
    return {key: info.file.name for key, info in open_checkpoint(folder).tensors.items()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "fp8"
    synthesize(path)
    return path


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded") / "fp8"
    synthesize(path, shard_bytes=200_000)
    return path


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_tiny_is_under_one_megabyte_and_exercises_what_the_real_one_has(tiny):
    assert sum(file.stat().st_size for file in tiny.iterdir()) < 1_000_000
    assert TINY.num_hidden_layers >= 2 and TINY.num_local_experts >= 4
    assert 1 < TINY.num_key_value_heads < TINY.num_attention_heads
    assert TINY.rotary_dim < TINY.head_dim
    assert TINY.num_attention_heads * TINY.head_dim != TINY.hidden_size
    assert TINY.weight_block_size == (128, 128)
    assert TINY.intermediate_size % 128 and TINY.hidden_size > 128


# --- bytes ----------------------------------------------------------------------------------------------------------


def test_files_hold_the_values_whatever_the_shards_and_the_order(tiny, sharded, tmp_path):
    synthesize(tmp_path / "plain", shard_bytes=50_000, split_scales=False)
    expected = {key: values(key, TINY).tobytes() for key in specs(TINY).places}
    for folder in (tiny, sharded, tmp_path / "plain"):
        assert {key: raw(tensor) for key, tensor in torch_tensors(folder).items()} == expected


def test_the_same_call_writes_the_same_files(sharded, tmp_path):
    synthesize(tmp_path / "again", shard_bytes=200_000)
    names = sorted(file.name for file in sharded.iterdir())
    assert names == sorted(file.name for file in (tmp_path / "again").iterdir())
    assert all((sharded / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


# --- files ----------------------------------------------------------------------------------------------------------


def test_ragged_grids_count_the_last_part_block(tmp_path):
    synthesize(tmp_path / "ragged", RAGGED)
    tensors = torch_tensors(tmp_path / "ragged")
    prefix = "model.layers.0.block_sparse_moe.experts.1."
    assert tensors[prefix + "w1.weight"].shape == (200, 160)
    assert tensors[prefix + "w1.weight_scale_inv"].shape == (2, 2)
    assert tensors["model.layers.0.self_attn.k_proj.weight_scale_inv"].shape == (1, 2)
    assert tensors["model.layers.0.self_attn.k_proj.weight"].dtype == torch.float8_e4m3fn
    assert "model.layers.1.input_layernorm.weight" not in tensors


@pytest.mark.parametrize("scaled", ["F8_E4M3", "BF16", "F32"])
def test_what_is_written_is_a_checkpoint_of_its_config(tmp_path, scaled):
    synthesize(tmp_path / "out", SMALL_BLOCKS, scaled=scaled, shard_bytes=10_000)
    written = MiniMaxConfig.from_pretrained(tmp_path / "out")
    assert written == SMALL_BLOCKS.replace(weight_block_size=(5, 8) if scaled == "F8_E4M3" else None)
    checked = survey(open_checkpoint(tmp_path / "out").tensors, written)
    assert checked.layout == "hf" and checked.dtypes["model.layers.0.mlp.experts.down_projs"] == scaled


def test_a_config_without_blocks_gets_the_published_ones(tmp_path):
    synthesize(tmp_path / "out", TINY.replace(weight_block_size=None))
    assert MiniMaxConfig.from_pretrained(tmp_path / "out") == TINY


def test_shards_are_named_and_indexed_as_published(sharded):
    files = sorted(file.name for file in sharded.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    index = json.loads((sharded / INDEX_NAME).read_bytes())
    found = {}
    for name in files:
        with safe_open(sharded / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= dict.fromkeys(file.keys(), name)
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in torch_tensors(sharded).values())


def test_split_scales_lie_in_the_last_shard_away_from_their_weights(sharded, tmp_path):
    synthesize(tmp_path / "together", shard_bytes=200_000, split_scales=False)
    split, together = map(file_names, (sharded, tmp_path / "together"))
    weights = [key for key in split if key + SUFFIX in split]
    away = [key for key in weights if split[key + SUFFIX] == max(split.values()) != split[key]]
    assert len(weights) / 10 < len(away) < len(weights) / 2
    assert sum(together[key + SUFFIX] != together[key] for key in weights) < len(set(together.values()))


def test_the_full_published_size_as_sparse_files(tmp_path):
    synthesize(tmp_path / "real", REAL, sparse=True)
    itemsize = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
    keys, data_bytes, disk_bytes = set(), 0, 0
    for file in (tmp_path / "real").glob("*.safetensors"):
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(header_bytes))
        del header["__metadata__"]
        file_data_bytes = sum(math.prod(entry["shape"]) * itemsize[entry["dtype"]] for entry in header.values())
        assert file.stat().st_size == 8 + header_bytes + file_data_bytes
        keys |= header.keys()
        data_bytes += file_data_bytes
        disk_bytes += file.stat().st_blocks * 512
    assert len(keys) == 96_103
    assert data_bytes == 230_121_630_720
    assert disk_bytes < 40_000_000
    index = json.loads((tmp_path / "real" / INDEX_NAME).read_bytes())
    assert index["metadata"]["total_size"] == data_bytes and index["weight_map"].keys() == keys


def test_sparse_files_have_the_size_and_the_headers_of_real_ones(sharded, tmp_path):
    synthesize(tmp_path / "sparse", shard_bytes=200_000, sparse=True)
    assert (tmp_path / "sparse" / INDEX_NAME).read_bytes() == (sharded / INDEX_NAME).read_bytes()
    for file in sharded.glob("*.safetensors"):
        whole, outline = file.read_bytes(), (tmp_path / "sparse" / file.name).read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        assert outline == whole[:start] + bytes(len(whole) - start)


def test_progress_tells_the_bytes_done(tmp_path):
    told = []
    synthesize(tmp_path / "out", progress=told.append)
    total_bytes = sum(tensor.nbytes for tensor in torch_tensors(tmp_path / "out").values())
    assert [moment.total_bytes for moment in told] == [total_bytes] * len(specs(TINY).places)
    done = [moment.done_bytes for moment in told]
    assert done == sorted(set(done)) and done[-1] == total_bytes


# --- destinations ---------------------------------------------------------------------------------------------------


def test_a_taken_destination_is_refused_and_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "note").write_text("mine")
    for taken in ("file", "folder"):
        with pytest.raises(JobError, match="destination exists"):
            synthesize(tmp_path / taken)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder", "note"]


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a" / "b"):
        synthesize(path, sparse=True)
        assert (path / "model.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "empty"]


def test_a_parent_that_is_a_file_is_a_named_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match="cannot be written"):
        synthesize(tmp_path / "file" / "out")


def test_nothing_is_left_behind_by_a_stop_half_way(tmp_path):
    def stop(moment):
        if moment.done_bytes > moment.total_bytes / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "out", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_all_wrong_arguments_are_told_at_once(tmp_path):
    with pytest.raises(JobError) as caught:
        synthesize(tmp_path / "out", seed=-1, scaled="F16")
    assert [problem.what for problem in caught.value.problems] == [
        "seed must not be negative",
        "unsupported dtype of block-scaled weights",
    ]
    with pytest.raises(JobError, match="shard size"):
        synthesize(tmp_path / "out", shard_bytes=0)
    assert list(tmp_path.iterdir()) == []


# --- other readers --------------------------------------------------------------------------------------------------


def logits(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(torch.arange(24).reshape(2, 12) * 11 % 258).logits


def test_transformers_gives_the_same_finite_logits_for_fp8_and_float32(sharded, tmp_path):
    synthesize(tmp_path / "f32", scaled="F32")
    synthesize(tmp_path / "other", seed=1, scaled="F32")
    from_fp8, from_f32, other = logits(sharded), logits(tmp_path / "f32"), logits(tmp_path / "other")
    assert from_fp8.shape == (2, 12, TINY.vocab_size)
    assert torch.isfinite(from_fp8).all() and from_fp8.std() > 0.1
    assert torch.equal(from_fp8, from_f32)
    assert not torch.allclose(from_fp8, other, atol=0.1)


def test_transformers_loads_the_tokenizer(tiny):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    text = "MiniMax: 2 < 3, naïve, 智能"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert len(tokenizer) <= TINY.vocab_size
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257)
    generation = transformers.GenerationConfig.from_pretrained(tiny)
    assert (generation.bos_token_id, generation.eos_token_id) == (256, 257)
