"""JSON, strictly: what other readers of the same file would refuse or read differently is refused here."""

from __future__ import annotations

import json
import os
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

from minimax_jax.bulk import without_collector
from minimax_jax.errors import FormatError, JobError, Problem, raise_if
from minimax_jax.io import points
from minimax_jax.io.files import io_errors, sync_folder
from minimax_jax.io.location import Location

TEMPORARY_SUFFIX = ".tmp"
"""The end of the hidden name of a file until it is whole; a process that is killed leaves it."""


@without_collector
def parse_object(text: bytes, *, file: Location, what: str) -> dict[str, Any]:
    """Parse a JSON object, refusing what the json module lets through: duplicate keys, NaN, unpaired surrogates.

    Raises:
        FormatError: `text` is not UTF-8, not JSON, not an object, nested too deeply, or names a key twice.
    """
    repeated: list[str] = []
    escapes = b"\\u" in text  # UTF-8 itself has no surrogates

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        merged = dict(pairs)
        if escapes:
            "".join(merged).encode()  # raises on an unpaired surrogate
        if len(merged) != len(pairs):
            repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return merged

    try:
        parsed = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(Problem(what=f"{what} is not valid JSON", file=str(file), got=str(error))) from error
    if not isinstance(parsed, dict):
        raise FormatError(Problem(what=f"{what} is not a JSON object", file=str(file), got=type(parsed).__name__))
    twice = f"{what} names this key twice"
    raise_if((Problem(what=twice, file=str(file), key=shown(key)) for key in repeated), FormatError)
    return parsed


def is_text(value: object) -> bool:
    """Whether `value` is a string that UTF-8 can hold: JSON escapes can smuggle in half a surrogate pair."""
    if not isinstance(value, str):
        return False
    return value.isascii() or not any("\ud800" <= char <= "\udfff" for char in value)


def as_text(name: str) -> str:
    """A name of the file system as UTF-8 can hold it: bytes that are none become escapes with a backslash."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def shown(key: str) -> str:
    """`key` as it may stand in a message: short, and without control characters."""
    return key if key.isprintable() and len(key) <= 200 else ascii(key)[:200]


def write_json_atomic(path: Path, obj: Any) -> None:
    """Write `obj` as JSON to `path`, as `write_text_atomic` does."""
    write_text_atomic(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` to `path`: at any moment there is the old file or the whole new one, also after a power cut.

    Raises:
        JobError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    with io_errors(JobError, "file cannot be written", path):
        try:
            with temporary.open("x", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            points.reach("before a JSON file takes its name")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
