"""The model card of a converted checkpoint: what is known of it, in words for people and for the hub."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from minimax_jax.errors import JobError, Problem, raise_if
from minimax_jax.io import source as places
from minimax_jax.io.beside import side_files
from minimax_jax.io.cards import CARD_MARK, CARD_NAME, CERTIFICATE_NAME, own_card
from minimax_jax.io.dcp import is_dcp
from minimax_jax.io.files import io_errors
from minimax_jax.io.jsonfile import write_text_atomic
from minimax_jax.io.location import Location
from minimax_jax.io.orbax import is_orbax
from minimax_jax.io.source import copy_file
from minimax_jax.io.upload import is_repository
from minimax_jax.jobs.loading import lines_to_load
from minimax_jax.jobs.source import Source
from minimax_jax.layout.check import Survey
from minimax_jax.paths import is_file

_HUB = "hf://"
_BASE, _FROM = "base_model: ", "- made from: "
_TRANSFORMERS = ("hf", "transformers-v5")


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card says: the same checkpoint, made of the same, gives the same text on any day and machine.

    Attributes:
        form: the target that the checkpoint has the form of, such as `hf` or `orbax`.
        weights: stored dtypes of its block-scaled weights, by format name, sorted: one, but for mixed checkpoints.
        others: those of all other tensors.
        base: the repository of the hub, `org/name`, that it was made from in one or more steps; None if unknown.
        made_from: of what kind its source was; None if unknown.
        sha256: digest of all its tensors, where a certificate lies beside the card.
    """

    form: str
    weights: tuple[str, ...]
    others: tuple[str, ...]
    base: str | None = None
    made_from: str | None = None
    sha256: str | None = None

    def __str__(self) -> str:
        return "\n".join([*_front_matter(self), "", *_body(self), ""])


def add_side_files(source: Source, folder: Path, *, form: str, dtype: str) -> None:
    """Copy what goes along with a source's weights into a folder made from it, and write a card where none does.

    A certificate that a killed process left there is taken away: whoever wants one makes it when the folder is whole.

    Args:
        source: what is converted.
        folder: what it becomes.
        form: the target.
        dtype: stored dtype of its block-scaled weights, by format name.

    Raises:
        FormatError: a side file is lost or cannot be read.
        JobError: something cannot be written, or there is no room for it.
    """
    (folder / CERTIFICATE_NAME).unlink(missing_ok=True)
    found = require_side_files(source, folder)
    for file in found:
        copy_file(file, folder / file.name)
    if all(file.name != CARD_NAME for file in found):
        write_text_atomic(folder / CARD_NAME, str(_converted(source, form, dtype)))


def require_side_files(source: Source, folder: Path) -> tuple[Location, ...]:
    """What goes along with a source's weights, after a look whether it can be copied: before long work.

    Args:
        source: what is converted.
        folder: where to; it exists.

    Raises:
        FormatError: a side file is lost.
        JobError: files of this machine may not be read, or have no room on the disk of `folder`.
    """
    found = side_files(source.path, source.checkpoint.files)
    near = [file for file in found if isinstance(file, Path)]
    raise_if(_uncopied(near, folder), JobError)
    return found


def _uncopied(files: Sequence[Path], folder: Path) -> Iterator[Problem]:
    for file in files:
        if not _may_read(file):
            yield Problem(what="side file may not be read", file=str(file), remedy="make it readable, or move it away")
    with io_errors(JobError, "free disk cannot be told", folder):
        there = [folder / file.name for file in files]  # of an earlier run, to be written anew
        free = shutil.disk_usage(folder).free + sum(file.stat().st_size for file in there if is_file(file))
        needed = sum(file.stat().st_size for file in files)
    if needed > free:
        largest = max(files, key=lambda file: file.stat().st_size)
        expected, got = f"{needed:,} bytes free", f"{free:,} bytes free"
        remedy = "move it away if it does not belong there, or free some space"
        yield Problem(what="no room for the side files", file=str(largest), expected=expected, got=got, remedy=remedy)


