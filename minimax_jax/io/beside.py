"""What lies beside the weights of a checkpoint: what goes along with them, and what stays behind, by name."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minimax_jax.io import orbax, source
from minimax_jax.io.cards import CARD_NAME, CERTIFICATE_NAME, own_card, own_certificate
from minimax_jax.io.checkpoint import DCP_SUFFIX, INDEX_SUFFIX, PICKLES, SUFFIX, for_each
from minimax_jax.io.jsonfile import as_text
from minimax_jax.io.location import Location

_WEIGHTS = PICKLES | {SUFFIX, DCP_SUFFIX, ".gguf", ".h5", ".msgpack", ".onnx"}
_SIDE_FILES = (
    "LICENSE",
    CARD_NAME,
    "added_tokens.json",
    "chat_template.jinja",
    "configuration_minimax_m2.py",
    "generation_config.json",
    "merges.txt",
    "modeling_minimax_m2.py",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
"""What may lie beside published checkpoints, sorted."""

_CONFIG_NAME, _FOLDER = "config.json", "a folder"
_KINDS = {
    stat.S_IFDIR: _FOLDER,
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftBehind:
    """Something in the folder of a checkpoint that a conversion does not take along.

    Attributes:
        name: in the folder; bytes that are no UTF-8 are escapes with a backslash.
        what: what it is, in words.
    """

    name: str
    what: str


def side_files(path: Location, used: Iterable[Location] = ()) -> tuple[Location, ...]:
    """The files of a checkpoint folder that go along with the weights, such as those of the tokenizer; sorted.

    Left out are config.json, what `left_behind` tells, and hidden files; and what this package wrote about that folder
    alone: its certificate, and a model card with its mark. One safetensors file has no side files. A web server does
    not list its files: there, those of the usual names are looked for.

    Args:
        path: the checkpoint: its folder, its index, or one file.
        used: its files of weights, which may have any name.

    Raises:
        FormatError: the folder cannot be listed, or files in it are links that are broken or lead out of it.
    """
    folder = _folder_of(path)
    if folder is None:
        return ()
    listed, mine = source.listed(folder), frozenset(used)
    if listed is None:
        usual = [folder / name for name in _SIDE_FILES]
        there = for_each(usual, source.exists)
        return _traveling(file for file, found in zip(usual, there, strict=True) if found)
    beside = tuple(file for file in listed if file not in mine and _is_side_file(file))
    for_each(beside, lambda file: source.require_within(file, folder))
    return _traveling(beside)


def left_behind(path: Location, used: Iterable[Location]) -> tuple[LeftBehind, ...]:
    """What else lies in a checkpoint folder, hidden things apart, and does not go along: sorted.

    That are sub-folders, FIFOs, sockets and devices, weights that are not the checkpoint's, and files that have the
    name of a certificate, or of what Orbax writes, and are none. A web server does not tell.

    Args:
        path: the checkpoint, as `side_files` takes it.
        used: the files that it was opened from, its index and its sidecar, or the folders that hold it.

    Raises:
        FormatError: the folder cannot be listed.
    """
    folder = _folder_of(path)
    if folder is None:
        return ()
    mine = {str(file) for file in used}
    return tuple(
        LeftBehind(name=as_text(file.name), what=what)
        for file, what in _others(folder)
        if not any(name == str(file) or name.startswith(f"{file}/") for name in mine)
    )


def _folder_of(path: Location) -> Location | None:
    if path.name.endswith(INDEX_SUFFIX):
        return path.parent
    return path if source.is_folder(path) else None


def _others(folder: Location) -> Iterator[tuple[Location, str]]:
    for file in source.listed(folder) or ():
        what = _why_not(file)
        if what is None and file.name == CERTIFICATE_NAME and not own_certificate(file):
            what = "no certificate, but of the name of one"
        if what is None and file.name in orbax.OWN_FILES and not _is_of_orbax(file):
            what = "no file of Orbax's, but of the name of one"
        if what is not None:
            yield file, what
    yield from ((below, _FOLDER) for below in source.folders(folder))


def _why_not(file: Location) -> str | None:
    """What something is that is not one of the further files of a checkpoint."""
    kind = _kind(file) if isinstance(file, Path) else None
    if kind is None and file.name.endswith(".index.json"):
        return "an index of other weights"
    return "other weights" if kind is None and file.suffix.lower() in _WEIGHTS else kind


def _kind(file: Path) -> str | None:
    """What something is that is no regular file. A broken link stands for a file that was lost, which is an error."""
    try:
        mode = file.stat().st_mode
    except OSError:
        return None
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no regular file")


def _is_side_file(file: Location) -> bool:
    taken = (_CONFIG_NAME, CERTIFICATE_NAME, *orbax.OWN_FILES)  # by what stands in the folders that conversions write
    return file.name not in taken and _why_not(file) is None


def _is_of_orbax(file: Location) -> bool:
    return isinstance(file, Path) and orbax.is_orbax(file.parent)


def _traveling(beside: Iterable[Location]) -> tuple[Location, ...]:
    return tuple(file for file in beside if file.name != CARD_NAME or own_card(file) is None)
