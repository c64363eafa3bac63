"""What a pass over a checkpoint, or two, has found: the figures of every weight, of which a report is made."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from minimax_jax.jobs.difference import Difference, total
from minimax_jax.jobs.figures import Floats, Outlier
from minimax_jax.jobs.inspect import Inspection
from minimax_jax.jobs.numbers import Unusual
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.table import dissect

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """The figures of one weight, by its Hugging Face name.

    Attributes:
        key: its name.
        layer: the layer that it belongs to.
        expert: the expert that it belongs to.
        dtype: as it is stored, in safetensors' spelling.
        shape: its shape in the Hugging Face form.
        squares: sum of squares of its finite values.
        amax: largest magnitude of them.
        scaled: what is known of block-scaled weights alone.
        change: how the second checkpoint differs, where there is one.
    """

    key: str
    layer: int | None
    expert: int | None
    dtype: str
    shape: tuple[int, ...]
    squares: float
    amax: float
    scaled: Scaled | None = None
    change: Difference | None = None

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return int(np.prod(self.shape))


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaled:
    """The figures of a weight that is block-scaled FP8 in the published form, however it is stored here.

    Attributes:
        blocks: how many blocks it has.
        spread: binary logarithm of the largest block scale over the smallest; scales by amax where none are stored.
        errors: sum of squares of what quantising it by amax changes; NaN where that cannot be done.
        saturated: codes of +-448; 0 where it is stored as floats, and so the next one.
        zeros: codes of +-0.
        outliers: the blocks that stand out most.
    """

    blocks: int
    spread: float
    errors: float
    saturated: int
    zeros: int
    outliers: tuple[Outlier, ...]


@dataclass(frozen=True, kw_only=True)
class Overview:
    """What one pass over a checkpoint, or two, has found.

    Attributes:
        checkpoints: what each is.
        scaled_dtypes: for each, the stored dtypes of the weights that are block-scaled in the published form.
        weights: the figures of each weight of the first, in the order of a forward pass.
        codes: how often each FP8 code occurs in the first, int64 `[256]`.
        router_bias: float32 `[layers, experts]`, of the first.
        router_bias_kind: its kind of tensor, as `layout.table.dissect` has it.
        unusual: numbers that a sound checkpoint does not hold, for each.
    """

    checkpoints: tuple[Inspection, ...]
    scaled_dtypes: tuple[tuple[str, ...], ...]
    weights: tuple[Figures, ...]
    codes: Counts = field(repr=False)
    router_bias: npt.NDArray[np.float32] = field(repr=False)
    router_bias_kind: str
    unusual: tuple[tuple[Unusual, ...], ...]

    @property
    def config(self) -> MiniMaxConfig:
        """The config of the first."""
        return self.checkpoints[0].config

    @functools.cached_property
    def experts(self) -> tuple[str, ...]:
        """The kinds of an expert's matrices, in the order of the last axis of `grid`."""
        return tuple(dict.fromkeys(dissect(each.key).kind for each in self.weights if each.expert is not None))

    def grid(self, figure: Callable[[Figures], float]) -> Floats:
        """A figure of every matrix of every expert: float64 `[layers, experts, matrices]`."""
        shape = (self.config.num_hidden_layers, self.config.num_local_experts, len(self.experts))
        found = np.full(shape, np.nan)
        for each in self.weights:
            if each.expert is not None and each.layer is not None:
                found[each.layer, each.expert, self.experts.index(dissect(each.key).kind)] = figure(each)
        return found

    @property
    def quantised(self) -> bool:
        """Whether there are two checkpoints and one alone is FP8, so that a change is an error of quantisation."""
        return len(self.checkpoints) == 2 and _is_fp8(self.scaled_dtypes[0]) != _is_fp8(self.scaled_dtypes[1])


def relative_change(weights: Iterable[Figures]) -> float:
    """`Difference.relative` of weights taken together."""
    return total(_with_sums(each, each.change) for each in weights if each.change is not None).relative


def _with_sums(each: Figures, change: Difference) -> Difference:
    """The change of a weight with its sums of squares: that of one that did not change may leave them out."""
    if change.differing:
        return change
    same = each.squares
    return dataclasses.replace(change, first_squares=same, second_squares=same, products=same, error_squares=0.0)


def change_squares(each: Figures) -> float:
    """The sum of squares of what changed in a weight; NaN where there is nothing to compare it with."""
    return math.nan if each.change is None else each.change.error_squares


def ratio(squares: float, base: float) -> float:
    """Root of `squares / base`: 0 where both are zero, infinite where `base` alone is, NaN where one is NaN."""
    return float(ratios(np.float64(squares), np.float64(base)))


def ratios(squares: Floats | np.float64, base: Floats | np.float64) -> Floats:
    """The same of arrays of one shape."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Floats = np.sqrt(np.where((squares == 0) & (base == 0), 0.0, squares / base))
    return found


def _is_fp8(dtypes: tuple[str, ...]) -> bool:
    return "F8_E4M3" in dtypes