def _may_read(file: Path) -> bool:
    return os.access(file, os.R_OK)


def certified_card(source: Source, folder: Path, sha256: str, origin: str | None) -> Card | None:
    """The card of a checkpoint that has a certificate now; None where it has a card that somebody wrote.

    Args:
        source: the checkpoint.
        folder: where it is.
        sha256: digest of all its tensors.
        origin: what it was converted from, where the caller knows: it goes before what an earlier card of ours says.
    """
    file = folder / CARD_NAME
    said = own_card(file)
    if said is None and file in side_files(folder):
        return None
    text, was = said or "", source.survey
    return Card(
        form=_form(was.layout, folder),
        weights=_weights(was),
        others=_others(was),
        base=_repository(origin) or _base(text),
        made_from=_said(text, _FROM),
        sha256=sha256,
    )


def _form(layout: str, folder: Path) -> str:
    """The target that writes such a folder."""
    if layout != "native":
        return layout
    return "orbax" if is_orbax(folder) else "dcp" if is_dcp(folder) else layout


def _converted(source: Source, form: str, dtype: str) -> Card:
    was, path = source.survey, source.path
    said = own_card(path / CARD_NAME) if places.is_folder(path) else None
    return Card(
        form=form,
        weights=(dtype,),
        others=_others(was),
        base=_repository(str(path)) or _base(said or ""),
        made_from=f"a checkpoint in the {was.layout} layout, weights in {', '.join(_weights(was))}",
    )


def _front_matter(card: Card) -> Iterator[str]:
    yield "---"
    yield f"library_name: {'transformers' if card.form in _TRANSFORMERS else 'minimax_jax'}"
    if card.base is not None:
        yield _BASE + json.dumps(card.base)
    yield "tags:"
    yield from (f"- {tag}" for tag in ("minimax_m2", "minimax_jax", card.form))
    yield "---"


def _body(card: Card) -> Iterator[str]:
    yield CARD_MARK
    yield ""
    yield "# MiniMax-M2 checkpoint"
    yield ""
    yield f"Converted {'' if card.base is None else f'from `{card.base}` '}by minimax_jax {version('minimax_jax')}."
    yield ""
    if card.made_from is not None:
        yield _FROM + card.made_from
    yield f"- layout: {card.form}"
    yield f"- dtypes: {', '.join(card.weights)}; norms, embeddings, router and the like in {', '.join(card.others)}"
    if card.sha256 is not None:
        yield f"- sha256 over all tensors in the Hugging Face form: `{card.sha256}`"
    lines = lines_to_load(card.form, card.weights[0], "'FOLDER'")
    if lines:
        yield from ("", "It is loaded by:", "", "```python", *lines, "```")
    if card.sha256 is not None:
        yield ""
        yield f"`{CERTIFICATE_NAME}` holds the digest of every tensor. To hold a copy against it:"
        yield ""
        yield f"    minimax-jax verify FOLDER --certificate FOLDER/{CERTIFICATE_NAME}"


def _weights(was: Survey) -> tuple[str, ...]:
    return tuple(sorted({was.dtypes[entry.native] for entry in was.entries if entry.row.scaled}))


def _others(was: Survey) -> tuple[str, ...]:
    return tuple(sorted({was.dtypes[entry.native] for entry in was.entries if not entry.row.scaled}))


def _repository(origin: str | None) -> str | None:
    """`org/name` of a source such as `hf://org/name@revision?keep=1`."""
    if origin is None or not origin.startswith(_HUB):
        return None
    return "/".join(origin.removeprefix(_HUB).split("?")[0].split("@")[0].split("/")[:2])


def _said(text: str, begin: str) -> str | None:
    return next((line.removeprefix(begin) for line in text.splitlines() if line.startswith(begin)), None)


def _base(text: str) -> str | None:
    """The repository that a card of ours names, if it is the name of one."""
    name = (_said(text, _BASE) or "").strip('"')
    return name if is_repository(name) else None
