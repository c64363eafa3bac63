"""A certificate that was written earlier, read back."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimax_jax.errors import FormatError, Problem
from minimax_jax.io import source as places
from minimax_jax.io.files import io_errors
from minimax_jax.io.header import is_shape
from minimax_jax.io.jsonfile import is_text, parse_object, shown
from minimax_jax.jobs.digests import Digest, FileDigest, overall
from minimax_jax.paths import path_of

FORMAT = "minimax_jax certificate 3"
SEAL = "seal"

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
        left_out: digests of tensors in its files that were left out, by the names that they have there.
        files: digests of its files by name.
    """

    path: str
    layout: str
    config: str
    tensors: Mapping[str, Digest]
    left_out: Mapping[str, Digest]
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


def read_certificate(file: str | Path) -> Certificate:
    """Read a certificate and check that it is whole.

    Raises:
        FormatError: it is missing, damaged, or of a form that is not known.
    """
    file = path_of(file)
    with io_errors(FormatError, "file cannot be opened", file, given=True):
        file.stat()
    text = places.read_whole(file, most_bytes=_MOST_BYTES, what="certificate")
    document = parse_object(text, file=file, what="certificate")
    if document.get("format") != FORMAT:
        what, got = "not a certificate of a known form", reprlib.repr(document.get("format"))
        remedy = "make a new one of a checkpoint that you trust: minimax-jax verify CHECKPOINT -o FILE"
        raise FormatError(Problem(what=what, file=str(file), expected=FORMAT, got=got, remedy=remedy))
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


def _checkpoints(document: Mapping[str, Any]) -> Iterator[Certified]:
    told = document["checkpoints"]
    if not isinstance(told, list) or not 1 <= len(told) <= 2:
        raise ValueError("checkpoints")
    for number, one in enumerate(told):
        tensors = dict(_tensors(document["tensors"], number))
        if one["sha256"] != overall(tensors.values()):
            raise ValueError("the digest of the whole is not that of its tensors")
        left_out, files = dict(_tensors(one["left_out_tensors"], number)), dict(_files(one["files"]))
        path, layout, config = (_text(one[name]) for name in ("path", "layout", "config_sha256"))
        yield Certified(path=path, layout=layout, config=config, tensors=tensors, left_out=left_out, files=files)


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
        nbytes, of = fact["bytes"], fact["of"]
        if type(nbytes) is not int:
            raise ValueError(f"size of {name}")
        if of not in ("header", "file"):
            raise ValueError(f"what the digest of {name} is of: {reprlib.repr(of)}")
        of_weights = of == "header"
        sha256, texts = _text(fact["sha256"]), fact["metadata"] if of_weights else {}
        digests = tuple(sorted((text, _text(digest)) for text, digest in texts.items()))
        yield name, FileDigest(name=name, nbytes=nbytes, sha256=sha256, of_weights=of_weights, texts=digests)


def _text(value: object) -> str:
    if not isinstance(value, str) or not is_text(value):
        raise TypeError(f"{reprlib.repr(value)} is not text")
    return value
