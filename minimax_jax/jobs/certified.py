"""A certificate that was written earlier, read back; and a checkpoint held against it."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from minimax_jax.errors import FormatError, Problem
from minimax_jax.io import source as places
from minimax_jax.io.checkpoint import INDEX_SUFFIX
from minimax_jax.io.header import is_shape
from minimax_jax.io.jsonfile import is_text, parse_object, shown
from minimax_jax.jobs.digests import Digest, FileDigest, overall
from minimax_jax.jobs.source import SIDECAR
from minimax_jax.layout.config import CONFIG_NAME

FORMAT = "minimax_jax certificate 2"
SEAL = "seal"

What: TypeAlias = Literal["sha256", "dtype", "shape", "missing", "extra", "file", "config"]

_NOT_ALIKE = (
    "another layout, or weights in files of other names: tensors, what config.json says and the files beside the "
    "weights were held against it, but not the files of the weights themselves, nor tensors in them that were left out"
)

_MOST_BYTES = 2**28
"""A certificate of two checkpoints that differ in each of 96,103 tensors takes 45 MB."""


@dataclass(frozen=True, kw_only=True)
class Certified:
    """One checkpoint as a certificate describes it.

    Attributes:
        path: where it was.
        layout: which layout it had.
        config: digest of what its config.json said.
        tensors: digests by Hugging Face name.
        files: digests of its files by name.
    """

    path: str
    layout: str
    config: str
    tensors: Mapping[str, Digest]
    files: Mapping[str, FileDigest]


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A certificate that was read back.

    Attributes:
        file: where it stands.
        sampled: whether it speaks of a part of the tensors only.
        checkpoints: the one or two that it speaks of.
    """

    file: Path
    sampled: bool
    checkpoints: tuple[Certified, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """Something that is not as the certificate says: a tensor, or a file.

    Attributes:
        name: of the tensor in the Hugging Face form, or of the file.
        what: what differs; `missing` and `extra` are seen from the certificate.
    """

    name: str
    what: What
    expected: str | None = None
    got: str | None = None


@dataclass(frozen=True, kw_only=True)
class Held:
    """A checkpoint held against a certificate.

    Attributes:
        file: the certificate.
        path: which of the checkpoints that it speaks of: the one that fits best.
        tensors: how many tensors were held against it.
        files: how many files were held against it byte for byte.
        mismatches: all that differs.
        notes: what was not held against it, in words.
    """

    file: Path
    path: str
    tensors: int
    files: int
    mismatches: tuple[Mismatch, ...]
    notes: tuple[str, ...]


def read_certificate(file: str | Path) -> Certificate:
    """Read a certificate and check that it is whole.

    Raises:
        FormatError: it is missing, damaged, or of a form that is not known.
    """
    file = Path(file)
    text = places.read_whole(file, most_bytes=_MOST_BYTES, what="certificate")
    document = parse_object(text, file=file, what="certificate")
    if document.get("format") != FORMAT:
        got = reprlib.repr(document.get("format"))
        raise FormatError(Problem(what="not a certificate of a known form", file=str(file), expected=FORMAT, got=got))
    try:
        if document.get(SEAL) != seal(document):
            what, remedy = "certificate is damaged: its seal does not fit", "take a good copy of it"
            raise FormatError(Problem(what=what, file=str(file), remedy=remedy))
        checkpoints = tuple(_checkpoints(document))
        sampled = document["options"]["sample"] is not None
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        what, got = "certificate is not of the form that it names", shown(str(error))
        raise FormatError(Problem(what=what, file=str(file), got=got)) from error
    return Certificate(file=file, sampled=sampled, checkpoints=checkpoints)


def seal(document: Mapping[str, Any]) -> str:
    """The SHA-256 of a certificate without its seal: it finds damage, not intent."""
    rest = {name: value for name, value in document.items() if name != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def hold(
    certificate: Certificate,
    layout: str,
    config: str,
    digests: Sequence[Digest],
    files: Sequence[FileDigest],
    looked_at: Callable[[str], bool],
) -> Held:
    """Hold a checkpoint against a certificate, or against that of its two checkpoints that fits best.

    Args:
        certificate: what to hold it against.
        layout: the checkpoint's layout.
        config: digest of what its config.json says.
        digests: its tensors.
        files: its files; the certificate itself may be one of them, and extra ones do not matter.
        looked_at: of a name that has no digest, whether it would have one if there were such a tensor.
    """
    ours = {digest.key: digest for digest in digests}
    around = {file.name: file for file in files}
    each = [_held(certificate.file, one, layout, config, ours, around, looked_at) for one in certificate.checkpoints]
    return min(each, key=lambda held: len(held.mismatches))


def _held(
    file: Path,
    certified: Certified,
    layout: str,
    config: str,
    ours: Mapping[str, Digest],
    files: Mapping[str, FileDigest],
    looked_at: Callable[[str], bool],
) -> Held:
    known = {name: one for name, one in certified.files.items() if name != file.name}
    ours_of_weights = _weight_files(files)
    alike = layout == certified.layout and ours_of_weights == _weight_files(known)
    mismatches = list(_tensor_mismatches(certified.tensors, ours, looked_at))
    if config != certified.config:
        mismatches.append(Mismatch(name=CONFIG_NAME, what="config", expected=certified.config, got=config))
    if not alike:
        due = SIDECAR in files or (layout == certified.layout and bool(ours_of_weights))  # an Orbax checkpoint has none
        known = {name: one for name, one in known.items() if _is_beside(one, sidecar=due)}
    mismatches += _file_mismatches(known, files)
    return Held(
        file=file,
        path=certified.path,
        tensors=len(ours),
        files=len(known),
        mismatches=tuple(mismatches),
        notes=() if alike else (_NOT_ALIKE,),
    )


def _is_beside(file: FileDigest, *, sidecar: bool) -> bool:
    """Whether a file lies beside the weights whatever those are called, such as one of the tokenizer.

    Args:
        file: any file of a certificate.
        sidecar: whether the sidecar counts, which belongs to some layouts alone.
    """
    if file.name == SIDECAR:
        return sidecar
    return not file.of_weights and file.name != CONFIG_NAME and not file.name.endswith(INDEX_SUFFIX)


def _weight_files(files: Mapping[str, FileDigest]) -> set[str]:
    return {name for name, file in files.items() if file.of_weights}


def _tensor_mismatches(
    known: Mapping[str, Digest], ours: Mapping[str, Digest], looked_at: Callable[[str], bool]
) -> Iterator[Mismatch]:
    for key, digest in ours.items():
        if key not in known:
            yield Mismatch(name=key, what="extra")
            continue
        for what in ("dtype", "shape", "sha256"):
            expected, got = (str(getattr(one, what)) for one in (known[key], digest))
            if expected != got:
                yield Mismatch(name=key, what=what, expected=expected, got=got)
    for key in known:
        if key not in ours and looked_at(key):
            yield Mismatch(name=key, what="missing")


def _file_mismatches(known: Mapping[str, FileDigest], ours: Mapping[str, FileDigest]) -> Iterator[Mismatch]:
    for name, file in known.items():
        if name not in ours:
            yield Mismatch(name=name, what="missing")
        elif ours[name] != file:
            expected, got = (f"{one.nbytes:,} bytes, sha256 {one.sha256}" for one in (file, ours[name]))
            yield Mismatch(name=name, what="file", expected=expected, got=got)


def _checkpoints(document: Mapping[str, Any]) -> Iterator[Certified]:
    told = document["checkpoints"]
    if not isinstance(told, list) or not 1 <= len(told) <= 2:
        raise ValueError("checkpoints")
    for number, one in enumerate(told):
        tensors = dict(_tensors(document["tensors"], number))
        if one["sha256"] != overall(tensors.values()):
            raise ValueError("the digest of the whole is not that of its tensors")
        files = dict(_files(one["files"]))
        path, layout, config = (_text(one[name]) for name in ("path", "layout", "config_sha256"))
        yield Certified(path=path, layout=layout, config=config, tensors=tensors, files=files)


def _tensors(told: Mapping[str, Any], number: int) -> Iterator[tuple[str, Digest]]:
    for key, facts in told.items():
        fact = facts[number] if isinstance(facts, list) else facts
        if fact is None:
            continue
        if not is_shape(fact["shape"]):
            raise ValueError(f"shape of {key}")
        dtype, sha256 = _text(fact["dtype"]), _text(fact["sha256"])
        yield key, Digest(key=key, dtype=dtype, shape=tuple(fact["shape"]), sha256=sha256)


def _files(told: Mapping[str, Any]) -> Iterator[tuple[str, FileDigest]]:
    for name, fact in told.items():
        nbytes, of_weights = fact["bytes"], fact["of"] == "header"
        if type(nbytes) is not int:
            raise ValueError(f"size of {name}")
        yield name, FileDigest(name=name, nbytes=nbytes, sha256=_text(fact["sha256"]), of_weights=of_weights)


def _text(value: object) -> str:
    if not isinstance(value, str) or not is_text(value):
        raise TypeError(f"{reprlib.repr(value)} is not text")
    return value
