from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_model import pair, random_ids
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import minimax_jax as mj
from minimax_jax.models import generate as generate_module
from minimax_jax.models.cache import Cache
from minimax_jax.models.decode import decode_step, prefill
from minimax_jax.models.generate import generate
from minimax_jax.models.minimax import MiniMaxForCausalLM
from minimax_jax.models.prompts import pad_prompts
from minimax_jax.models.sampling import Sampler
from minimax_jax.models.weights import abstract_weights
from minimax_jax.synthetic.sizes import config

TOLERANCE = 2e-5
"""Of numbers up to 6 in float32, which differ by the order of sums alone; 4e-6 was seen."""

PROMPTS = [list(row[:length]) for row, length in zip(random_ids(3, 11), (11, 4, 1), strict=True)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return pair(tmp_path_factory.mktemp("hf"), num_local_experts=8, seed=2)


@functools.cache
def hf_greedy(hf, prompt: tuple[int, ...], count: int) -> np.ndarray:
    ids = torch.tensor([prompt])
    return hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)[
        0, len(prompt) :
    ].numpy()


def continue_(model, prompts, *, stop: int = -1, **settings):
    """64 tokens; every call with as many prompts runs the same program."""
    tokens, lengths = pad_prompts(prompts, multiple=11, pad=96)
    return generate(model, tokens, lengths, max_new_tokens=64, stop=[stop], pad=7, **settings)


def test_64_greedy_tokens_of_a_ragged_batch_equal_transformers_on_each_row_alone(tiny):
    result = continue_(tiny.model, PROMPTS)
    assert result.tokens.dtype == jnp.int32
    np.testing.assert_array_equal(result.lengths, [64, 64, 64])
    for row, prompt in zip(result.tokens, PROMPTS, strict=True):
        expected = hf_greedy(tiny.hf, tuple(map(int, prompt)), 64)
        np.testing.assert_array_equal(row, expected)
        assert len(np.unique(expected)) > 10


def test_one_row_alone_equals_transformers(tiny):
    """One row of two choices picks its experts one by one; a batch of them groups its rows."""
    for prompt in PROMPTS:
        result = continue_(tiny.model, [prompt])
        np.testing.assert_array_equal(result.tokens[0], hf_greedy(tiny.hf, tuple(map(int, prompt)), 64))


def test_cached_decoding_equals_full_prefill(tiny):
    tokens = jnp.asarray(random_ids(3, 9))
    expected = jax.jit(tiny.model.__call__)(tokens)
    lengths = jnp.array([4, 2, 1])
    cache = Cache.empty(tiny.config, 3, 9, jnp.float32)
    logits, cache = jax.jit(prefill)(tiny.model, tokens[:, :4], lengths, cache)
    np.testing.assert_allclose(logits, expected[jnp.arange(3), lengths - 1], rtol=0, atol=TOLERANCE)
    step = jax.jit(decode_step, donate_argnums=3)
    for offset in range(5):
        start = lengths + offset
        logits, cache = step(tiny.model, tokens[jnp.arange(3), start], start, cache)
        np.testing.assert_allclose(logits, expected[jnp.arange(3), start], rtol=0, atol=TOLERANCE)
    assert step._cache_size() == 1


def test_prefill_in_pieces_equals_prefill_at_once(tiny):
    tokens = jnp.asarray(random_ids(2, 8))
    extend = jax.jit(lambda start, piece, cache: tiny.model.model(piece, start, cache))
    cache = Cache.empty(tiny.config, 2, 6, jnp.float32)
    first = extend(jnp.array([0, 0]), tokens[:, :4], cache)
    second = extend(jnp.array([4, 4]), tokens[:, 4:], first.cache)
    hidden = jnp.concatenate([first.hidden, second.hidden], axis=1)
    expected = jax.jit(lambda tokens: tiny.model.model(tokens).hidden)(tokens)
    np.testing.assert_allclose(
        hidden[:, :6], expected[:, :6], rtol=0, atol=TOLERANCE
    )  # the capacity ends before the others


def test_rows_end_at_a_stop_token_and_are_padded(tiny):
    free = np.asarray(continue_(tiny.model, PROMPTS).tokens)
    stop = int(free[0, 9])
    lengths = [int(np.argmax(row == stop)) + 1 if stop in row else 64 for row in free]
    result = continue_(tiny.model, PROMPTS, stop=stop)
    np.testing.assert_array_equal(result.lengths, lengths)
    assert min(lengths) < 11
    assert max(lengths) == 64
    for row, whole, length in zip(result.tokens, free, lengths, strict=True):
        np.testing.assert_array_equal(row, [*whole[:length], *[7] * (64 - length)])
    alone = continue_(tiny.model, PROMPTS[:1], stop=int(free[0, 0]))
    np.testing.assert_array_equal(alone.tokens[0], [free[0, 0], *[7] * 63])
    np.testing.assert_array_equal(alone.lengths, [1])


