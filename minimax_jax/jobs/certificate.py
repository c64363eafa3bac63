"""The certificate of a verification: what was compared, and the digest of every tensor, as one JSON document."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minimax_jax.errors import JobError, Problem
from minimax_jax.io.cards import CERTIFICATE_BEGINNING, CERTIFICATE_BEGINNING_BYTES, begins_as
from minimax_jax.io.files import io_errors
from minimax_jax.io.jsonfile import as_text, write_json_atomic
from minimax_jax.jobs.certified import FORMAT, SEAL, seal
from minimax_jax.jobs.compare import RELATIONS, Comparison
from minimax_jax.jobs.digests import Digest, FileDigest
from minimax_jax.jobs.held import Held
from minimax_jax.jobs.left_out import left_out_json
from minimax_jax.jobs.verification import Digested, LayerSummary, Verification
from minimax_jax.nearby import did_you_mean
from minimax_jax.paths import path_of

_LIBRARIES = ("minimax_jax", "jax", "jaxlib", "numpy", "ml_dtypes")


def certificate(seen: Verification) -> dict[str, Any]:
    """The certificate as plain JSON values; the same checkpoints at the same paths give the same document.

    `differences` lists the weights that do not agree as asked; `max_abs` is null where it is NaN or infinite. The
    digest of a whole checkpoint is over its tensors in the order of their names; of a sample, over those of the sample.
    """
    told = {
        "format": FORMAT,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
        "options": {"by": seen.by, "sample": None if seen.sample is None else seen.sample.asked},
        "good": seen.good,
        "by": seen.by,
        "sample": None if seen.sample is None else {"entries": seen.sample.entries, "of": seen.sample.of},
        "held": None if seen.held is None else _held(seen.held),
        "checkpoints": [_checkpoint(checkpoint) for checkpoint in seen.checkpoints],
        "weights": {name: seen.count(name) for name in RELATIONS} if seen.comparisons else None,
        "differences": [_difference(comparison) for comparison in seen.failures],
        "layers": [_layer(summary) for summary in seen.layers],
        "tensors": dict(_tensors([checkpoint.digests for checkpoint in seen.checkpoints])),
    }
    return {**told, SEAL: seal(told)}


def require_certificate_place(file: str | Path) -> None:
    """Check that a certificate can be written to `file`, which is new, empty, or an earlier certificate.

    Raises:
        JobError: as `require_place`.
    """
    require_place(file, "certificate", CERTIFICATE_BEGINNING)


def require_place(file: str | Path, what: str, beginning: bytes) -> None:
    """Check that `what` can be written to `file`, before the long work of which it is the result.

    Args:
        file: new, empty, or an earlier one of its kind.
        what: the kind, in words.
        beginning: what one begins with, after white space and a brace.

    Raises:
        JobError: it is a folder, there is no folder to hold it that may be written to, or another kind of file stands
            there, which is never overwritten.
    """
    file, begins = path_of(file), b""
    with io_errors(JobError, f"{what} cannot be written", file):
        there = file.exists()
    if not os.access(file.parent, os.W_OK | os.X_OK) or (there and not file.is_file()):
        remedy = did_you_mean(file.parent, "name a file in a folder that exists and may be written to")
        raise JobError(Problem(what=f"{what} cannot be written", file=str(file), remedy=remedy))
    if there:
        with io_errors(JobError, f"{what} cannot be written", file), file.open("rb") as stream:
            begins = stream.read(CERTIFICATE_BEGINNING_BYTES)
    if begins and not begins_as(begins, beginning):
        remedy = "name another file, or delete this one"
        raise JobError(Problem(what=f"a file that is no {what} stands there", file=str(file), remedy=remedy))


def write_certificate(file: str | Path, seen: Verification) -> None:
    """Write the certificate to `file`, whole or not at all."""
    write_json_atomic(path_of(file), certificate(seen))


def _checkpoint(checkpoint: Digested) -> dict[str, Any]:
    return {
        "path": as_text(str(checkpoint.path)),
        "layout": checkpoint.layout,
        "tensors": len(checkpoint.digests),
        "bytes": checkpoint.nbytes,
        "sha256": checkpoint.sha256,
        "config_sha256": checkpoint.config,
        "unread_attributes": list(checkpoint.unread),
        "left_out": left_out_json(checkpoint.left_out),
        "left_out_tensors": {digest.key: _fact(digest) for digest in checkpoint.aside},
        "unusual": [{"key": each.key, "what": each.what, "count": each.count} for each in checkpoint.unusual],
        "files": {file.name: _file(file) for file in checkpoint.files},
    }


def _file(file: FileDigest) -> dict[str, Any]:
    told = {"bytes": file.nbytes, "sha256": file.sha256, "of": "header" if file.of_weights else "file"}
    return told | ({"metadata": dict(file.texts)} if file.of_weights else {})


def _fact(digest: Digest) -> dict[str, Any]:
    return {"dtype": digest.dtype, "shape": list(digest.shape), "sha256": digest.sha256}


def _difference(comparison: Comparison) -> dict[str, Any]:
    return {
        "key": comparison.key,
        "relation": comparison.relation,
        "dtypes": list(comparison.dtypes),
        "differing_elements": comparison.differing,
        "max_abs": _number(comparison.max_abs),
    }


def _layer(summary: LayerSummary) -> dict[str, Any]:
    compared = {
        "weights": dict(summary.counts),
        "differing_elements": summary.differing,
        "max_abs": _number(summary.max_abs),
    }
    told = {"layer": summary.layer, "tensors": list(summary.tensors), "sha256": list(summary.sha256)}
    return told | (compared if summary.counts else {})


def _held(held: Held) -> dict[str, Any]:
    return {
        "certificate": as_text(str(held.file)),
        "checkpoint": held.path,
        "tensors": held.tensors,
        "files": held.files,
        "notes": list(held.notes),
        "mismatches": [
            {"name": each.name, "what": each.what, "expected": each.expected, "got": each.got}
            for each in held.mismatches
        ],
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tensors(digests: Sequence[Sequence[Digest]]) -> Iterator[tuple[str, Any]]:
    """Each tensor of the Hugging Face form with its digests; one where all checkpoints have the same."""
    tables = [{digest.key: digest for digest in each} for each in digests]
    for key in dict.fromkeys(key for table in tables for key in table):
        found = [table.get(key) for table in tables]
        facts = [None if digest is None else _fact(digest) for digest in found]
        yield key, facts[0] if all(fact == facts[0] for fact in facts) else facts
