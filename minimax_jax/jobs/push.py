"""A checkpoint to the Hugging Face hub: certified, with a model card, by the hub's own client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from minimax_jax.errors import JobError, Problem
from minimax_jax.io.checkpoint import CARD_NAME
from minimax_jax.io.jsonfile import write_text_atomic
from minimax_jax.io.upload import repository_of, require_client, upload
from minimax_jax.jobs.certificate import write_certificate
from minimax_jax.jobs.certified import read_certificate
from minimax_jax.jobs.source import Source, open_source
from minimax_jax.jobs.verification import Digested
from minimax_jax.jobs.verify import verify
from minimax_jax.progress import Progress

CERTIFICATE_NAME = "certificate.json"
_HUB = "hf://"


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What was uploaded.

    Attributes:
        folder: the checkpoint.
        commit: URL of the commit.
        sha256: digest of all its tensors, as in its certificate.
        card: whether a model card was written, for want of one.
    """

    folder: Path
    commit: str
    sha256: str
    card: bool


def require_pushable(url: str) -> None:
    """Check that something can be uploaded to `url` at all, before the long work of which it is the end.

    Raises:
        JobError: not `hf://org/name`, or the hub's client is not installed.
    """
    repository_of(url)
    require_client()


def push(
    path: str | Path,
    url: str,
    *,
    private: bool = False,
    origin: str | None = None,
    workers: int = 2,
    progress: Callable[[Progress], None] | None = None,
) -> Pushed:
    """Upload a finished checkpoint with its certificate and a model card, as one commit.

    All of its tensors are read first. Where `certificate.json` lies beside them they are held against it, byte for
    byte; else it is written. Where there is no README.md a short one is written; one that is there stays as it is.

    Args:
        path: a checkpoint's folder.
        url: `hf://org/name`; made where it does not exist yet.
        private: make a new repository private.
        origin: what the checkpoint was converted from; the card names it where it is a repository of the hub.
        workers: threads that read.
        progress: called as the reading goes on.

    Raises:
        CheckpointError: as `open_source`; JobError where the checkpoint is not what its certificate says, or the upload
            fails: the folder is whole then, and the same call again goes on.
    """
    require_pushable(url)
    source, folder = open_source(path), Path(path)
    seen = _certified(source, folder / CERTIFICATE_NAME, workers, progress)
    made = not (folder / CARD_NAME).exists()
    if made:
        write_text_atomic(folder / CARD_NAME, card(source, seen, origin))
    again = f"run `minimax-jax push {folder} {url}` again"
    message = f"{source.survey.layout} layout, by minimax_jax {version('minimax_jax')}"
    commit = upload(folder, repository_of(url), private=private, message=message, remedy=again)
    return Pushed(folder=folder, commit=commit, sha256=seen.sha256, card=made)


def card(source: Source, seen: Digested, origin: str | None) -> str:
    """A model card that says what is known: the same checkpoint gives the same text."""
    return "\n".join([*_front_matter(source, origin), "", *_body(source, seen, origin), ""])


def _front_matter(source: Source, origin: str | None) -> Iterator[str]:
    layout = source.survey.layout
    yield "---"
    yield f"library_name: {'transformers' if layout in ('hf', 'transformers-v5') else 'minimax_jax'}"
    if origin is not None and origin.startswith(_HUB):
        yield f"base_model: {json.dumps(_base_model(origin))}"
    yield "tags:"
    yield from (f"- {tag}" for tag in ("minimax_m2", "minimax_jax", layout))
    yield "---"


def _base_model(origin: str) -> str:
    """`org/name` of a source such as `hf://org/name@revision?keep=1`."""
    return "/".join(origin.removeprefix(_HUB).split("?")[0].split("@")[0].split("/")[:2])


def _body(source: Source, seen: Digested, origin: str | None) -> Iterator[str]:
    dtypes = sorted(set(source.survey.dtypes.values()))
    yield "# MiniMax-M2 checkpoint"
    yield ""
    if origin is not None and origin.startswith(_HUB):
        yield f"Converted from `{_base_model(origin)}` by minimax_jax {version('minimax_jax')}."
    else:
        yield f"Converted by minimax_jax {version('minimax_jax')}."
    yield ""
    yield f"- layout: {source.survey.layout}"
    yield f"- dtypes of weights: {', '.join(dtypes)}"
    yield f"- tensors: {len(source.checkpoint.tensors):,}, {source.checkpoint.nbytes:,} bytes"
    yield f"- sha256 over all tensors in the Hugging Face form: `{seen.sha256}`"
    yield ""
    yield f"`{CERTIFICATE_NAME}` holds the digest of every tensor. To hold a copy against it:"
    yield ""
    yield f"    minimax-jax verify FOLDER --certificate FOLDER/{CERTIFICATE_NAME}"


def _certified(source: Source, file: Path, workers: int, progress: Callable[[Progress], None] | None) -> Digested:
    """The digests of a checkpoint: those of its certificate, or of the one that is written here."""
    known = read_certificate(file) if file.exists() else None
    if known is not None and known.sampled:
        what, remedy = "the certificate speaks of a sample of the tensors alone", f"delete {file.name}"
        raise JobError(Problem(what=what, file=str(file), remedy=remedy))
    seen = verify(source, certificate=known, workers=workers, progress=progress)
    if not seen.good:
        what, remedy = "the checkpoint is not what its certificate says", f"convert again, or delete {file.name}"
        raise JobError(Problem(what=what, file=str(file), remedy=remedy))
    if known is None:
        write_certificate(file, seen)
    return seen.checkpoints[0]
