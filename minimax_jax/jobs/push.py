"""A checkpoint to the Hugging Face hub: certified, with a model card, by the hub's own client."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from minimax_jax.errors import JobError, Problem, RequestError, argument
from minimax_jax.io import source as places
from minimax_jax.io.cards import CERTIFICATE_NAME
from minimax_jax.io.checkpoint import for_each
from minimax_jax.io.upload import repository_of, require_repository, upload
from minimax_jax.jobs.budget import DEFAULT_WORKERS
from minimax_jax.jobs.certifying import held, write_card
from minimax_jax.jobs.left_out import LeftOut
from minimax_jax.jobs.run import Report
from minimax_jax.jobs.source import Source, open_source
from minimax_jax.nearby import did_you_mean
from minimax_jax.paths import is_file, is_folder, path_of
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
    workers: int = DEFAULT_WORKERS,
    ignore: Collection[str] = (),
    leave_out: Collection[str] = (),
    progress: Callable[[Progress], None] | None = None,
) -> Pushed:
    """Upload a finished checkpoint with its certificate and a model card, as one commit.

    All of its tensors are read first. Where `certificate.json` lies beside them, they and their files are held against
    it, byte for byte; else it is written. A model card is written where there is none, and where there is one that
    minimax_jax wrote; what somebody else wrote stays as it is. All files of the folder go up, whole, and those of
    sub-folders: tensors that were left out are in them.

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
        CheckpointError: as `open_source`; FormatError where a link in it leads out of it; JobError where it is not a
            folder, where the checkpoint is not what its certificate says, or where the upload fails: the folder is
            whole then, and the same call again goes on.
    """
    require_pushable(url)
    folder = _folder(path)
    source = open_source(folder, ignore=ignore, leave_out=leave_out)
    for_each(_links(folder), lambda file: places.require_within(file, folder))
    seen = held(source, folder / CERTIFICATE_NAME, workers, progress)
    return _send(source, folder, url, sha256=seen.sha256, private=private, origin=origin)


def push_converted(
    report: Report, url: str, *, private: bool = False, origin: str | None = None, ignore: Collection[str] = ()
) -> Pushed:
    """As `push`, of what a conversion of this process has just certified: no tensor is read again.

    Args:
        report: of the conversion, which left a certificate.
        url: as in `push`.
        private: as in `push`.
        origin: as in `push`.
        ignore: as in `push`.

    Raises:
        CheckpointError: as `push`.
    """
    require_pushable(url)
    if report.certified is None:
        what, remedy = "a conversion that left no certificate", argument("certify")
        raise RequestError(Problem(what=what, file=str(report.destination), remedy=remedy))
    source = open_source(report.destination, ignore=ignore)
    return _send(source, report.destination, url, sha256=report.certified, private=private, origin=origin)


def _send(source: Source, folder: Path, url: str, *, sha256: str, private: bool, origin: str | None) -> Pushed:
    made = write_card(source, folder, sha256, origin)
    again = f"run `minimax-jax push {folder} {url}` again"
    message = f"{source.survey.layout} layout, by minimax_jax {version('minimax_jax')}"
    commit = upload(folder, repository_of(url), private=private, message=message, remedy=again)
    return Pushed(folder=folder, commit=commit, sha256=sha256, card=made, left_out=source.left_out)


def _links(folder: Path) -> list[Path]:
    """The links to files in a folder and in those below it: what they lead to is what goes up."""
    return sorted(file for file in folder.rglob("*") if file.is_symlink() and is_file(file))


def _folder(path: str | Path) -> Path:
    """A folder of this machine: all of it goes up, and the certificate and the card go into it."""
    folder = path_of(path)
    if is_folder(folder):
        return folder
    what = "not a folder of this machine, and nothing else is pushed"
    remedy = did_you_mean(folder, "give the folder that holds the checkpoint, converted if need be")
    raise JobError(Problem(what=what, got=str(path), remedy=remedy))
