"""The demonstration: a tiny FP8 checkpoint to native and back, and the proof that nothing was lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from minimax_jax.display import counted, size
from minimax_jax.errors import JobError, Problem
from minimax_jax.io.files import io_errors
from minimax_jax.jobs import after, front
from minimax_jax.jobs.verification import Verification
from minimax_jax.paths import path_of
from minimax_jax.synthetic import synthesize

CERTIFICATE = "certificate.json"


def run(folder: str | Path, *, say: Callable[[str], None]) -> Verification:
    """Run the demonstration in `folder`, which must be new or empty, and write the certificate there.

    Returns:
        The comparison, by bytes, of the checkpoint with what came back by way of bf16.

    Raises:
        JobError: `folder` is taken, or cannot be written.
    """
    folder = path_of(folder)
    with io_errors(JobError, "folder cannot be used", folder):
        if folder.exists() and any(folder.iterdir()):
            remedy = "choose another, or delete it"
            raise JobError(Problem(what="the demonstration wants a folder of its own", file=str(folder), remedy=remedy))
    source = folder / "hf-fp8"
    synthesize(source)
    say(f"made   {source}: {_what(source)}")
    for name, dtype in (("native-bf16", "bf16"), ("native-fp8", "fp8")):
        front.convert(source, folder / name, to="native", dtype=dtype)
        say(f"wrote  {folder / name}: {_what(folder / name)}")
    back_from_fp8 = _back(folder, "native-fp8", say)
    back_from_bf16 = _back(folder, "native-bf16", say)
    checks = [
        after.verify(source, folder / "native-bf16", by="value"),
        after.verify(source, back_from_fp8, by="bytes"),
        after.verify(source, back_from_bf16, by="bytes", output=folder / CERTIFICATE),
    ]
    for seen in checks:
        first, second = (checkpoint.path.name for checkpoint in seen.checkpoints)
        say(f"check  {first} and {second}: {'the same' if seen.good else 'NOT the same'} by {seen.by}")
    say(f"wrote  {folder / CERTIFICATE}")
    return next((seen for seen in checks if not seen.good), checks[-1])


def _back(folder: Path, name: str, say: Callable[[str], None]) -> Path:
    destination = folder / f"hf-fp8-from-{name}"
    report = front.convert(folder / name, destination, to="hf-fp8")
    kept = f", {counted(report.kept_scales, 'weight')} with their source scales" if report.kept_scales else ""
    say(f"wrote  {destination}: {_what(destination)}{kept}")
    return destination


def _what(path: Path) -> str:
    seen = front.inspect(path)
    dtypes = ", ".join(seen.by_dtype)
    return f"{seen.layout} layout, {counted(seen.total.tensors, 'tensor')}, {size(seen.total.nbytes)} ({dtypes})"
