"""Which form of the grouped codec a program for TPUs gets: the kernels, or what XLA makes of the formulas.

The choice falls as a program is lowered, when it is known what for; programs for anything else never see the kernels.
A kernel is for one device: programs that XLA divides over several keep the formulas, but within `jax.shard_map` each
device runs the kernel. MINIMAX_JAX_TPU=xla keeps all of them to the formulas; see `minimax_jax.ops.backend`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from minimax_jax.ops.backend import tpu_kernels
from minimax_jax.ops.checks import Block

Function: TypeAlias = Callable[..., list[jax.Array]]

SIDE = 128
"""Rows and columns of the blocks that the kernels work on."""
_MOST_SCALES = 2**15
"""Scales of an expert that a TPU's scalar memory has room for, twice; rows of the grid take up multiples of 128."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A function of `minimax_jax.ops.kernels_tpu`, which is imported when it is called: that takes a while.

    Attributes:
        name: of the function.
        parts: matrices of an expert.
    """

    name: str
    parts: int

    def __call__(self, *arrays: jax.Array) -> list[jax.Array]:
        """Its results; to be lowered for TPUs."""
        kernels = importlib.import_module("minimax_jax.ops.kernels_tpu")
        results: list[jax.Array] = getattr(kernels, self.name)(*arrays, parts=self.parts)
        return results


def covers(shape: Sequence[int], block: Block, parts: int) -> bool:
    """Whether there are kernels for experts' matrices of a shape, [experts, rows, cols], in blocks of a size."""
    _, rows, cols = shape
    whole = min(shape) > 0 and rows % SIDE == cols % SIDE == 0
    scales = parts * math.ceil(rows / SIDE / 8) * 8 * math.ceil(cols / SIDE / 128) * 128
    return tuple(block) == (SIDE, SIDE) and whole and scales <= _MOST_SCALES


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def choose(kernel: Kernel, plain: Function, *arrays: jax.Array) -> list[jax.Array]:
    """Results of `plain`, in programs for TPUs by `kernel`; derivatives are those of `plain`."""
    results: list[jax.Array] = _choice.bind(*arrays, kernel=kernel, plain=plain)  # type: ignore[no-untyped-call]
    return results


@choose.defjvp
def _choose_jvp(kernel: Kernel, plain: Function, primals: Any, tangents: Any) -> tuple[Any, Any]:
    return choose(kernel, plain, *primals), jax.jvp(plain, primals, tangents)[1]


_choice = Primitive("grouped_codec")
_choice.multiple_results = True


def _plain(*arrays: jax.Array, kernel: Kernel, plain: Function) -> list[jax.Array]:
    return plain(*arrays)


def _abstract(*arrays: Any, kernel: Kernel, plain: Function) -> list[Any]:
    shapes = jax.eval_shape(plain, *(jax.ShapeDtypeStruct(one.shape, one.dtype) for one in arrays))  # type: ignore[no-untyped-call]
    return [arrays[0].update(shape=one.shape, dtype=one.dtype) for one in shapes]


def _batch(arrays: Any, axes: Any, *, kernel: Kernel, plain: Function) -> tuple[list[jax.Array], list[int]]:
    results = jax.vmap(plain, in_axes=axes)(*arrays)
    return results, [0] * len(results)


def _kernel(*arrays: jax.Array, kernel: Kernel, plain: Function) -> list[jax.Array]:
    return kernel(*arrays)


def _for_tpu(ctx: mlir.LoweringRuleContext, *arrays: Any, **params: Any) -> Any:
    by_kernel = tpu_kernels() == "pallas" and _one_device(ctx.module_context.axis_context)
    return mlir.lower_fun(_kernel if by_kernel else _plain)(ctx, *arrays, **params)


def _one_device(context: Any) -> bool:
    """Whether a program is of one device, or every device's own."""
    if isinstance(context, mlir.SPMDAxisContext):
        return set(context.manual_axes) == set(context.mesh.axis_names) or context.mesh.size == 1
    return isinstance(context, mlir.ShardingContext) and context.num_devices == 1


_choice.def_impl(_plain)  # type: ignore[no-untyped-call]
_choice.def_abstract_eval(_abstract)  # type: ignore[no-untyped-call]
batching.primitive_batchers[_choice] = _batch
mlir.register_lowering(_choice, mlir.lower_fun(_plain))
mlir.register_lowering(_choice, _for_tpu, platform="tpu")
