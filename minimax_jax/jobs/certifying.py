"""A certificate left in a checkpoint's folder, with a card that names it where nobody wrote another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path

from minimax_jax.errors import JobError, Problem
from minimax_jax.io import points
from minimax_jax.io.cards import CARD_NAME, CERTIFICATE_NAME
from minimax_jax.io.jsonfile import write_text_atomic
from minimax_jax.jobs.budget import DEFAULT_WORKERS
from minimax_jax.jobs.card import certified_card
from minimax_jax.jobs.certificate import write_certificate
from minimax_jax.jobs.certified import read_certificate
from minimax_jax.jobs.source import Source, open_source
from minimax_jax.jobs.team import SOLO, Team
from minimax_jax.jobs.verification import By, Digested
from minimax_jax.jobs.verify import verify
from minimax_jax.progress import Progress


def certify(
    source: Source, folder: Path, *, workers: int = DEFAULT_WORKERS, progress: Callable[[Progress], None] | None = None
) -> str:
    """Leave a certificate in a checkpoint's folder, and a card that names it where nobody wrote another.

    All tensors are read. Where `certificate.json` is there they are held against it instead.

    Returns:
        The digest of all tensors.

    Raises:
        FormatError: a file changed or ends too early while it is read.
        JobError: the checkpoint is not what its certificate says, or the folder cannot be written to.
    """
    seen = held(source, folder / CERTIFICATE_NAME, workers, progress)
    write_card(source, folder, seen.sha256, None)
    return seen.sha256


def certify_unnamed(
    folder: Path,
    destination: Path,
    *,
    ignore: Collection[str],
    workers: int,
    team: Team = SOLO,
    progress: Callable[[Progress], None] | None,
) -> str:
    """As `certify`, of a folder that is whole and about to take its name; the certificate has it under that name.

    The bytes are those of the disk, as any later reader finds them. A certificate that is there is written anew.

    Args:
        folder: where it stands until then.
        destination: its name, as the user gave it.
        ignore: attributes of config.json to leave unread: those that were left unread of the source.
        workers: threads.
        team: the processes that share the reading, and all get the same; one of them writes.
        progress: called as the tensors are read: those that fall to this process.
    """

    def listen(moment: Progress) -> None:
        points.reach("in the certification")
        team.require_all_well(folder.parent)
        if progress is not None:
            progress(dataclasses.replace(moment, step="certify"))

    source = open_source(folder, ignore=ignore)
    seen = verify(source, workers=workers, team=team, progress=listen)
    team.wait()  # nobody is to read any longer where one of them writes, and what takes another name then
    (found,) = seen.checkpoints
    if team.leads:
        write_card(source, folder, found.sha256, None)
        named = dataclasses.replace(seen, checkpoints=(dataclasses.replace(found, path=destination),))
        write_certificate(folder / CERTIFICATE_NAME, named)
    return found.sha256


def write_card(source: Source, folder: Path, sha256: str, origin: str | None) -> bool:
    """Write the card of a checkpoint that has a certificate, where nobody wrote another; whether it was written."""
    card = certified_card(source, folder, sha256, origin)
    if card is not None:
        write_text_atomic(folder / CARD_NAME, str(card))
    return card is not None


def held(source: Source, file: Path, workers: int, progress: Callable[[Progress], None] | None) -> Digested:
    """The digests of a checkpoint: those of its certificate, or of the one that is written here.

    Raises:
        JobError: it is not what its certificate says.
    """
    known = read_certificate(file) if file.exists() else None
    if known is not None and known.sampled:
        what, remedy = "the certificate speaks of a sample of the tensors alone", f"delete {file.name}"
        raise JobError(Problem(what=what, file=str(file), remedy=remedy))
    by: By = "value" if known is None else "bytes"  # what goes up with these files speaks of these files
    seen = verify(source, by=by, certificate=known, workers=workers, progress=progress)
    if not seen.good:
        what, remedy = "the checkpoint is not what its certificate says", f"convert again, or delete {file.name}"
        raise JobError(Problem(what=what, file=str(file), remedy=remedy))
    if known is None:
        write_certificate(file, seen)
    return seen.checkpoints[0]
