"""Eight devices: load an FP8 checkpoint with its experts sharded, generate, train a step, export, compare."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # in the place of 8 accelerators

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from jax.sharding import AxisType
from transformers import MiniMaxM2ForCausalLM

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.models.generate import generate

TOKENS = np.array([[1, 5, 9, 2, 77, 3], [4, 4, 8, 100, 6, 1]])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, trained = Path(folder) / "checkpoint", Path(folder) / "trained"
        synthetic.synthesize(path, synthetic.config(experts=8))

        mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))
        model = mj.load_model(path, mesh=mesh, dtype=jnp.float32)
        print("experts:", model.model.layers[0].mlp.experts.gate_and_up_projs.get_value().sharding.spec)
        print("greedy:", generate(model, TOKENS, max_new_tokens=8).tokens.tolist())

        print("loss:", train_a_step(model, jnp.asarray(TOKENS)))
        scales = mj.source_scales(mj.read_tree(path), model.config)
        mj.save_model(model, trained)
        report = mj.save_model(model, Path(folder) / "trained-fp8", quantization=True, scales=scales)
        print(f"FP8: {report.kept_scales} weights with their source scales, {len(report.fresh_scales)} with fresh ones")

        theirs = MiniMaxM2ForCausalLM.from_pretrained(trained, dtype=torch.float32)
        with torch.no_grad():
            difference = np.abs(theirs(torch.tensor(TOKENS)).logits.numpy() - np.asarray(model(jnp.asarray(TOKENS))))
        print("largest difference of logits from transformers:", difference.max())
        if difference.max() > 1e-4:
            raise SystemExit("transformers sees another model")


def train_a_step(model: nnx.Module, tokens: jax.Array) -> float:
    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer) -> jax.Array:
        def loss(model: nnx.Module) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    return float(step(model, nnx.Optimizer(model, optax.sgd(1e-3), wrt=nnx.Param)))


if __name__ == "__main__":
    main()
