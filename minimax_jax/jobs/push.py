"""A checkpoint to the Hugging Face hub: certified, with a model card, by the hub's own client."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from minimax_jax.errors import JobError, Problem
from minimax_jax.io.cards import CARD_NAME, CERTIFICATE_NAME
from minimax_jax.io.jsonfile import write_text_atomic
from minimax_jax.io.upload import repository_of, require_repository, upload
from minimax_jax.jobs.card import certified_card
from minimax_jax.jobs.certificate import write_certificate
from minimax_jax.jobs.certified import read_certificate
from minimax_jax.jobs.left_out import LeftOut
from minimax_jax.jobs.source import Source, open_source
from minimax_jax.jobs.verification import By, Digested
from minimax_jax.jobs.verify import verify
from minimax_jax.nearby import did_you_mean
from minimax_jax.paths import is_folder, path_of
from minimax_jax.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What was uploaded.

    Attributes:
        folder: the checkpoint.
        commit: URL of the commit.
        sha256: digest of all its tensors, as in its certificate.
        card: whether the model card is of our making, and was written.
        left_out: tensors in its files that are not the model's: they went up with the files that they lie in.
    """

    folder: Path
    commit: str
    sha256: str
    card: bool
    left_out: tuple[LeftOut, ...] = ()


def require_pushable(url: str) -> None:
    """Check that something can be uploaded to `url` at all, before the long work of which it is the end.

    Raises:
        JobError: not `hf://org/name`, a name that the hub does not take, or its client is not installed.
    """
    require_repository(repository_of(url))


def push(
    path: str | Path,
    url: str,
    *,
    private: bool = False,
    origin: str | None = None,
    workers: int = 2,
    ignore: Collection[str] = (),
    leave_out: Collection[str] = (),
    progress: Callable[[Progress], None] | None = None,
) -> Pushed:
    """Upload a finished checkpoint with its certificate and a model card, as one commit.

    All of its tensors are read first. Where `certificate.json` lies beside them, they and their files are held against
    it, byte for byte; else it is written. A model card is written where there is none, and where there is one that
    minimax_jax wrote; what somebody else wrote stays as it is. All files of the folder go up, whole: tensors that were
    left out are in them.

    Args:
        path: a checkpoint's folder.
        url: `hf://org/name`; made where it does not exist yet.
        private: make a new repository private.
        origin: what the checkpoint was converted from; the card names it where it is a repository of the hub.
        workers: threads that read.
        ignore: as in `open_source`.
        leave_out: as in `open_source`: tensors that are not the model's.
        progress: called as the reading goes on.

    Raises:
        CheckpointError: as `open_source`; JobError where it is not a folder, where the checkpoint is not what its
            certificate says, or where the upload fails: the folder is whole then, and the same call again goes on.
    """
    require_pushable(url)
    folder = _folder(path)
    source = open_source(folder, ignore=ignore, leave_out=leave_out)
    seen = _certified(source, folder / CERTIFICATE_NAME, workers, progress)
    made = _write_card(source, folder, seen.sha256, origin)
    again = f"run `minimax-jax push {folder} {url}` again"
    message = f"{source.survey.layout} layout, by minimax_jax {version('minimax_jax')}"
    commit = upload(folder, repository_of(url), private=private, message=message, remedy=again)
    return Pushed(folder=folder, commit=commit, sha256=seen.sha256, card=made, left_out=source.left_out)


def certify(
    source: Source, folder: Path, *, workers: int = 2, progress: Callable[[Progress], None] | None = None
) -> str:
    """Leave a certificate in a checkpoint's folder, and a card that names it where nobody wrote another.

    All tensors are read. Where `certificate.json` is there they are held against it instead.

    Returns:
        The digest of all tensors.

    Raises:
        FormatError: a file changed or ends too early while it is read.
        JobError: the checkpoint is not what its certificate says, or the folder cannot be written to.
    """
    seen = _certified(source, folder / CERTIFICATE_NAME, workers, progress)
    _write_card(source, folder, seen.sha256, None)
    return seen.sha256


def _write_card(source: Source, folder: Path, sha256: str, origin: str | None) -> bool:
    card = certified_card(source, folder, sha256, origin)
    if card is not None:
        write_text_atomic(folder / CARD_NAME, str(card))
    return card is not None


def _folder(path: str | Path) -> Path:
    """A folder of this machine: all of it goes up, and the certificate and the card go into it."""
    folder = path_of(path)
    if is_folder(folder):
        return folder
    what = "not a folder of this machine, and nothing else is pushed"
    remedy = did_you_mean(folder, "give the folder that holds the checkpoint, converted if need be")
    raise JobError(Problem(what=what, got=str(path), remedy=remedy))


def _certified(source: Source, file: Path, workers: int, progress: Callable[[Progress], None] | None) -> Digested:
    """The digests of a checkpoint: those of its certificate, or of the one that is written here."""
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
