"""Weights into a model and out of it, by name."""

from __future__ import annotations

from collections.abc import Mapping

from flax import nnx

from minimax_jax.conversion import Leaf
from minimax_jax.models.minimax import Layer, MiniMaxForCausalLM
from minimax_jax.models.weights import check_weights


def assign(model: MiniMaxForCausalLM, native: Mapping[str, Leaf]) -> MiniMaxForCausalLM:
    """A model like this one with other weights.

    Args:
        model: a model, or the abstract one that `nnx.eval_shape` or `abstract_weights` gives; it is not changed.
        native: leaves by name, in the model's form: stacked where the model scans over layers.

    Returns:
        A new model of the arrays in `native`; JAX arrays are not copied. Weights may be FP8 where they were not, and
        the other way round.

    Raises:
        LayoutError: everything that is missing, unexpected or of a wrong shape or dtype.
    """
    check_weights(native, model.config, stacked=isinstance(model.model.layers, Layer))
    return MiniMaxForCausalLM(model.config, native, dtype=model.model.dtype)


def native_tree(model: MiniMaxForCausalLM) -> dict[str, Leaf]:
    """The weights of a model by native name (stacked names where it scans), not copied; the inverse of `assign`."""
    state = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): variable.get_value() for path, variable in state}
