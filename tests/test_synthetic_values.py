import hashlib

import ml_dtypes
import numpy as np
import pytest
import torch
from config_cases import PUBLISHED

from minimax_jax.errors import ConfigError, LayoutError
from minimax_jax.layout.specs import specs
from minimax_jax.synthetic import REAL, TINY, bands, config, values

SUFFIX = "_scale_inv"
BF16 = ml_dtypes.bfloat16
RAGGED = config(hidden_size=160, intermediate_size=200, vocab_size=70, layers=1, experts=3, num_experts_per_tok=1)
SMALL_BLOCKS = config(
    hidden_size=37, intermediate_size=22, vocab_size=70, head_dim=6, rotary_dim=4, weight_block_size=(5, 8)
)
W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
FIRST_W2 = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
ROUTER = "model.layers.0.block_sparse_moe.gate.weight"
BIAS = "model.layers.0.block_sparse_moe.e_score_correction_bias"


def fp8_weights(cfg, seed=0):
    keys = specs(cfg).places
    return {key: values(key, cfg, seed=seed) for key in keys if key + SUFFIX in keys}


def blocks(matrix, block):
    rows, cols = block
    return [
        matrix[i : i + rows, j : j + cols]
        for i in range(0, matrix.shape[0], rows)
        for j in range(0, matrix.shape[1], cols)
    ]


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_config_changes_layers_experts_and_anything_else():
    assert config() == TINY
    assert config(real=True) == REAL == PUBLISHED
    assert config(real=True, layers=2, experts=64) == REAL.replace(num_hidden_layers=2, num_local_experts=64)
    assert config(experts=1).num_experts_per_tok == 1
    assert config(real=True, experts=4).num_experts_per_tok == 4
    assert config(experts=8, num_experts_per_tok=3).num_experts_per_tok == 3
    assert config(vocab_size=99).vocab_size == 99


def test_config_refuses_what_makes_no_sense():
    with pytest.raises(TypeError, match="num_experts"):
        config(num_experts=4)
    with pytest.raises(ConfigError, match="num_experts_per_tok"):
        config(experts=2, num_experts_per_tok=3)
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        config(layers=0)


# --- determinism ----------------------------------------------------------------------------------------------------


def test_values_of_a_seed_never_change():
    digest = hashlib.sha256()
    for key in (FIRST_W2, W1, W1 + SUFFIX, ROUTER, BIAS, "model.norm.weight", "lm_head.weight"):
        digest.update(values(key, TINY, seed=7).tobytes())
    assert digest.hexdigest() == "ea35f96ebcbb86afbffffdad0eb8a79941b93bdde7fb9a879202fd7527ce95f3"


def test_a_tensor_does_not_depend_on_the_rest_of_the_model():
    other = config(layers=3, experts=6, vocab_size=300)
    for key in (FIRST_W2, W1, W1 + SUFFIX, "model.layers.0.self_attn.q_proj.weight"):
        assert values(key, TINY).tobytes() == values(key, other).tobytes()


def test_another_seed_changes_every_tensor_and_no_two_tensors_are_equal():
    first = {key: values(key, TINY, seed=0).tobytes() for key in specs(TINY).places}
    second = {key: values(key, TINY, seed=1).tobytes() for key in specs(TINY).places}
    assert len({*first.values(), *second.values()}) == 2 * len(first)


@pytest.mark.parametrize("scaled", ["F8_E4M3", "BF16"])
def test_bands_are_the_rows_of_the_values(scaled):
    cfg = config(vocab_size=5000)
    for key in ("model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"):
        parts = list(bands(key, cfg, scaled=scaled))
        assert len(parts) > 1
        assert np.concatenate(parts).tobytes() == values(key, cfg, scaled=scaled).tobytes()


def test_an_unknown_key_is_refused():
    with pytest.raises(LayoutError, match=r"experts\.4"):
        values(W1.replace("experts.2", "experts.4"), TINY)


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_codes_are_all_254_finite_ones_and_never_nan(seed):
    counts = sum(np.bincount(w.view(np.uint8).ravel(), minlength=256) for w in fp8_weights(TINY, seed).values())
    assert np.flatnonzero(counts == 0).tolist() == [0x7F, 0xFF]


