"""What the figures of a checkpoint say, in words; each finding follows from a rule that is told beside it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from minimax_jax.display import counted
from minimax_jax.io.jsonfile import shown
from minimax_jax.jobs.difference import RELATIVE
from minimax_jax.jobs.figures import OUTLIER_RATIO, Floats
from minimax_jax.jobs.numbers import Unusual
from minimax_jax.jobs.overview import Figures, Overview, change_squares, ratio, relative_change

Level: TypeAlias = Literal["warning", "note", "good"]

SATURATED_SHARE = 0.05
"""More codes of +-448 than this in a matrix, and the one in each block that scaling by amax gives, are odd.

What rounds to 448 lies between 432 and 448, 1/28 of the range. Where large magnitudes are no commoner than small ones,
as in weights of any usual distribution, scaling by amax gives no more than that 1/28, or 3.6 %, even if all are equally
common. More means that values were cut off; 5 % leaves room for chance.
"""

STRAY_SIGMAS = 6.0
"""Farther than this from the median of its layer, in robust standard deviations, the norm of an expert is odd."""

FEWEST_EXPERTS = 8
"""Of fewer experts in a layer there is no telling which one is odd."""

MOST_ROUNDING = 2.0**-4
"""Half a step of a mantissa of three bits: rounding to FP8 changes no number of its normal range by more."""

_NAMED = 5
_MAD_TO_SIGMA = 1.4826  # of a normal distribution


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that the figures say.

    Attributes:
        level: whether it is something to look into, to know, or to be glad of.
        text: the finding.
        rule: what makes it one.
        names: tensors or experts that it speaks of, the first few.
        count: how many there are.
    """

    level: Level
    text: str
    rule: str
    names: tuple[str, ...] = ()
    count: int = 0

    @property
    def more(self) -> int:
        """How many are not named."""
        return max(0, self.count - len(self.names))


def findings(seen: Overview) -> tuple[Finding, ...]:
    """All findings, those to look into first."""
    found = [
        *_changes(seen),
        *_left_out(seen),
        *_unusual(seen),
        *_dead_experts(seen),
        *_stray_experts(seen),
        *_saturation(seen),
        *_outliers(seen),
        *_requantising(seen),
        *_router_bias(seen),
    ]
    order: Sequence[Level] = ("warning", "note", "good")
    return tuple(sorted(found, key=lambda finding: order.index(finding.level)))


def expert_norms(seen: Overview) -> Floats:
    """The norm of every expert, over all its matrices: float64 `[layers, experts]`."""
    norms: Floats = np.sqrt(seen.grid(lambda each: each.squares).sum(-1))
    return norms


