"""A checkpoint held against a certificate: its tensors by name, what its files say, and the files beside the weights.

How tensors lie in files is no part of what they are. Where files of weights are not those that were certified, because
of other names, sizes, order or padding, they are held by what they say: which tensors, and the text of their headers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from minimax_jax.display import counted
from minimax_jax.io.checkpoint import INDEX_SUFFIX
from minimax_jax.io.jsonfile import shown
from minimax_jax.jobs.certified import Certificate, Certified
from minimax_jax.jobs.digests import Digest, FileDigest
from minimax_jax.jobs.source import SIDECAR
from minimax_jax.layout.config import CONFIG_NAME

What: TypeAlias = Literal["sha256", "dtype", "shape", "missing", "extra", "file", "text", "config"]

_OTHER_LAYOUT = (
    "another layout: tensors, what config.json says and the files beside the weights were held against it, but not the "
    "files of the weights themselves"
)
_OTHER_FILES = (
    "weights in files of other names, sizes or headers: they were held against it tensor by tensor, and so were those "
    "left out; --by bytes asks for the very same files"
)
_OTHER_TEXT = "not all of the text in headers (`__metadata__`) is there, or it came where there was none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """Something that is not as the certificate says: a tensor, or a file.

    Attributes:
        name: of the tensor in the Hugging Face form, of one that was left out, or of the file.
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
        notes: what is otherwise without being a difference, and what was not held against it, in words.
    """

    file: Path
    path: str
    tensors: int
    files: int
    mismatches: tuple[Mismatch, ...]
    notes: tuple[str, ...]


def hold(certificate: Certificate, ours: Certified, looked_at: Callable[[str], bool], *, same_files: bool) -> Held:
    """Hold a checkpoint against a certificate, or against that of its two checkpoints that fits best.

    Args:
        certificate: what to hold it against.
        ours: the checkpoint. The certificate itself may be one of its files, and extra ones do not matter.
        looked_at: of a name that has no digest, whether it would have one if there were such a tensor.
        same_files: whether files of weights in the same layout have to be the same bytes as well.
    """
    each = [_held(certificate.file, one, ours, looked_at, same_files) for one in certificate.checkpoints]
    return min(each, key=lambda held: len(held.mismatches))


def _held(
    file: Path, certified: Certified, ours: Certified, looked_at: Callable[[str], bool], same_files: bool
) -> Held:
    alike = ours.layout == certified.layout
    anew = _weight_files(ours) != _weight_files(certified)
    strict = alike and (same_files or not anew)
    dropped = certified.left_out if not ours.left_out and not strict else {}
    known = {name: one for name, one in certified.files.items() if name != file.name}
    if not strict:
        due = SIDECAR in ours.files or (alike and bool(_weight_files(ours)))  # an Orbax checkpoint has none
        known = {name: one for name, one in known.items() if _is_beside(one, sidecar=due)}
    mismatches = list(_tensor_mismatches(certified.tensors, ours.tensors, looked_at))
    mismatches += _tensor_mismatches(certified.left_out, ours.left_out, lambda key: key not in dropped)
    if ours.config != certified.config:
        mismatches.append(Mismatch(name=CONFIG_NAME, what="config", expected=certified.config, got=ours.config))
    if alike and not strict:
        mismatches += _text_mismatches(certified, ours)
    mismatches += _file_mismatches(known, ours.files)
    return Held(
        file=file,
        path=certified.path,
        tensors=len(ours.tensors) + len(ours.left_out),
        files=len(known),
        mismatches=tuple(mismatches),
        notes=tuple(_notes(certified, ours, dropped, strict=strict)),
    )


def _notes(certified: Certified, ours: Certified, dropped: Mapping[str, Digest], *, strict: bool) -> Iterator[str]:
    if not strict:
        alike = ours.layout == certified.layout
        yield _OTHER_FILES if alike else _OTHER_LAYOUT
        if alike and _texts(ours) != _texts(certified):
            yield _OTHER_TEXT
    if dropped:
        yield f"not here: {counted(len(dropped), 'tensor')} left out of the model, first {shown(min(dropped))}"


def _is_beside(file: FileDigest, *, sidecar: bool) -> bool:
    """Whether a file lies beside the weights whatever those are called, such as one of the tokenizer.

    Args:
        file: any file of a certificate.
        sidecar: whether the sidecar counts, which belongs to some layouts alone.
    """
    if file.name == SIDECAR:
        return sidecar
    return not file.of_weights and file.name != CONFIG_NAME and not file.name.endswith(INDEX_SUFFIX)


def _weight_files(checkpoint: Certified) -> dict[str, FileDigest]:
    return {name: file for name, file in checkpoint.files.items() if file.of_weights}


def _texts(checkpoint: Certified) -> set[tuple[str, str]]:
    return {text for file in _weight_files(checkpoint).values() for text in file.texts}


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


def _text_mismatches(certified: Certified, ours: Certified) -> Iterator[Mismatch]:
    """Files whose header has text that none had: damage cannot add any where there was none, but libraries do."""
    for name, file in _weight_files(ours).items():
        known = set(certified.files[name].texts) if name in certified.files else _texts(certified)
        for text, digest in file.texts if known else ():
            if (text, digest) not in known:
                yield Mismatch(name=name, what="text", got=f"{shown(text)}, sha256 {digest}")


def _file_mismatches(known: Mapping[str, FileDigest], ours: Mapping[str, FileDigest]) -> Iterator[Mismatch]:
    for name, file in known.items():
        if name not in ours:
            yield Mismatch(name=name, what="missing")
        elif ours[name] != file:
            expected, got = (f"{one.nbytes:,} bytes, sha256 {one.sha256}" for one in (file, ours[name]))
            yield Mismatch(name=name, what="file", expected=expected, got=got)