@pytest.mark.parametrize("cfg", [TINY, RAGGED, SMALL_BLOCKS])
def test_some_blocks_reach_448_some_do_not_some_are_zeros_of_both_signs(cfg):
    found = [block for weight in fp8_weights(cfg).values() for block in blocks(weight, cfg.block)]
    largest = np.array([np.abs(block.astype(np.float32)).max() for block in found])
    assert (largest == 448).sum() > len(found) / 4
    assert ((largest > 0) & (largest < 448)).sum() > len(found) / 10
    zeros = [set(block.view(np.uint8).ravel()) for block, size in zip(found, largest, strict=True) if size == 0]
    assert {0x00, 0x80} in zeros and len(zeros) < len(found) / 3


def test_no_matrix_is_all_zeros():
    one_block = config(hidden_size=100)
    for cfg in (TINY, RAGGED, SMALL_BLOCKS, one_block):
        assert all(weight.astype(np.float32).any() for weight in fp8_weights(cfg).values())


@pytest.mark.parametrize("cfg", [TINY, RAGGED, SMALL_BLOCKS])
def test_scales_are_positive_and_use_their_whole_mantissa(cfg):
    scales = np.concatenate([values(key + SUFFIX, cfg).ravel() for key in fp8_weights(cfg)])
    assert scales.dtype == np.float32
    assert scales.min() > 1e-4 and scales.max() < 4e-4
    assert np.all(scales.view(np.uint32) & 1)  # so none is a power of two, nor survives bfloat16
    assert len(np.unique(scales)) > 0.99 * scales.size


def test_real_shapes_have_weights_of_a_realistic_size():
    cfg = config(real=True, layers=1, experts=2)
    weight = values("model.layers.0.block_sparse_moe.experts.1.w3.weight", cfg, scaled="F32")
    assert weight.shape == (1536, 3072)
    assert 0.018 < weight.std() < 0.022 and abs(weight.mean()) < 1e-4


def test_the_router_does_not_survive_bfloat16():
    for key, largest in ((ROUTER, 0.04), (BIAS, 0.06)):
        router = values(key, TINY)
        assert router.dtype == np.float32
        assert np.all(router.view(np.uint32) & 1)
        assert np.all(router != router.astype(BF16).astype(np.float32))
        assert 0 < np.abs(router).max() < largest


def test_norms_are_near_one_and_embeddings_small():
    norm = values("model.layers.0.self_attn.q_norm.weight", TINY)
    assert norm.dtype == BF16 and norm.astype(np.float32).min() >= 0.75 and norm.astype(np.float32).max() <= 1.25
    assert len(np.unique(norm.view(np.uint16))) > 30
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        embedding = values(key, TINY)
        assert embedding.dtype == BF16 and 0.019 < embedding.astype(np.float32).std() < 0.021


@pytest.mark.parametrize("cfg", [TINY, RAGGED, SMALL_BLOCKS])
@pytest.mark.parametrize(("scaled", "dtype"), [("BF16", torch.bfloat16), ("F32", torch.float32)])
def test_the_other_dtypes_are_the_dequantised_codes(cfg, scaled, dtype):
    for key, codes in fp8_weights(cfg).items():
        decoded = torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn).to(torch.float32)
        scales = torch.from_numpy(values(key + SUFFIX, cfg))
        spread = scales.repeat_interleave(cfg.block[0], 0).repeat_interleave(cfg.block[1], 1)
        expected = (decoded * spread[: codes.shape[0], : codes.shape[1]]).to(dtype)
        assert expected.reshape(-1).view(torch.uint8).numpy().tobytes() == values(key, cfg, scaled=scaled).tobytes()


@pytest.mark.parametrize("scaled", ["F8_E4M3", "BF16", "F32"])
def test_only_block_scaled_weights_depend_on_the_dtype(scaled):
    for key in (ROUTER, BIAS, "model.norm.weight", "model.embed_tokens.weight", W1 + SUFFIX):
        assert values(key, TINY, scaled=scaled).tobytes() == values(key, TINY).tobytes()
