"""What follows from the table for one config: every tensor by name, both ways, with shape, dtype and size.

The key set is finite, so it is enumerated once and looked up in dicts; nothing here parses key text.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from minimax_jax.bulk import without_collector
from minimax_jax.display import Displayed, counted, size, table_of
from minimax_jax.dtypes import DTYPES
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.layout.table import PREFIX, SCALE_SUFFIX, Row, axis_sizes, rows

if TYPE_CHECKING:
    import jax


class TensorSpec(NamedTuple):
    """Name, shape and dtype (safetensors' spelling) of one stored tensor."""

    key: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Place(NamedTuple):
    """Where a Hugging Face tensor goes: which entry, which expert and part of it, and whether it is the scales."""

    entry: Entry
    expert: int
    part: int
    is_scale: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """One native tensor and the Hugging Face tensors it is made of.

    Attributes:
        row: the kind of tensor.
        native: its native name.
        layer: the layer it belongs to, None outside the layers.
        keys: Hugging Face names of the weights, `keys[expert][part]`; one expert for rows that do not group.
        part_shape: shape of one part, as Hugging Face stores it.
        block: rows and columns of one FP8 block of a part, for entries that are block-scaled.
        sizes: of all logical axes, for layouts that take axes apart or stack layers.
        prefix: what stands in place of the table's `PREFIX`.
    """

    row: Row
    native: str
    layer: int | None
    keys: tuple[tuple[str, ...], ...]
    part_shape: tuple[int, ...]
    block: tuple[int, int]
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict, repr=False)
    prefix: str = PREFIX

    def __repr__(self) -> str:
        return f"Entry({self.native!r}, {self.row.dtype}{list(self.shape)}, of {self.experts * self.parts} published)"

    @property
    def experts(self) -> int:
        """How many experts the native tensor holds; 1 where it does not group."""
        return len(self.keys)

    @property
    def parts(self) -> int:
        """How many Hugging Face tensors one expert is made of."""
        return len(self.row.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the native tensor: `[experts, cols, parts*rows]` for grouped rows, else the part's own."""
        return self._grouped(self.part_shape)

    @property
    def part_grid(self) -> tuple[int, ...]:
        """Shape of the block scales of one part of a block-scaled entry: `[ceil(rows/block), ceil(cols/block)]`."""
        return tuple(-(-size // block) for size, block in zip(self.part_shape, self.block, strict=True))

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the block scales of a block-scaled native tensor: the grid of a part, grouped as the shape is."""
        return self._grouped(self.part_grid)

    def _grouped(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.experts, shape[1], self.parts * shape[0]) if self.row.grouped else shape

    def narrow(self, experts: slice) -> Entry:
        """The same entry with only some of its experts."""
        return dataclasses.replace(self, keys=self.keys[experts])

    def native_specs(self, dtype: str) -> Iterator[TensorSpec]:
        """The stored tensors of the native form; FP8 has its scales behind it."""
        yield TensorSpec(self.native, self.shape, dtype)
        if dtype == "F8_E4M3":
            yield TensorSpec(self.native + SCALE_SUFFIX, self.grid, "F32")

    def nbytes(self, dtype: str) -> int:
        """Bytes of the weights stored as `dtype`, scales of FP8 included: as many in one layout as in another."""
        return total_bytes(self.native_specs(dtype))

    def hf_specs(self, dtype: str) -> Iterator[TensorSpec]:
        """The stored tensors of the Hugging Face form, expert by expert; FP8 weights have their scales behind them."""
        grid = self.part_grid if dtype == "F8_E4M3" else None
        for keys in self.keys:
            for key in keys:
                yield TensorSpec(key, self.part_shape, dtype)
                if grid is not None:
                    yield TensorSpec(key + SCALE_SUFFIX, grid, "F32")

    def scale_specs(self) -> Iterator[TensorSpec]:
        """The block scales alone of the Hugging Face form, expert by expert."""
        return (TensorSpec(key + SCALE_SUFFIX, self.part_grid, "F32") for keys in self.keys for key in keys)

    def dtype(self, scaled: str) -> str:
        """Stored dtype when block-scaled rows are stored as `scaled`; other rows keep the published one."""
        return scaled if self.row.scaled else self.row.dtype


class Specs(Displayed):
    """Every tensor of one checkpoint, enumerated.

    Attributes:
        config: the checkpoint's config.
        prefix: what stands in front of names below the model.
        entries: one for each native tensor, in the order of a forward pass.
        by_native: the same by native name.
        places: for each Hugging Face name (scales included), where it goes.
    """

    def __init__(self, config: MiniMaxConfig, prefix: str = PREFIX):
        self.config = config
        self.prefix = prefix
        self.entries = tuple(_entries(config, prefix))
        self.by_native = {entry.native: entry for entry in self.entries}
        self.places = dict(_places(self.entries))

    def views(self) -> Iterable[Any]:
        """What there is to look at: the kinds of tensors, as they are published."""
        published = list(self.hf())
        yield f"MiniMax-M2, {counted(len(published), 'tensor')} as published, {size(total_bytes(published))}"
        table = table_of("native tensor", "axes", "shape", "published as", "count")
        counts = Counter(entry.row for entry in self.entries)
        first = {entry.row: entry for entry in reversed(self.entries)}
        for row, count in counts.items():
            shape = str(list(first[row].shape))
            table.add_row(row.native, ", ".join(row.native_axes), shape, row.dtype, f"{count:,}")
        yield table

    def hf(self, scaled: str = "F8_E4M3") -> Iterator[TensorSpec]:
        """Every tensor of the Hugging Face form, block-scaled rows stored as `scaled` (`F8_E4M3`, `BF16`, `F32`)."""
        return (spec for entry in self.entries for spec in entry.hf_specs(entry.dtype(scaled)))

    def native(self, scaled: str = "BF16") -> Iterator[TensorSpec]:
        """Every tensor of the native form, block-scaled rows stored as `scaled`."""
        return (spec for entry in self.entries for spec in entry.native_specs(entry.dtype(scaled)))

    def abstract(self, scaled: str = "BF16") -> dict[str, jax.ShapeDtypeStruct]:
        """`jax.ShapeDtypeStruct` of every native tensor, for `jax.eval_shape`, ahead-of-time compilation, sharding."""
        import jax

        return {
            spec.key: jax.ShapeDtypeStruct(spec.shape, DTYPES[spec.dtype])  # type: ignore[no-untyped-call]
            for spec in self.native(scaled)
        }


def specs(config: MiniMaxConfig, prefix: str = PREFIX) -> Specs:
    """The `Specs` of a config, computed once; 96,103 names take about a tenth of a second.

    Args:
        config: the checkpoint's config.
        prefix: what stands in front of names below the model: `model.`, or nothing in some exports.
    """
    return _specs(config, prefix)


@functools.lru_cache(maxsize=8)
@without_collector
def _specs(config: MiniMaxConfig, prefix: str) -> Specs:
    return Specs(config, prefix)


def _entries(config: MiniMaxConfig, prefix: str) -> Iterator[Entry]:
    sizes = axis_sizes(config)
    shapes = {row: tuple(sizes[axis] for axis in row.axes) for row in rows(config)}
    for row, layer in _order(config):
        experts = range(config.num_local_experts if row.grouped else 1)
        parts = [named(part, prefix, layer) for part in row.parts]
        yield Entry(
            row=row,
            native=named(row.native, prefix, layer),
            layer=layer,
            keys=tuple(tuple(part.replace("{expert}", str(expert)) for part in parts) for expert in experts),
            part_shape=shapes[row],
            block=config.block,
            sizes=sizes,
            prefix=prefix,
        )


def _order(config: MiniMaxConfig) -> Iterator[tuple[Row, int | None]]:
    """Rows before the layers, then layer by layer, then rows after the layers."""
    for per_layer, group in itertools.groupby(rows(config), lambda row: row.per_layer):
        layers = range(config.num_hidden_layers) if per_layer else (None,)
        yield from ((row, layer) for layer, row in itertools.product(layers, group))


def named(template: str, prefix: str, layer: int | None) -> str:
    """The name that a template of the table stands for."""
    name = prefix + template[len(PREFIX) :] if template.startswith(PREFIX) else template
    return name if layer is None else name.replace("{layer}", str(layer))


def _places(entries: tuple[Entry, ...]) -> Iterator[tuple[str, Place]]:
    for entry in entries:
        for expert, keys in enumerate(entry.keys):
            for part, key in enumerate(keys):
                yield key, Place(entry, expert, part, False)
                if entry.row.scaled:
                    yield key + SCALE_SUFFIX, Place(entry, expert, part, True)


class HasBytes(Protocol):
    """Anything with a size in bytes: a `TensorSpec`, a tensor to be written, an array."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""


def total_bytes(tensors: Iterable[HasBytes]) -> int:
    """Sum of `nbytes` over tensors."""
    return sum(tensor.nbytes for tensor in tensors)
