"""The pieces of a conversion that stand for themselves: what each reads, and how much memory it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from minimax_jax.io.header import TensorInfo
from minimax_jax.layout.specs import Entry, TensorSpec

COPIES_OF_INPUT, COPIES_OF_OUTPUT = 2, 3
"""What a conversion holds at its peak: what it read and its device copy; its output and two temporaries like it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """A unit that copies bytes of one tensor: `[start, stop)` within the tensor."""

    info: TensorInfo
    key: str
    start: int
    stop: int

    @property
    def read_bytes(self) -> int:
        """Bytes read, and bytes written."""
        return self.stop - self.start

    @property
    def memory_bytes(self) -> int:
        """Peak memory of the unit."""
        return self.read_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Convert:
    """A unit that converts one entry, or some experts of it.

    Attributes:
        entry: the entry, narrowed to the experts of this unit.
        first: the first of them, or of `rows`.
        read_bytes: bytes of all the tensors that are read.
        memory_bytes: peak memory of the unit.
        rows: of an entry that is neither grouped nor block-scaled, so many leading rows; else None.
    """

    entry: Entry
    first: int
    read_bytes: int
    memory_bytes: int
    rows: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupScales:
    """A unit that groups the block scales of one entry, or of some experts of it, for the sidecar.

    Attributes:
        entry: the entry, narrowed to the experts of this unit.
        first: the first of them.
    """

    entry: Entry
    first: int

    @property
    def read_bytes(self) -> int:
        """Bytes of all the scales."""
        return TensorSpec(self.entry.native, self.entry.grid, "F32").nbytes

    @property
    def memory_bytes(self) -> int:
        """Peak memory of the unit."""
        return (COPIES_OF_INPUT + COPIES_OF_OUTPUT) * self.read_bytes


Unit: TypeAlias = Copy | Convert | GroupScales


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """What a unit writes of one tensor: `nbytes` bytes from `offset_bytes` on."""

    key: str
    offset_bytes: int
    nbytes: int
