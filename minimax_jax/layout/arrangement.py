"""How one native tensor lies in the tensors of a further layout: worked out from its form, for all layouts alike.

The native tensor is seen as an array of the axes of the table: `[expert, cols, part, rows]` where it groups. A form
orders them, joins some, and leaves others to the names. Everything here is names and numbers; `ops.axes` moves arrays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from minimax_jax.layout.forms import FORMS, LAYER, Form
from minimax_jax.layout.specs import Entry, named

_PART = "part"


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """A native tensor, or some of its leading rows, in a further layout.

    Attributes:
        names: the tensors that it lies in: one, or one for each part.
        split: sizes of its axes when all of them are taken apart.
        order: these axes in the order of the layout; that of the parts first where each has a tensor of its own.
        apart: whether each part has a tensor of its own.
        shape: shape of what it fills of each tensor, layers apart.
        layer: which layer it is of a stack; None where layers are not stacked.
        layer_axis: the axis of the tensors along which layers are stacked.
        layers: how many layers are stacked.
        row_axis: the axis of the tensors along which its leading rows lie (experts, where it groups); None where they
            lie across several: then nothing but the whole can be arranged.
    """

    names: tuple[str, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    apart: bool
    shape: tuple[int, ...]
    layer: int | None
    layer_axis: int | None
    layers: int
    row_axis: int | None

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape of each tensor, all layers of a stack included."""
        at = self.layer_axis
        return self.shape if at is None else (*self.shape[:at], self.layers, *self.shape[at:])

    def region(self, first: int = 0) -> tuple[slice, ...]:
        """What it fills of each tensor, its first row being row `first` of the whole."""
        region = [slice(0, size) for size in self.whole_shape]
        if self.row_axis is not None:
            region[self.row_axis] = slice(first, first + region[self.row_axis].stop)
        if self.layer_axis is not None and self.layer is not None:
            region[self.layer_axis] = slice(self.layer, self.layer + 1)
        return tuple(region)


def stored_names(entry: Entry, layout: str) -> tuple[str, ...]:
    """The tensors of a further layout in which an entry lies: one, or one for each part."""
    return tuple(named(name, entry.prefix, entry.layer) for name in FORMS[layout][entry.row].names)


def arrange(entry: Entry, layout: str, *, rows: int | None = None, scales: bool = False) -> Arrangement:
    """How an entry (or some experts of it) lies in a further layout.

    Args:
        entry: the entry.
        layout: one of `forms.FURTHER`.
        rows: so many leading rows of an entry that does not group, where `row_axis` is one axis; None for all.
        scales: of its block scales instead; their names still lack the suffix.
    """
    form = FORMS[layout][entry.row]
    axes = _native_axes(entry, form)
    sizes = dict(entry.sizes) | {"expert": entry.experts, _PART: entry.parts}
    sizes |= zip(entry.row.axes, entry.part_grid if scales else entry.part_shape, strict=True)
    by_rows = axes[0] in form.axes and axes[0] in ("expert", entry.row.axes[0])
    if rows is not None and by_rows:
        sizes[axes[0]] = rows
    steps = [(axis,) if axis in axes else tuple(axis.split("*")) for axis in form.axes if axis != LAYER]
    apart = entry.row.grouped and not any(_PART in step for step in steps)
    inner = [axis for step in steps for axis in step]
    layer_axis = form.axes.index(LAYER) if LAYER in form.axes else None
    return Arrangement(
        names=stored_names(entry, layout),
        split=tuple(sizes[axis] for axis in axes),
        order=tuple(axes.index(axis) for axis in ([_PART] if apart else []) + inner),
        apart=apart,
        shape=tuple(math.prod(sizes[axis] for axis in step) for step in steps),
        layer=None if layer_axis is None else entry.layer,
        layer_axis=layer_axis,
        layers=1 if layer_axis is None else entry.sizes[LAYER],
        row_axis=form.axes.index(axes[0]) if by_rows else None,
    )


def _native_axes(entry: Entry, form: Form) -> list[str]:
    """The axes of the native tensor, each taken apart that the form does not have as it is."""
    if entry.row.grouped:
        rows, cols = entry.row.axes
        return ["expert", cols, _PART, rows]
    return [part for axis in entry.row.axes for part in ([axis] if axis in form.axes else axis.split("*"))]
