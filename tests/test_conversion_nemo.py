import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import BF16, SUFFIX, config, dequantize, differences, random_hf, without_prefix
from torch_helpers import in_numpy, in_torch, nemo_adapter, nemo_from_hf, to_torch

import minimax_jax as mj

SMALL = config(hidden_size=200, intermediate_size=72, num_hidden_layers=1)
CONFIGS = {
    "ragged": config(),
    "one expert": config(num_local_experts=1, hidden_size=256, intermediate_size=128, num_hidden_layers=1),
    "many experts": SMALL.replace(num_local_experts=21),
}
EVERY_CONFIG = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
DTYPES = pytest.mark.parametrize(("dtype", "torch_dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
PATTERNS = [
    r".*experts\.1\..*",
    r".*w[13]\.weight$",
    r"lm_head",
    r"experts",
    r".*_scale_inv",
    r"model\.layers\.0\.(self_attn|mlp)",
    r".*gate\.weight",
]


@EVERY_CONFIG
@DTYPES
@pytest.mark.parametrize("source", ["F8_E4M3", "BF16", "F32"])
def test_from_hf_equals_nemo(cfg, source, dtype, torch_dtype):
    hf = random_hf(cfg, source)
    assert not differences(mj.from_hf(hf, cfg, dtype=dtype), nemo_from_hf(hf, cfg, torch_dtype))


@DTYPES
def test_from_hf_under_jit_equals_nemo(dtype, torch_dtype):
    cfg = CONFIGS["ragged"]
    hf = random_hf(cfg)
    native = jax.jit(lambda tree: mj.from_hf(tree, cfg, dtype=dtype))(hf)
    assert not differences(native, nemo_from_hf(hf, cfg, torch_dtype))


def test_from_hf_without_prefix_equals_nemo():
    hf = without_prefix(random_hf(SMALL))
    assert not differences(mj.from_hf(hf, SMALL), nemo_from_hf(hf, SMALL, torch.bfloat16))


def test_from_hf_of_some_tensors_equals_nemo():
    hf = {key: array for key, array in random_hf(SMALL).items() if ".experts." in key or "q_proj" in key}
    assert not differences(mj.from_hf(hf, SMALL, partial=True), nemo_from_hf(hf, SMALL, torch.bfloat16))


@EVERY_CONFIG
@DTYPES
def test_single_tensors_equal_nemos_in_order(cfg, dtype, torch_dtype):
    native = mj.from_hf(random_hf(cfg), cfg, dtype=dtype)
    adapter = nemo_adapter(cfg, torch_dtype)
    for fqn, leaf in native.items():
        pairs = adapter.convert_single_tensor_to_hf(fqn, to_torch(leaf))
        got = mj.convert_single_tensor_to_hf(fqn, leaf, cfg)
        assert [key for key, _ in got] == [key for key, _ in pairs]
        assert not differences(dict(got), in_numpy(dict(pairs)))


@EVERY_CONFIG
def test_to_hf_equals_nemo_in_order(cfg):
    native = mj.from_hf(random_hf(cfg), cfg)
    want = nemo_adapter(cfg).to_hf(in_torch(native))
    got = mj.to_hf(native, cfg)
    assert list(got) == list(want)
    assert not differences(got, in_numpy(want))


@pytest.mark.parametrize("quantization", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_exclude_key_regex_leaves_out_what_nemo_leaves_out(pattern, quantization):
    native = mj.from_hf(random_hf(SMALL), SMALL)
    adapter = nemo_adapter(SMALL)
    options = {"exclude_key_regex": pattern, "quantization": quantization}
    want = adapter.to_hf(in_torch(native), **options)
    got = mj.to_hf(native, SMALL, **options)
    assert list(got) == list(want)
    for fqn, leaf in native.items():
        pairs = adapter.convert_single_tensor_to_hf(fqn, to_torch(leaf), **options)
        assert [key for key, _ in mj.convert_single_tensor_to_hf(fqn, leaf, SMALL, **options)] == [k for k, _ in pairs]


@EVERY_CONFIG
def test_fp8_export_has_nemos_names_order_and_shapes(cfg):
    native = mj.from_hf(random_hf(cfg), cfg)
    want = nemo_adapter(cfg).to_hf(in_torch(native), quantization=True)
    got = mj.to_hf(native, cfg, quantization=True)
    assert [(k, v.shape, v.dtype) for k, v in got.items()] == [
        (key, array.shape, array.dtype) for key, array in in_numpy(want).items()
    ]


@pytest.mark.parametrize("key", random_hf(SMALL))
def test_what_the_table_quantises_is_what_nemos_rule_quantises(key):
    assert mj.should_quantize_key(key) == (key + SUFFIX in random_hf(SMALL))


def test_fp8_export_is_close_where_nemos_ones_scales_are_not():
    hf = random_hf(SMALL, "BF16")
    hf = {key: (array * BF16.type(0.002) if array.ndim == 2 else array) for key, array in hf.items()}
    native = mj.from_hf(hf, SMALL)
    nemo = nemo_adapter(SMALL).to_hf(in_torch(native), quantization=True)
    ours = mj.to_hf(native, SMALL, quantization=True)

    def error(fp8):
        weights = [key for key in hf if key + SUFFIX in fp8]
        off = [dequantize(fp8[key], fp8[key + SUFFIX], np.float32) - hf[key].astype(np.float32) for key in weights]
        size = [hf[key].astype(np.float32) for key in weights]
        return np.sqrt(sum((x**2).sum() for x in off) / sum((x**2).sum() for x in size))

    assert error({key: np.asarray(array) for key, array in ours.items()}) < 0.03
    assert error(in_numpy(nemo)) > 0.25


def test_nemo_reads_our_fp8_export():
    native = mj.from_hf(random_hf(SMALL, "F32"), SMALL, dtype=jnp.float32)
    fp8 = mj.to_hf(native, SMALL, quantization=True)
    assert not differences(mj.from_hf(fp8, SMALL), nemo_from_hf(fp8, SMALL, torch.bfloat16))