def robust_sigmas(norms: Floats) -> Floats:
    """How far each norm is from the median of its layer, in robust standard deviations; both `[layers, experts]`.

    The standard deviation is 1.4826 times the median absolute deviation; where that is zero, any distance is infinite.
    """
    distance = norms - np.median(norms, axis=1, keepdims=True)
    sigma = _MAD_TO_SIGMA * np.median(np.abs(distance), axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(distance == 0, 0.0, distance / sigma)


def percent(share: float) -> str:
    """A share as text: `2.61 %`."""
    return f"{100 * share:.3g} %"


def _unusual(seen: Overview) -> Iterator[Finding]:
    rule = "NaN or infinity in any tensor; a block scale that is zero, subnormal or negative"
    for inspection, found in zip(seen.checkpoints, seen.unusual, strict=True):
        by_what: dict[str, list[Unusual]] = {}
        for each in found:
            by_what.setdefault(each.what, []).append(each)
        where = f" in {inspection.path}" if len(seen.checkpoints) > 1 else ""
        for what, group in by_what.items():
            count = counted(sum(each.count for each in group), "number")
            text = f"{what[0].upper()}{what[1:]}: {count}{where}"
            yield _about("warning", text, rule, [each.key for each in group])
        if not found:
            text = f"No NaN, no infinity, and no scale that is zero, subnormal or negative{where}"
            yield Finding(level="good", text=text, rule=rule)


def _dead_experts(seen: Overview) -> Iterator[Finding]:
    dead = [each.key for each in seen.weights if each.expert is not None and each.squares == 0]
    rule = "a matrix of an expert whose norm is zero"
    if dead:
        text = f"Dead experts: all zeros in {counted(len(dead), 'matrix', 'matrices')}"
        yield _about("warning", text, rule, dead)
    else:
        yield Finding(level="good", text="No dead expert: every matrix of every expert has a norm", rule=rule)


def _stray_experts(seen: Overview) -> Iterator[Finding]:
    rule = (
        f"an expert whose norm is more than {STRAY_SIGMAS:g} robust standard deviations (1.4826 x the median absolute "
        f"deviation) from the median of its layer, in layers of {FEWEST_EXPERTS} experts or more"
    )
    if seen.config.num_local_experts < FEWEST_EXPERTS:
        return
    sigmas = robust_sigmas(expert_norms(seen))
    places = np.argwhere(np.abs(sigmas) > STRAY_SIGMAS)
    ranked = sorted(places.tolist(), key=lambda place: -abs(sigmas[tuple(place)]))
    if ranked:
        text = f"{counted(len(ranked), 'expert')} with a norm far from the layer's"
        names = [f"layer {layer}, expert {expert} ({sigmas[layer, expert]:+.1f})" for layer, expert in ranked]
        yield _about("note", text, rule, names)
    else:
        yield Finding(level="good", text="No expert has a norm far from its layer's", rule=rule)


def _saturation(seen: Overview) -> Iterator[Finding]:
    if not seen.codes.any():
        return
    rule = (
        f"a matrix with more than {percent(SATURATED_SHARE)} of its FP8 codes at +-448, and one in each block: scaling "
        "by amax gives 1/28 (3.6 %) at most where large magnitudes are no commoner than small ones; more were cut off"
    )
    shares = {each.key: each.scaled.saturated / each.elements for each in seen.weights if each.scaled}
    allowed = {each.key: SATURATED_SHARE + each.scaled.blocks / each.elements for each in seen.weights if each.scaled}
    over = sorted((key for key in shares if shares[key] > allowed[key]), key=lambda key: -shares[key])
    if over:
        text = f"Saturated codes in {counted(len(over), 'matrix', 'matrices')}, up to {percent(shares[over[0]])}"
        yield _about("warning", text, rule, over)
    else:
        text = f"No saturated matrix: at most {percent(max(shares.values()))} of codes at +-448"
        yield Finding(level="good", text=text, rule=rule)


def _outliers(seen: Overview) -> Iterator[Finding]:
    rule = (
        f"a block whose largest magnitude is more than {OUTLIER_RATIO:g} times that of the median block of its matrix; "
        "of a matrix the four largest are counted"
    )
    held = {each.key: each.scaled.outliers for each in seen.weights if each.scaled and each.scaled.outliers}
    if held:
        count = sum(map(len, held.values()))
        names = sorted(held, key=lambda key: -held[key][0].ratio)
        text = f"{counted(count, 'outlier block')} in {counted(len(names), 'matrix', 'matrices')}"
        yield _about("note", f"{text}, up to {held[names[0]][0].ratio:.3g} times the median", rule, names)
    else:
        yield Finding(level="good", text="No outlier blocks", rule=rule)


def _requantising(seen: Overview) -> Iterator[Finding]:
    scaled = [each for each in seen.weights if each.scaled is not None]
    errors = {each.key: ratio(each.scaled.errors, each.squares) for each in scaled if each.scaled}
    known = {key: error for key, error in errors.items() if math.isfinite(error)}
    if not known:
        return
    changed = sorted((key for key in known if known[key] > 0), key=lambda key: -known[key])
    rule = "the root of the squared change over that of the weights, when each block is quantised anew by amax / 448"
    what = "Deriving the scales anew" if seen.codes.any() else "Quantising to FP8 by amax"
    if changed:
        kind = "FP8 weight" if seen.codes.any() else "weight"
        most = percent(known[changed[0]])
        text = f"{what} would change {len(changed):,} of {counted(len(known), kind)}, by {most} at most"
        yield _about("note", text, rule, changed)
    else:
        yield Finding(level="good", text=f"{what} would change none of {counted(len(known), 'weight')}", rule=rule)


def _router_bias(seen: Overview) -> Iterator[Finding]:
    ranges = seen.router_bias.max(1) - seen.router_bias.min(1)
    flat = [str(layer) for layer in np.flatnonzero(ranges == 0)]
    if flat:
        text = f"Router bias without effect in {counted(len(flat), 'layer')}"
        yield _about("note", text, "a router bias that is the same for all experts", [f"layer {n}" for n in flat])


def _left_out(seen: Overview) -> Iterator[Finding]:
    for each in itertools.chain(*(inspection.left_out for inspection in seen.checkpoints)):
        count = counted(len(each.keys), "tensor")
        why = "config.json announces them, as modules for multi-token prediction" if each.announced else "as asked"
        text = f"{count} that the figures leave out: {why}"
        yield _about("note", text, f"names that begin with {shown(each.prefix)}", [shown(key) for key in each.keys])


def _changes(seen: Overview) -> Iterator[Finding]:
    if len(seen.checkpoints) < 2:
        return
    pairs = [(each, each.change) for each in seen.weights if each.change is not None]
    unpaired = [each.key for each, change in pairs if change.non_finite]
    if unpaired:
        rule = "an element that is NaN or infinite in one checkpoint, and something else in the other"
        yield _about(
            "warning", f"{counted(len(unpaired), 'tensor')} with numbers that only one of them has", rule, unpaired
        )
    differing = [each for each, change in pairs if change.differing]
    rule = "values compared in the less precise dtype of the two, FP8 dequantised, as minimax-jax diff does"
    if not differing:
        text = f"Nothing changed: all {counted(len(pairs), 'weight')} have the same values"
        yield Finding(level="good", text=text, rule=rule)
    elif seen.quantised:
        yield from _quantisation(seen, differing)
    else:
        share = percent(relative_change(seen.weights))
        text = f"{len(differing):,} of {counted(len(pairs), 'weight')} changed, by {share} over all"
        yield Finding(level="note", text=text, rule=f"{rule}; {RELATIVE}")
        yield from _moved(seen)


def _quantisation(seen: Overview, differing: list[Figures]) -> Iterator[Finding]:
    rule = f"{RELATIVE}; above {percent(MOST_ROUNDING)} it is more than rounding to three bits of mantissa gives"
    changes = {each.key: relative_change([each]) for each in differing}
    over = sorted((key for key in changes if changes[key] > MOST_ROUNDING), key=lambda key: -changes[key])
    text = f"Quantisation error: {percent(relative_change(seen.weights))} over all"
    if over:
        yield _about("warning", f"{text}; more than rounding explains in {counted(len(over), 'weight')}", rule, over)
    else:
        ranked = sorted(changes, key=lambda key: -changes[key])
        yield _about("note", f"{text}, {percent(changes[ranked[0]])} at most", rule, ranked)


def _moved(seen: Overview) -> Iterator[Finding]:
    squares = seen.grid(change_squares).sum(-1)
    moved = int(np.count_nonzero(squares))
    total = math.fsum(map(change_squares, seen.weights))
    rule = "an expert moved when an element of its matrices did; shares are of the sum of squared changes"
    if not moved:
        yield Finding(level="note", text="No expert moved: what changed lies outside of them", rule=rule)
        return
    largest = np.sort(squares, axis=None)[::-1][: max(1, squares.size // 10)]
    text = (
        f"{moved:,} of {counted(squares.size, 'expert')} moved and hold {percent(squares.sum() / total)} of the change"
    )
    tenth = f"the tenth of them that moved most holds {percent(largest.sum() / total)}"
    yield Finding(level="note", text=f"{text}; {tenth}", rule=rule)


def _about(level: Level, text: str, rule: str, names: Sequence[str]) -> Finding:
    return Finding(level=level, text=text, rule=rule, names=tuple(names[:_NAMED]), count=len(names))
