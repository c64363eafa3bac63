"""Convert a checkpoint in memory with one jit-compiled call, its experts spread over all devices, and come back.

Runs anywhere: eight fake CPU devices stand in for a TPU slice or a GPU node.
"""

import functools
import os
import tempfile
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import minimax_jax as mj
from minimax_jax import synthetic


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        synthetic.synthesize(path, synthetic.config(experts=8))
        config = mj.MiniMaxConfig.from_pretrained(path)
        hf = mj.read_tree(path)  # views of the files: FP8 codes and their block scales

        # FP8 crosses to the devices; dequantisation and grouping happen there, each device making its own experts.
        to_native = functools.partial(mj.from_hf, config=config, dtype=jnp.bfloat16)
        mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))
        by_expert, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("expert",), ()))
        shardings = {
            name: by_expert if leaf.ndim == 3 else whole for name, leaf in jax.eval_shape(to_native, hf).items()
        }
        native = jax.jit(to_native, out_shardings=shardings)(hf)
        experts = native["model.layers.0.mlp.experts.gate_and_up_projs"]
        print(f"experts: {experts.dtype}{list(experts.shape)}, on {len(experts.sharding.device_set)} devices")

        # With the source's own scales, the way back is exact.
        scales = mj.source_scales(hf, config)
        to_fp8 = functools.partial(mj.to_hf, config=config, quantization=True, scales=scales)
        back = jax.jit(to_fp8)(native)
        same = sum(np.asarray(back[name]).tobytes() == np.asarray(hf[name]).tobytes() for name in hf)
        print(f"{same} of {len(hf)} tensors came back byte for byte")
        if same != len(hf):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
