"""NeMo AutoModel's grouped experts from an FP8 checkpoint, in torch, and the real FP8 export back.

Only the import differs from NeMo's own adapter; NeMo itself is not needed.
"""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

from minimax_jax import synthetic
from torch_bridge import MiniMaxM2StateDictAdapter


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        synthetic.synthesize(path)
        hf = load_file(path / "model.safetensors")

    sizes = synthetic.TINY  # in NeMo these three are the model's own config, moe_config and backend
    moe = SimpleNamespace(
        n_routed_experts=sizes.num_local_experts,
        moe_inter_dim=sizes.intermediate_size,
        expert_activation="swiglu",
        expert_bias=False,
    )
    backend = SimpleNamespace(experts="torch", dispatcher="torch")
    adapter = MiniMaxM2StateDictAdapter(sizes, moe, backend, dtype=torch.bfloat16)

    native = adapter.from_hf(dict(hf))
    experts = native["model.layers.0.mlp.experts.gate_and_up_projs"]
    print(f"experts: {experts.dtype} {list(experts.shape)}")

    back = adapter.to_hf(native, quantization=True)
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    exported = back[name].float() * back[name + "_scale_inv"].repeat_interleave(128, 1)[:, : back[name].shape[1]]
    published = hf[name].float() * hf[name + "_scale_inv"].repeat_interleave(128, 1)[:, : hf[name].shape[1]]
    error = ((exported - published).norm() / published.norm()).item()
    print(f"FP8 export with real block scales: relative error {error:.2%}")
    if error > 0.03:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
