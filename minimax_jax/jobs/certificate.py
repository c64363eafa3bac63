"""The certificate of a verification: what was compared, and the digest of every tensor, as one JSON document."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minimax_jax.errors import JobError, Problem
from minimax_jax.io.jsonfile import write_json_atomic
from minimax_jax.jobs.compare import RELATIONS
from minimax_jax.jobs.verify import Digest, Verification


def certificate(seen: Verification) -> dict[str, Any]:
    """The certificate as plain JSON values; the same checkpoints at the same paths give the same document.

    `differences` lists the weights that do not agree as asked; `max_abs` is null where it is NaN or infinite.
    """
    return {
        "minimax_jax": version("minimax_jax"),
        "good": seen.good,
        "by": seen.by,
        "checkpoints": [
            {
                "path": str(checkpoint.path),
                "layout": checkpoint.layout,
                "tensors": len(checkpoint.digests),
                "bytes": checkpoint.nbytes,
                "sha256": checkpoint.sha256,
            }
            for checkpoint in seen.checkpoints
        ],
        "weights": {name: seen.count(name) for name in RELATIONS} if seen.comparisons else None,
        "differences": [
            {
                "key": comparison.key,
                "relation": comparison.relation,
                "dtypes": list(comparison.dtypes),
                "differing_elements": comparison.differing,
                "max_abs": comparison.max_abs if math.isfinite(comparison.max_abs) else None,
            }
            for comparison in seen.failures
        ],
        "tensors": dict(_tensors([checkpoint.digests for checkpoint in seen.checkpoints])),
    }


def require_place(file: str | Path) -> None:
    """Check that a certificate can be written to `file`, before the long work of which it is the result.

    Raises:
        JobError: it is a folder, or there is no folder to hold it that may be written to.
    """
    file = Path(file)
    if file.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK):
        remedy = "name a file in a folder that exists and may be written to"
        raise JobError(Problem(what="certificate cannot be written", file=str(file), remedy=remedy))


def write_certificate(file: str | Path, seen: Verification) -> None:
    """Write the certificate to `file`, whole or not at all."""
    write_json_atomic(Path(file), certificate(seen))


def _tensors(digests: Sequence[Sequence[Digest]]) -> Iterator[tuple[str, Any]]:
    """Each tensor of the Hugging Face form with its digests; one where all checkpoints have the same."""
    tables = [{digest.key: digest for digest in each} for each in digests]
    for key in dict.fromkeys(key for table in tables for key in table):
        found = [table.get(key) for table in tables]
        facts = [None if d is None else {"dtype": d.dtype, "shape": list(d.shape), "sha256": d.sha256} for d in found]
        yield key, facts[0] if all(fact == facts[0] for fact in facts) else facts
