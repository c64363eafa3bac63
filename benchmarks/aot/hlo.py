"""What the text of a compiled program tells: collectives, kernels, and what it writes to memory on the way."""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass

_COLLECTIVES = (
    *("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute"),
    *("ragged-all-to-all", "collective-broadcast"),
)
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "partition-id", "replica-id"}
"""Operations that move no data."""
_PASSING = _FREE | {"while", "conditional", "call", "optimization-barrier", "dynamic-update-slice"}
"""Operations whose results are memory that was there before."""

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z\-0-9]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d+(?:e\d+m\d+\w*)?|pred)\[([\d,]*)\]")
_CALLED = re.compile(r"\bcalls=%?([\w.\-]+)")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_BITS = re.compile(r"\d+")


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of a program.

    Attributes:
        computation: the computation it stands in.
        entry: whether that is where the program begins.
        operation: such as `fusion`.
        shape: type of its result, as text.
        rest: operands and attributes, as text.
    """

    computation: str
    entry: bool
    operation: str
    shape: str
    rest: str

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return sum(array_bytes(self.shape))


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Collectives of one kind and shape.

    Attributes:
        operation: such as `all-reduce`.
        shape: of one result, such as `bf16[8,3072]`.
        result_bytes: of one.
        times: how often one run of the program does it.
    """

    operation: str
    shape: str
    result_bytes: int
    times: int


def instructions(text: str) -> list[Instruction]:
    """Every instruction of a program that runs, so without the insides of fusions."""
    found, computation, entry = [], "", False
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            computation, entry = head[2], bool(head[1])
        elif body := _INSTRUCTION.match(line):
            shape, operation, rest = body[2], body[3], body[4]
            found.append(Instruction(computation=computation, entry=entry, operation=operation, shape=shape, rest=rest))
    fused = {name for own in found if own.operation == "fusion" for name in _CALLED.findall(own.rest)}
    return [own for own in found if own.computation not in fused]


def collectives(program: list[Instruction], loops: int = 1) -> list[Collective]:
    """What goes between devices; in loops, as often as they run.

    Args:
        program: from `instructions`.
        loops: how often a loop runs of which the compiler does not say it.
    """
    trips = {
        body[1]: int(count[1]) if (count := _TRIPS.search(own.rest)) else loops
        for own in program
        if own.operation == "while" and (body := _BODY.search(own.rest))
    }
    found: Counter[tuple[str, str, int]] = Counter()
    for own in program:
        operation = own.operation.removesuffix("-start")
        if operation in _COLLECTIVES:
            shapes = _results(own)
            key = operation, ", ".join(shapes), sum(size for one in shapes for size in array_bytes(one))
            found[key] += trips.get(own.computation, 1)
    return [
        Collective(operation=operation, shape=shape, result_bytes=size, times=times)
        for (operation, shape, size), times in found.items()
    ]


def kernels(program: list[Instruction]) -> int:
    """How many kernels a GPU program without loops launches."""
    return sum(own.entry and own.operation not in _FREE and not own.operation.endswith("-done") for own in program)


def largest_weights(program: list[Instruction], matrices: Set[int]) -> tuple[int, str]:
    """Bytes and shape of the largest array of float matrices that the program makes; (0, "") if there is none.

    Args:
        program: from `instructions`.
        matrices: elements of one matrix; an array is one of matrices if its last axes multiply to any of these.
    """
    sizes = [
        (size, f"{dtype}[{dims}]")
        for own in program
        if own.operation not in _PASSING and not own.operation.endswith(("-start", "-done"))
        for dtype, dims, size in _arrays(own.shape)
        if dtype in ("bf16", "f16", "f32") and matrices & set(_suffixes(dims))
    ]
    return max(sizes, default=(0, ""))


def array_bytes(shape: str) -> Iterator[int]:
    """Bytes of every array of a type such as `(bf16[2,3]{1,0}, f32[])`."""
    return (size for _, _, size in _arrays(shape))


def _arrays(shape: str) -> Iterator[tuple[str, str, int]]:
    """Dtype, dims and bytes of every array of a type."""
    for dtype, dims in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(_BITS.findall(dtype)[0])
        yield dtype, dims, math.prod(_sizes(dims)) * bits // 8


def _sizes(dims: str) -> list[int]:
    return [int(size) for size in dims.split(",") if size]


def _suffixes(dims: str) -> Iterator[int]:
    """Products of the last axis, of the last two, and so on."""
    return itertools.accumulate(reversed(_sizes(dims)), operator.mul)


def _results(own: Instruction) -> list[str]:
    """The arrays that a collective results in: the start of a gather also carries what goes in."""
    arrays = [f"{dtype}[{dims}]" for dtype, dims, _ in _arrays(own.shape)]
    carries = own.operation in ("all-gather-start", "collective-permute-start")
    return arrays[len(arrays) // 2 : len(arrays) // 2 * 2] if carries and len(arrays) > 1 else arrays
