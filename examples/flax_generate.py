"""Run MiniMax-M2 in JAX: load an FP8 checkpoint, keep its experts in FP8, and generate."""

import tempfile
from pathlib import Path

import jax.numpy as jnp

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.models.generate import generate
from minimax_jax.models.minimax import MiniMaxForCausalLM


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        synthetic.synthesize(path)
        config = mj.MiniMaxConfig.from_pretrained(path)
        native = mj.from_hf(mj.read_tree(path), config, dtype=None)  # FP8 stays FP8
        model = MiniMaxForCausalLM(config, native, dtype=jnp.float32)

        prompt = jnp.array([[1, 2, 3, 4]])
        print(f"logits: {model(prompt).shape}")
        print(f"greedy: {generate(model, prompt, max_new_tokens=8).tokens.tolist()}")


if __name__ == "__main__":
    main()
