"""MiniMax-M2 in Flax NNX. Paths of parameters are the native names, so a native tree is the model's state.

    model = MiniMaxForCausalLM(config, native)
    logits = jax.jit(lambda model, tokens: model(tokens))(model, tokens)

A model is a pytree: it goes through `jax.jit`, `jax.grad` (or `nnx.grad`, which skips what is `Fixed`) and
`jax.device_put` as it is. Rows of different lengths are padded on the right: attention is causal, so that padding
changes nothing before it. On a mesh, use `AxisType.Auto` axes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from minimax_jax.conversion import Leaf
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.models.attention import Attention, Place, positions, rotary_angles
from minimax_jax.models.cache import Cache
from minimax_jax.models.contract import take
from minimax_jax.models.moe import MoE
from minimax_jax.models.parts import Embedding, Leaves, RMSNorm
from minimax_jax.models.stack import is_stacked
from minimax_jax.models.weights import check_weights
from minimax_jax.ops.scaled import BlockScaled
from minimax_jax.trees import nest

_Carry: TypeAlias = tuple[jax.Array, Cache | None]


class Decoded(NamedTuple):
    """What comes out of the layers.

    Attributes:
        hidden: [batch, time, hidden], after the last norm.
        cache: the cache with the new tokens in it, if one was given.
        chosen: experts of every token in every layer, int32 [layer, batch, time, chosen].
    """

    hidden: jax.Array
    cache: Cache | None
    chosen: jax.Array


class Layer(nnx.Module):
    """One decoder layer, or all of them stacked."""

    def __init__(self, leaves: Leaves, config: MiniMaxConfig):
        self.input_layernorm = RMSNorm(leaves["input_layernorm"], config.rms_norm_eps)
        self.self_attn = Attention(leaves["self_attn"], config)
        self.post_attention_layernorm = RMSNorm(leaves["post_attention_layernorm"], config.rms_norm_eps)
        self.mlp = MoE(leaves["mlp"], config)

    def __call__(
        self, x: jax.Array, place: Place, cache: Cache | None, layer: int | jax.Array
    ) -> tuple[jax.Array, Cache | None, jax.Array]:
        """The layer's output, the cache, and the experts that were chosen; arguments as for `Attention`."""
        attended, cache = self.self_attn(self.input_layernorm(x), place, cache, layer)
        x = x + attended
        mixed, chosen = self.mlp(self.post_attention_layernorm(x))
        return x + mixed, cache, chosen


class MiniMaxModel(nnx.Module):
    """Embedding, layers and the last norm; `layers` is one stacked `Layer` where the tree was stacked."""

    def __init__(self, leaves: Leaves, config: MiniMaxConfig, *, dtype: DTypeLike, stacked: bool):
        self.embed_tokens = Embedding(leaves["embed_tokens"])
        layers, count = leaves["layers"], 0 if stacked else config.num_hidden_layers
        apart = nnx.List(Layer(layers[str(index)], config) for index in range(count))
        self.layers: Layer | nnx.List[Layer] = Layer(layers, config) if stacked else apart
        self.norm = RMSNorm(leaves["norm"], config.rms_norm_eps)
        self.config = config
        self.dtype = jnp.dtype(dtype)

    def __call__(self, tokens: jax.Array, start: jax.Array | None = None, cache: Cache | None = None) -> Decoded:
        """Run the layers over tokens, and over what the cache holds before them.

        Args:
            tokens: ids, int32 [batch, time], padded on the right.
            start: how many tokens of each row the cache holds already, int32 [batch]; None: none.
            cache: keys and values of those tokens; None: the new ones are not kept.
        """
        x = self.embed_tokens(tokens).astype(self.dtype)
        place = Place(*rotary_angles(positions(tokens.shape[1], start), self.config), start)
        if isinstance(self.layers, Layer):
            x, cache, chosen = _scan(self.layers, x, place, cache)
        else:
            x, cache, chosen = _unroll(self.layers, x, place, cache)
        return Decoded(self.norm(x), cache, chosen)


def _unroll(
    layers: Iterable[Layer], x: jax.Array, place: Place, cache: Cache | None
) -> tuple[jax.Array, Cache | None, jax.Array]:
    chosen = []
    for index, layer in enumerate(layers):
        x, cache, experts = layer(x, place, cache, index)
        chosen.append(experts)
    return x, cache, jnp.stack(chosen)


def _scan(layers: Layer, x: jax.Array, place: Place, cache: Cache | None) -> tuple[jax.Array, Cache | None, jax.Array]:
    """Each layer is computed again in the backward pass, so that only the layers' inputs are kept.

    What is large is not scanned over but indexed: FP8 weights, which are sliced when they are used, and the cache, so
    that one token is written in place and not a layer's whole slice.
    """
    leaves, form = jax.tree.flatten(layers, is_leaf=_is_scaled)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(carry: _Carry, step: tuple[list[Any], jax.Array]) -> tuple[_Carry, jax.Array]:
        own, index = step
        parts = [take(leaf, index) if _is_scaled(leaf) else part for leaf, part in zip(leaves, own, strict=True)]
        x, cache, chosen = jax.tree.unflatten(form, parts)(carry[0], place, carry[1], index)
        return (x, cache), chosen

    scanned = [None if _is_scaled(leaf) else leaf for leaf in leaves]
    count = layers.input_layernorm.weight.shape[0]
    (x, cache), chosen = lax.scan(body, (x, cache), (scanned, jnp.arange(count)))
    return x, cache, chosen


def _is_scaled(leaf: Any) -> bool:
    return isinstance(leaf, BlockScaled)


class MiniMaxForCausalLM(nnx.Module):
    """The whole model: token ids in, logits out.

    Args:
        config: the checkpoint's config.
        native: its weights by native name, as they come from `from_hf`, or stacked by `stack_layers` to scan over the
            layers; `abstract_weights` and `random_weights` make others. JAX arrays are not copied; numpy arrays are
            put on the default device.
        dtype: dtype of activations, to which weights are brought as they are used; the router is float32 always. (How
            exact products of float32 are, outside of the router, `jax_default_matmul_precision` says.)

    Raises:
        LayoutError: names, shapes or dtypes that the layout does not have; everything that is wrong.
    """

    def __init__(self, config: MiniMaxConfig, native: Mapping[str, Leaf], *, dtype: DTypeLike = jnp.bfloat16):
        stacked = is_stacked(native, config)
        check_weights(native, config, stacked=stacked)
        leaves = nest({name: jax.tree.map(_on_device, leaf) for name, leaf in native.items()})
        self.model = MiniMaxModel(leaves["model"], config, dtype=dtype, stacked=stacked)
        self.lm_head = None if config.tie_word_embeddings else Embedding(leaves["lm_head"])
        self.config = config

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Token ids, int32 [batch, time], padded on the right, to logits, float32 [batch, time, vocab]."""
        return self.logits(self.model(tokens).hidden)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """What the output head makes of `Decoded.hidden`: [..., hidden] to float32 [..., vocab]."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return head.logits(hidden)


def _on_device(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf
