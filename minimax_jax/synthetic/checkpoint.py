"""Writing synthetic checkpoints: weights, index, config, tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias, get_args

from minimax_jax.errors import JobError, Problem, raise_if
from minimax_jax.io.checkpoint import INDEX_NAME
from minimax_jax.io.files import io_errors
from minimax_jax.io.folder import appearing
from minimax_jax.io.jsonfile import write_json_atomic
from minimax_jax.io.shards import DEFAULT_SHARD_BYTES, ShardLayout, TensorOut, index_of, lay_out
from minimax_jax.io.writer import Writer
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.specs import specs
from minimax_jax.progress import Progress, Ticker
from minimax_jax.synthetic.noise import Array, Scaled, bands
from minimax_jax.synthetic.sizes import FIRST_ID, LAST_ID, TINY

Listener: TypeAlias = Callable[[Progress], None]

_SPLIT_EVERY = 5
_MOST_WORKERS = 8  # beyond that they wait for the interpreter lock


def synthesize(
    path: str | Path,
    config: MiniMaxConfig = TINY,
    *,
    seed: int = 0,
    scaled: Scaled = "F8_E4M3",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    sparse: bool = False,
    split_scales: bool = True,
    progress: Listener | None = None,
) -> None:
    """Write a checkpoint: weights, index, config.json, a byte-level tokenizer (258 ids), generation_config.json.

    It is written under a temporary name beside `path` and renamed when it is whole.

    Args:
        path: a folder that does not exist or is empty; folders above it are made.
        config: its sizes, quantised or not; blocks are its own, or the published 128 x 128.
        seed: as in `values`.
        scaled: as in `values`; one seed gives the same model in every dtype.
        shard_bytes: most bytes of tensor data in one file.
        sparse: write headers alone, in files of the true size that take no room on the disk and read as zeros.
        split_scales: put every fifth tensor of scales at the end, away from its weight when there are several files.
        progress: called on this thread after each tensor; never when `sparse`.

    Raises:
        JobError: the destination is taken, an argument is out of range, the disk is full or fails.

    Examples:
        >>> from minimax_jax.synthetic import config
        >>> mj.synthesize("MiniMax-M2", config(layers=1, experts=8))
        >>> mj.inspect("MiniMax-M2").total.tensors
        65
    """
    raise_if(_argument_problems(seed, scaled), JobError)
    tensors = _ordered(config, scaled, split_scales)
    shards = lay_out(tensors, shard_bytes=shard_bytes)
    with appearing(path) as folder:
        if sparse:
            _write_outlines(folder, shards)
        else:
            with Writer(folder, shards) as writer:
                _fill(writer, tensors, lambda key: bands(key, config, seed=seed, scaled=scaled), progress)
                writer.finish()
        for name, content in _side_files(config, scaled).items():
            write_json_atomic(folder / name, content)


def _argument_problems(seed: int, scaled: str) -> Iterator[Problem]:
    if seed < 0:
        yield Problem(what="seed must not be negative", got=str(seed))
    if scaled not in get_args(Scaled):
        expected = " or ".join(get_args(Scaled))
        yield Problem(what="unsupported dtype of block-scaled weights", expected=expected, got=repr(scaled))


def _ordered(config: MiniMaxConfig, scaled: Scaled, split_scales: bool) -> list[TensorOut]:
    """Every tensor, in the order in which they lie in the files."""
    table = specs(config)
    tensors = [TensorOut(key=spec.key, dtype=spec.dtype, shape=spec.shape) for spec in table.hf(scaled)]
    if not split_scales:
        return tensors
    scales = [tensor.key for tensor in tensors if table.places[tensor.key].is_scale]
    late = frozenset(scales[::_SPLIT_EVERY])
    return sorted(tensors, key=lambda tensor: tensor.key in late)


def _fill(
    writer: Writer, tensors: Sequence[TensorOut], bands_of: Callable[[str], Iterator[Array]], progress: Listener | None
) -> None:
    def write(tensor: TensorOut) -> int:
        offset_bytes = 0
        for band in bands_of(tensor.key):
            writer.write(tensor.key, band, offset_bytes)
            offset_bytes += band.nbytes
        return offset_bytes

    ticker = Ticker(sum(tensor.nbytes for tensor in tensors), progress)
    workers = min(os.cpu_count() or 1, _MOST_WORKERS)
    with ThreadPoolExecutor(workers, thread_name_prefix="synthesize") as pool:
        for nbytes in pool.map(write, tensors):
            ticker.tick(nbytes)


def _write_outlines(folder: Path, shards: Sequence[ShardLayout]) -> None:
    """Headers and nothing behind them; `Writer` would reserve the room."""
    for shard in shards:
        file = folder / shard.file_name
        with io_errors(JobError, "file cannot be written", file), file.open("xb") as stream:
            stream.write(shard.header)
            stream.truncate(shard.file_bytes)
    if len(shards) > 1:
        write_json_atomic(folder / INDEX_NAME, index_of(shards))


def _side_files(config: MiniMaxConfig, scaled: Scaled) -> dict[str, dict[str, Any]]:
    """The JSON files beside the weights, by name."""
    stored = config.replace(weight_block_size=config.block if scaled == "F8_E4M3" else None)
    first, last = "<s>", "</s>"
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {first: FIRST_ID, last: LAST_ID}
    return {
        "config.json": stored.to_dict(),
        "generation_config.json": {"bos_token_id": vocab[first], "eos_token_id": vocab[last], "do_sample": False},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": first, "eos_token": last},
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [{"id": vocab[token], "content": token, **flags} for token in (first, last)],
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": []},
        },
    }