def test_sampled_text_follows_the_key_and_nothing_is_compiled_twice(tiny):
    draw = functools.partial(continue_, tiny.model, top_k=90)
    first = draw(PROMPTS, temperature=1.0, top_p=0.95, key=jax.random.key(0)).tokens
    compiled = generate_module._generate._cache_size()
    again = draw(PROMPTS, temperature=1.0, top_p=0.95, key=jax.random.key(0)).tokens
    other = draw(PROMPTS, temperature=1.0, top_p=0.95, key=jax.random.key(1)).tokens
    cold = draw(PROMPTS[::-1], temperature=1e-4, top_p=0.5, key=jax.random.key(0)).tokens
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=1).all()
    np.testing.assert_array_equal(cold[::-1], continue_(tiny.model, PROMPTS).tokens)
    assert generate_module._generate._cache_size() == compiled


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.7, None, None), (1.5, 5, None), (0.7, None, 0.8), (1.3, 12, 0.6), (1.0, 99, 0.01)],
)
def test_sampling_follows_the_distribution_of_transformers(temperature, top_k, top_p):
    logits = np.random.default_rng(0).standard_normal((1, 40)).astype(np.float32) * 2
    scores = torch.from_numpy(logits)
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p else []
    for warper in warpers:
        scores = warper(None, scores)
    expected = torch.softmax(scores, dim=-1)[0].numpy()
    sampler = Sampler(key=jax.random.key(0), temperature=temperature, top_k=top_k, top_p=top_p)
    draws = jax.jit(jax.vmap(lambda step: sampler(jnp.asarray(logits), step)[0]))(jnp.arange(20_000))
    frequencies = np.bincount(draws, minlength=40) / 20_000
    assert (expected[frequencies > 0] > 0).all()
    assert np.abs(frequencies - expected).sum() < 0.04


def test_arguments_out_of_range_are_all_reported(tiny):
    with pytest.raises(mj.JobError) as caught:
        generate(tiny.model, [[1, 97]], [3], max_new_tokens=600, temperature=-1.0, top_k=0, top_p=1.5)
    assert len(caught.value.problems) == 7
    for wrong in ([1, 2], [[]], [[0.5]]):
        with pytest.raises(mj.JobError, match="not a batch of prompts"):
            generate(tiny.model, wrong, max_new_tokens=1)
    with pytest.raises(mj.JobError, match="not the lengths"):
        generate(tiny.model, [[1]], [1, 1], max_new_tokens=1)
    with pytest.raises(mj.JobError, match="without sampling"):
        generate(tiny.model, [[1]], max_new_tokens=1, top_k=3)


def test_prompts_are_padded_on_the_right_to_a_multiple():
    tokens, lengths = pad_prompts([[5], [6, 7, 8]], multiple=4, pad=9)
    np.testing.assert_array_equal(tokens, [[5, 9, 9, 9], [6, 7, 8, 9]])
    np.testing.assert_array_equal(lengths, [1, 3])


@functools.cache
def abstract_model(stacked: bool, layers: int = 2, scaled: str = "F8_E4M3") -> MiniMaxForCausalLM:
    """Layers large enough for their weights to outweigh all else."""
    sizes = config(layers=layers, experts=16, hidden_size=256, intermediate_size=256)
    return MiniMaxForCausalLM(sizes, abstract_weights(sizes, scaled=scaled, stacked=stacked))


def programs(model: MiniMaxForCausalLM):
    """Prefill and one step of decoding, with abstract arguments for each."""
    ids = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    cache = jax.eval_shape(lambda: Cache.empty(model.config, 2, 16))
    return {
        "prefill": (prefill, (model, ids(2, 12), ids(2), cache)),
        "decode": (decode_step, (model, ids(2), ids(2), cache)),
    }


@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_programs_lower_for_every_platform(program, stacked):
    function, arguments = programs(abstract_model(stacked))[program]
    platforms = ("cpu", "cuda", "rocm", "tpu")
    exported = jax.export.export(jax.jit(function), platforms=platforms)(*arguments)
    assert exported.platforms == platforms
    assert exported.out_avals[0].shape == (2, 264)
