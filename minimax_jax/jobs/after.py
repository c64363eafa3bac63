"""The jobs by path that come after a conversion: what the package exports as `verify`, `diff`, `certify` and `push`.

What needs jax is imported where it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from minimax_jax.jobs.budget import DEFAULT_WORKERS
from minimax_jax.jobs.sample import require_sample
from minimax_jax.jobs.source import open_source, open_sources
from minimax_jax.progress import Progress

if TYPE_CHECKING:
    from minimax_jax.jobs.diff import Diff, Rank
    from minimax_jax.jobs.push import Pushed
    from minimax_jax.jobs.run import Report
    from minimax_jax.jobs.verification import Verification


def verify(
    first: str | Path,
    second: str | Path | None = None,
    *,
    by: Literal["bytes", "value"] = "value",
    sample: str | int | None = None,
    certificate: str | Path | None = None,
    output: str | Path | None = None,
    workers: int = DEFAULT_WORKERS,
    ignore: Collection[str] = (),
    leave_out: Collection[str] = (),
    progress: Callable[[Progress], None] | None = None,
) -> Verification:
    """Compare two checkpoints in any two layouts, or digest one; see `jobs.verify.verify`.

    Args:
        first: a checkpoint.
        second: what to hold against it.
        by: `bytes` or `value`.
        sample: look at a part only, always the same: a share such as `5%`, or a number of native tensors.
        certificate: an earlier certificate to hold `first` against, byte for byte; without `second`.
        output: a file to write the certificate to: a new one, or an earlier certificate.
        workers: threads.
        ignore: attributes of config.json to leave unread.
        leave_out: as in `plan`; of each of the two, or of one of them.
        progress: called as the work goes on.

    Raises:
        CheckpointError: as `open_source`; as `jobs.verify.verify`; FormatError where the earlier certificate is damaged
            or of an unknown form; JobError where the new one cannot be written.

    Examples:
        >>> mj.synthesize("MiniMax-M2")
        >>> report = mj.convert("MiniMax-M2", "m2-native", dtype="fp8")
        >>> mj.verify("MiniMax-M2", "m2-native", output="certificate.json").good
        True
        >>> mj.verify("m2-native", certificate="certificate.json").good
        True
    """
    from minimax_jax.jobs import verify as verifying
    from minimax_jax.jobs.certificate import require_certificate_place, write_certificate
    from minimax_jax.jobs.certified import read_certificate

    if output is not None:
        require_certificate_place(output)
    asked = None if sample is None else str(sample)
    if asked is not None:
        require_sample(asked)
    known = None if certificate is None else read_certificate(certificate)
    sources = open_sources([first] if second is None else [first, second], ignore=ignore, leave_out=leave_out)
    seen = verifying.verify(*sources, by=by, sample=asked, certificate=known, workers=workers, progress=progress)
    if output is not None:
        write_certificate(output, seen)
    return seen


def diff(
    first: str | Path,
    second: str | Path,
    *,
    rank: Rank = "relative",
    sample: str | int | None = None,
    workers: int = DEFAULT_WORKERS,
    ignore: Collection[str] = (),
    leave_out: Collection[str] = (),
    progress: Callable[[Progress], None] | None = None,
) -> Diff:
    """What differs between two checkpoints in any two layouts, ranked by difference; see `jobs.diff.diff`.

    Args:
        first: a checkpoint.
        second: another.
        rank: by `relative` difference, `ulp`, `cosine` or `abs`.
        sample: as in `verify`.
        workers: threads.
        ignore: attributes of config.json to leave unread.
        leave_out: as in `verify`.
        progress: called as the work goes on.

    Raises:
        CheckpointError: as `open_source`; as `jobs.diff.diff`.
    """
    from minimax_jax.jobs import diff as differing

    asked = None if sample is None else str(sample)
    if asked is not None:
        require_sample(asked)
    a, b = open_sources([first, second], ignore=ignore, leave_out=leave_out)
    return differing.diff(a, b, rank=rank, sample=asked, workers=workers, progress=progress)


def require_pushable(url: str) -> None:
    """Check that something can be uploaded to `url` at all; see `jobs.push.require_pushable`."""
    from minimax_jax.jobs import push as pushing

    pushing.require_pushable(url)


def push(
    path: str | Path,
    url: str,
    *,
    private: bool = False,
    origin: str | None = None,
    workers: int = DEFAULT_WORKERS,
    ignore: Collection[str] = (),
    leave_out: Collection[str] = (),
    progress: Callable[[Progress], None] | None = None,
) -> Pushed:
    """Upload a finished checkpoint to the hub, with its certificate and a model card; see `jobs.push.push`.

    Args:
        path: a checkpoint's folder.
        url: `hf://org/name`; made where it does not exist yet.
        private: make a new repository private.
        origin: what the checkpoint was converted from, for its model card.
        workers: threads.
        ignore: attributes of config.json to leave unread.
        leave_out: as in `plan`; what is left out goes up with the files that it lies in.
        progress: called as the tensors are read.

    Raises:
        CheckpointError: as `open_source`; JobError where it is not a folder, the checkpoint is not what its certificate
            says, or the upload fails.
    """
    from minimax_jax.jobs import push as pushing

    return pushing.push(
        path,
        url,
        private=private,
        origin=origin,
        workers=workers,
        ignore=ignore,
        leave_out=leave_out,
        progress=progress,
    )


def push_converted(
    report: Report, url: str, *, private: bool = False, origin: str | None = None, ignore: Collection[str] = ()
) -> Pushed:
    """Upload what a conversion has just certified; see `jobs.push.push_converted`."""
    from minimax_jax.jobs import push as pushing

    return pushing.push_converted(report, url, private=private, origin=origin, ignore=ignore)


def certify(
    path: str | Path,
    *,
    workers: int = DEFAULT_WORKERS,
    ignore: Collection[str] = (),
    leave_out: Collection[str] = (),
    progress: Callable[[Progress], None] | None = None,
) -> str:
    """Read a checkpoint's folder, and leave `certificate.json` and a card that names it there.

    A certificate that is there is held against what was read, and stays; so does a card that somebody wrote. `convert`
    does this itself where it is asked to.

    Args:
        path: a checkpoint's folder.
        workers: threads.
        ignore: attributes of config.json to leave unread.
        leave_out: as in `plan`.
        progress: called as the tensors are read.

    Returns:
        One digest of all tensors.

    Raises:
        CheckpointError: as `open_source`; JobError where the checkpoint is not what its certificate says, or the folder
            cannot be written to.

    Examples:
        >>> mj.synthesize("MiniMax-M2")
        >>> digest = mj.certify("MiniMax-M2")
        >>> mj.verify("MiniMax-M2", certificate="MiniMax-M2/certificate.json").good
        True
    """
    from minimax_jax.jobs import certifying

    source = open_source(path, ignore=ignore, leave_out=leave_out)
    return certifying.certify(source, Path(path), workers=workers, progress=progress)
