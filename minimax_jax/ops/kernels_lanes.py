"""Vectors, addresses and lines of the cache, in LLVM's terms: what `minimax_jax.ops.kernels_simd` is made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import llvmlite.ir as ir
from numba.core import cgutils

LINE_BYTES = 64
"""Of a processor's cache."""

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()


class BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat16."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


class Lanes:
    """Makes vectors of so many lanes."""

    def __init__(self, builder: Any, count: int):
        """Vectors of `count` values."""
        self.builder, self.count = builder, count

    def of(self, kind: Any) -> Any:
        """The type of a vector of `kind`."""
        return ir.VectorType(kind, self.count)

    def constant(self, kind: Any, value: int) -> Any:
        """A number, in every lane."""
        return ir.Constant(self.of(kind), [value] * self.count)

    def numbers(self, kind: Any, start: int, step: int = 1) -> Any:
        """`start`, and what comes after it."""
        return ir.Constant(self.of(kind), list(range(start, start + step * self.count, step)))

    def same(self, value: Any) -> Any:
        """A value of the program, in every lane."""
        empty = ir.Constant(self.of(value.type), ir.Undefined)
        first = self.builder.insert_element(empty, value, I32(0))
        return self.builder.shuffle_vector(first, empty, self.constant(I32, 0))

    def load(self, place: Any, kind: Any) -> Any:
        """A vector from memory."""
        return self.builder.load(self.builder.inttoptr(place, self.of(kind).as_pointer()), align=1)

    def look_up(self, tables: list[Any], places: Any) -> Any:
        """Bytes of a table of 128, in two halves, by the lower seven bits of the places; for 64 lanes, on some x86."""
        return self._bytes("llvm.x86.avx512.vpermi2var.qi.512", tables[0], places, tables[1])

    def pick(self, table: Any, places: Any) -> Any:
        """Bytes of a table of 64, by the lower six bits of the places; for 64 lanes, on some x86."""
        return self._bytes("llvm.x86.avx512.permvar.qi.512", table, places)

    def halves(self, words: Any) -> tuple[Any, Any]:
        """The lower and the upper bytes of words of 16 bits; as `look_up`."""
        count, items = self.count, self.builder.bitcast(words, ir.VectorType(I8, 2 * self.count))
        table = [shuffle(self.builder, items, items, range(start, start + count)) for start in (0, count)]
        return self.look_up(table, self.numbers(I8, 0, 2)), self.look_up(table, self.numbers(I8, 1, 2))

    def count_bits(self, values: Any) -> Any:
        """How many bits are set in each byte."""
        return self._bytes(f"llvm.ctpop.v{self.count}i8", values)

    def _bytes(self, name: str, *vectors: Any) -> Any:
        kind = ir.FunctionType(self.of(I8), [self.of(I8)] * len(vectors))
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), vectors)

    def reduced(self, how: str, values: Any) -> Any:
        """One value of all lanes."""
        kind = values.type.element
        name = f"llvm.vector.reduce.{how}.v{self.count}i{kind.width}"
        function = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(kind, [values.type]), name)
        return self.builder.call(function, [values])

    def select(self, where: Any, values: Any, other: int) -> Any:
        """Values, and elsewhere one number."""
        return self.builder.select(where, values, self.constant(values.type.element, other))

    def mark_reached(self, values: Any, limits: list[Any]) -> Any:
        """A bit for each limit that a value reaches, lane by lane."""
        build, marks = self.builder, self.constant(values.type.element, 0)
        for bit, limit in enumerate(limits):
            reached = build.icmp_unsigned(">=", values, self.same(limit))
            marks = build.or_(marks, self.select(reached, self.constant(values.type.element, 1 << bit), 0))
        return marks

    def count_reached(self, values: Any, limits: list[Any]) -> Any:
        """How many of the limits a value reaches, lane by lane."""
        build, total = self.builder, self.constant(values.type.element, 0)
        for limit in limits:
            reached = build.icmp_unsigned(">=", values, self.same(limit))
            total = build.add(total, build.zext(reached, values.type))
        return total


def place_of(context: Any, builder: Any, kind: Any, array: Any, *index: Any) -> Any:
    """The address of an element, as an integer."""
    fields = context.make_array(kind)(context, builder, array)
    strides = [*cgutils.unpack_tuple(builder, fields.strides, kind.ndim)[:-1], I64(kind.dtype.bitwidth // 8)]
    place = builder.ptrtoint(fields.data, I64)
    for at, stride in zip(index, strides, strict=True):
        place = builder.add(place, builder.mul(at, stride))
    return place


def places_below(context: Any, builder: Any, kind: Any, array: Any, row: Any, col: Any, count: int) -> list[Any]:
    """The addresses of elements below each other; by sums, since a product for each takes longer."""
    stride = cgutils.unpack_tuple(builder, context.make_array(kind)(context, builder, array).strides, kind.ndim)[0]
    places = [place_of(context, builder, kind, array, row, col)]
    while len(places) < count:
        places.append(builder.add(places[-1], stride))
    return places


def align_stack(builder: Any) -> None:
    """Have the function that is being built put vectors aside on whole lines of the cache.

    The compiler does not by itself, and where the stack of a thread begins is random: in one process in two or three,
    each such vector lay across two lines, and kernels took up to half as long again. No caller may take the function
    into itself, which would take its stack as well.
    """
    builder.function.attributes.alignstack = LINE_BYTES
    builder.function.attributes.add("noinline")


def fetch(builder: Any, place: Any) -> None:
    """Bring the line of a place to the second-level cache; a place that is not there does no harm."""
    pointer = builder.inttoptr(place, I8.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    to_read, second_level, data = I32(0), I32(2), I32(1)
    builder.call(function, [pointer, to_read, second_level, data])


def store(builder: Any, lines: Any, place: Any, even: Any) -> None:
    """Store whole lines: past the cache where they are `even` with its lines, which are then not read before."""
    pointer = builder.inttoptr(place, lines.type.as_pointer())
    with builder.if_else(builder.trunc(even, ir.IntType(1))) as (past, through):
        with past:
            instruction = builder.store(lines, pointer, align=LINE_BYTES)
            instruction.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))
        with through:
            builder.store(lines, pointer, align=1)


def join(builder: Any, vectors: list[Any]) -> Any:
    """Vectors end to end."""
    while len(vectors) > 1:
        size = 2 * vectors[0].type.count
        vectors = [shuffle(builder, *pair, range(size)) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]


def shuffle(builder: Any, one: Any, other: Any, places: Iterable[int]) -> Any:
    """The lanes of two vectors, counted through, that `places` names."""
    chosen = list(places)
    return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(I32, len(chosen)), chosen))
