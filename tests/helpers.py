"""Random checkpoints in memory, and what they should become, in plain numpy: nothing here asks the code under test."""

import ml_dtypes
import numpy as np

from minimax_jax.dtypes import DTYPES
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.specs import specs

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
SUFFIX = "_scale_inv"


def config(**sizes):
    """A small config: hidden and inter are no multiples of the block, experts no multiple of a batch."""
    small = {
        "hidden_size": 320,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "rotary_dim": 32,
        "vocab_size": 30,
        "weight_block_size": (128, 128),
    }
    return MiniMaxConfig(**small | sizes)


def random_hf(cfg, scaled="F8_E4M3", *, seed=0):
    """A Hugging Face tree of numpy arrays; FP8 weights take every code but NaN."""
    rng = np.random.default_rng(seed)
    return {spec.key: _random(rng, spec) for spec in specs(cfg).hf(scaled)}


def _random(rng, spec):
    if spec.dtype == "F8_E4M3":
        codes = rng.integers(0, 256, spec.shape, dtype=np.uint8)
        codes[codes & 0x7F == 0x7F] ^= 1
        return codes.view(FP8)
    if spec.key.endswith(SUFFIX):
        return rng.lognormal(-8, 1, spec.shape).astype(F32)
    return rng.standard_normal(spec.shape).astype(F32).astype(DTYPES[spec.dtype])


def bits(array):
    """The bits of a numpy or JAX array, as unsigned integers of its size."""
    array = np.ascontiguousarray(np.asarray(array))
    return array.view(f"u{array.dtype.itemsize}")


def same(got, want):
    """Whether two arrays are the same in dtype, shape and every bit."""
    return got.dtype == want.dtype and np.array_equal(bits(got), bits(want))


def differences(got, want, same=same):
    """Names that only one tree has, and names of arrays that are not the same; none if all is well."""
    both = got.keys() & want.keys()
    return [key for key in sorted(got.keys() | want.keys()) if key not in both or not same(got[key], want[key])]


def dequantize(codes, scale_inv, dtype, block=(128, 128)):
    rows, cols = codes.shape
    scales = np.repeat(np.repeat(scale_inv, block[0], 0), block[1], 1)[:rows, :cols]
    return (codes.astype(F32) * scales).astype(dtype)


def quantize(weight, block=(128, 128)):
    """Codes and scales by amax, block by block."""
    rows, cols = weight.shape
    codes = np.zeros(weight.shape, FP8)
    scales = np.ones((-(-rows // block[0]), -(-cols // block[1])), F32)
    for i, j in np.ndindex(scales.shape):
        at = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
        amax = np.abs(weight[at].astype(F32)).max()
        if amax > 0:
            scales[i, j] = amax / F32.type(448)
        codes[at] = np.clip(weight[at].astype(F32) / scales[i, j], -448, 448).astype(FP8)
    return codes, scales


def native_of(hf, cfg, dtype):
    """The native tree of a Hugging Face tree; dtype None leaves FP8 out (see `grouped_codes`)."""
    prefix = "model." if any(key.startswith("model.") for key in hf) else ""
    tree = {}
    for key, array in hf.items():
        if ".experts." in key or key.endswith(SUFFIX):
            continue
        name = key.replace("block_sparse_moe.e_score", "mlp.gate.e_score").replace("block_sparse_moe", "mlp")
        tree[name] = dequantize(array, hf[key + SUFFIX], dtype, cfg.block) if array.dtype == FP8 else array
    for layer in range(cfg.num_hidden_layers):

        def weight(expert, name, layer=layer):
            key = f"{prefix}layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"
            if hf[key].dtype != FP8:
                return hf[key].astype(dtype)
            return dequantize(hf[key], hf[key + SUFFIX], dtype, cfg.block)

        experts, mlp = range(cfg.num_local_experts), f"{prefix}layers.{layer}.mlp.experts."
        tree[mlp + "gate_and_up_projs"] = np.stack(
            [np.concatenate([weight(expert, "w1").T, weight(expert, "w3").T], axis=1) for expert in experts]
        )
        tree[mlp + "down_projs"] = np.stack([weight(expert, "w2").T for expert in experts])
    return tree


def without_prefix(tree):
    return {key.removeprefix("model."): array for key, array in tree.items()}
