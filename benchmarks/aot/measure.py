"""Compile a program, read what the compiler tells of it, and hold it against the limits of its kind."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from benchmarks.aot import hlo
from benchmarks.aot.programs import Program
from benchmarks.aot.targets import KINDS

TRAFFIC = 1.25
"""Times the least traffic that the codec may cost a TPU."""
TEMPORARIES = 0.05
"""Temporaries that the codec may need on a TPU, as a share of the output."""
NOTHING = 0.001
"""What counts as no temporaries: a copy of the block scales may be among them, which is 0.03 % of the output."""
KERNELS = 2
"""Kernels that dequantisation may be on a GPU, which shows no traffic."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; bytes are of one chip.

    Attributes:
        target: name of the target.
        program: name of the program.
        argument_bytes: arguments.
        temporary_bytes: what is needed beside arguments and results.
        output_bytes: results, without those that take the place of arguments.
        accessed_bytes: traffic with the chip's memory; None where the compiler does not say, or where there are loops,
            which it counts once.
        least_bytes: the least that it can be; None if not known.
        seconds: the compiler's estimate of the time; None where it makes none.
        kernels: how many are launched; None but on GPUs for programs without loops.
        collectives: what goes between chips.
        largest: shape of the largest array of dequantised experts that is made on the way.
        compile_seconds: how long it took here.
        checks: what must hold, and whether it does.
        error: why it could not be compiled; "" if it could.
    """

    target: str
    program: str
    argument_bytes: int = 0
    temporary_bytes: int = 0
    output_bytes: int = 0
    accessed_bytes: float | None = None
    least_bytes: int | None = None
    seconds: float | None = None
    kernels: int | None = None
    collectives: tuple[hlo.Collective, ...] = ()
    largest: str = ""
    compile_seconds: float = 0.0
    checks: dict[str, bool]
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether everything holds."""
        return all(self.checks.values())


def measure(program: Program) -> Row:
    """Compile a program and hold it against its limits; a program that does not compile fails."""
    started = time.perf_counter()
    out = {} if program.out is None else {"out_shardings": program.out}
    jitted = jax.jit(program.function, donate_argnames=program.donated, **out)
    with tempfile.TemporaryDirectory() as folder:
        try:
            options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            compiled = jitted.lower(*program.arguments).compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            text = str(error).splitlines()[0]
            return Row(target=program.target.name, program=program.name, error=text, checks={"compiles": False})
        return read(program, compiled, _text(compiled, Path(folder)), time.perf_counter() - started)


def read(program: Program, compiled: Any, text: list[hlo.Instruction], compile_seconds: float) -> Row:
    """The row of a compiled program."""
    memory, loops = compiled.memory_analysis(), any(own.operation == "while" for own in text)
    cost = {} if loops else _cost(compiled)
    largest_bytes, largest = hlo.largest_weights(text, program.matrices)
    gpu = KINDS[program.target.kind].platform == "cuda"
    row = Row(
        target=program.target.name,
        program=program.name,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        accessed_bytes=cost.get("bytes accessed"),
        least_bytes=program.least_bytes,
        seconds=cost.get("optimal_seconds"),
        kernels=hlo.kernels(text) if gpu and not loops else None,
        collectives=tuple(hlo.collectives(text, program.loops)),
        largest=largest,
        compile_seconds=compile_seconds,
        checks={},
    )
    row.checks.update(_checks(program, row, largest_bytes))
    return row


def _text(compiled: Any, dump: Path) -> list[hlo.Instruction]:
    """The compiled program, or what its compiler wrote of it where that knows operations that jaxlib does not."""
    try:
        return hlo.instructions(compiled.as_text())
    except jax.errors.JaxRuntimeError:
        (written,) = dump.glob("*.after_optimizations.txt")
        return hlo.instructions(written.read_text())


def _cost(compiled: Any) -> dict[str, float]:
    """What the compiler thinks a run costs; numbers below zero say that it does not know."""
    cost = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    return {name: number for name, number in cost.items() if number > 0}


def _checks(program: Program, row: Row, largest_bytes: int) -> dict[str, bool]:
    used = row.argument_bytes + row.temporary_bytes + row.output_bytes
    checks = {"fits": used <= KINDS[program.target.kind].memory_bytes}
    if program.kind in ("op", "load"):
        checks["no collective"] = not row.collectives
    if program.kind == "op":
        checks |= _op_checks(row)
    if program.matrices:
        checks["one layer at a time"] = largest_bytes <= program.layer_bytes
        checks["no weights between chips"] = all(own.operation == "all-reduce" for own in row.collectives)
    return checks


def _op_checks(row: Row) -> dict[str, bool]:
    if row.kernels is not None:
        none = row.temporary_bytes <= NOTHING * row.output_bytes
        return {"no temporaries": none, f"at most {KERNELS} kernels": row.kernels <= KERNELS}
    checks = {f"temporaries below {TEMPORARIES:.0%}": row.temporary_bytes < TEMPORARIES * row.output_bytes}
    if row.accessed_bytes is not None and row.least_bytes:
        checks[f"traffic at most {TRAFFIC}x"] = row.accessed_bytes <= TRAFFIC * row.least_bytes
    return checks
