"""Contestants from file to file. All of them flush what they wrote to the disk before they are done."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors.torch import load_file

import minimax_jax as mj
from benchmarks.speed import bounds, peers
from benchmarks.speed.cases import Case, require_same
from benchmarks.speed.rounds import Contestant, Role

WARM, COLD = "file to file, warm", "file to file, cold"
COPY, COPY_TWICE = "plain copy, 1 byte for 1", "plain copy, 2 bytes for 1"
TO_BF16, TO_FP8, BACK = "FP8 to native bf16", "FP8 to native FP8", "native FP8 back to FP8"
NEMO = "NeMo load_file, from_hf, save_file"


def contestants(case: Case, few: Case, folder: Path) -> Iterator[Contestant]:
    """Those of both sections: with what is read in the page cache, and without."""
    native = folder / "native"
    mj.convert(case.path, native, dtype="fp8")
    grouped = sorted(native.glob("*.safetensors"))
    nemo = functools.partial(_contestant, WARM, few, folder / "nemo", False, NEMO, "peer", few.files)
    yield nemo(lambda out: peers.nemo_file_to_file(few, out), _holds_bf16)
    for section, cold in ((WARM, False), (COLD, True)):
        one = functools.partial(_contestant, section, case, folder / "out", cold)
        yield one(COPY, "bound", case.files, lambda out: bounds.copy_files(case.files, out))
        yield one(COPY_TWICE, "bound", case.files, lambda out: bounds.copy_files(case.files, out, times=2))
        yield one(TO_BF16, "ours", case.files, lambda out: mj.convert(case.path, out), _holds_bf16)
        yield one(TO_FP8, "ours", case.files, lambda out: mj.convert(case.path, out, dtype="fp8"))
        yield one(BACK, "ours", grouped, lambda out: mj.convert(native, out, to="hf-fp8"), _holds_source)


def _contestant(
    section: str,
    case: Case,
    out: Path,
    cold: bool,
    name: str,
    role: Role,
    files: list[Path],
    convert: Callable[[Path], object],
    check: Callable[[Case, Path], object] = lambda case, out: None,
) -> Contestant:
    def before() -> None:
        shutil.rmtree(out, ignore_errors=True)
        bounds.forget(files)
        if not cold:
            bounds.read_files(files)

    return Contestant(
        section=section,
        name=name,
        role=role,
        nbytes=case.nbytes,
        run=lambda: convert(out),
        before=before,
        check=lambda _: check(case, out),
        experts=case.experts,
    )


def _written(out: Path) -> dict[str, object]:
    tensors = {}
    for file in out.glob("model*.safetensors"):
        tensors |= load_file(file)
    return dict(peers.to_numpy(tensors))


def _holds_bf16(case: Case, out: Path) -> None:
    require_same(_written(out), case.native, TO_BF16)


def _holds_source(case: Case, out: Path) -> None:
    """What came back through native FP8 is what went in: it shows that native FP8 was whole, too."""
    require_same(_written(out), case.whole, BACK)
