"""What is written about a checkpoint into its own folder: a model card and a certificate, which go nowhere else."""

from __future__ import annotations

from pathlib import Path

from minimax_jax.io import source
from minimax_jax.io.location import Location
from minimax_jax.paths import is_file

CARD_NAME = "README.md"
CERTIFICATE_NAME = "certificate.json"

CARD_MARK = "<!-- minimax_jax wrote this, of this folder alone. Without this line the card is yours, and kept. -->"
"""The line that tells a card of ours from one that somebody wrote."""

CERTIFICATE_BEGINNING, CERTIFICATE_BEGINNING_BYTES = b'"format": "minimax_jax certificate', 64
"""What a certificate begins with, of whatever form, behind its brace; and what is read to find it."""

_MOST_CARD_BYTES = 2**16


def own_card(file: Location) -> str | None:
    """The text of a card that minimax_jax wrote; None of any other, and where there is none.

    Raises:
        FormatError: the file cannot be read.
    """
    text = _begin(file, _MOST_CARD_BYTES).decode(errors="replace")
    return text if CARD_MARK in text.splitlines() else None


def own_certificate(file: Location) -> bool:
    """Whether a file is a certificate that minimax_jax wrote.

    Raises:
        FormatError: the file cannot be read.
    """
    return begins_as(_begin(file, CERTIFICATE_BEGINNING_BYTES), CERTIFICATE_BEGINNING)


def begins_as(content: bytes, beginning: bytes) -> bool:
    """Whether what a file holds begins with something, after white space and a brace."""
    return content.lstrip(b" \r\n\t{").startswith(beginning)


def _begin(file: Location, most_bytes: int) -> bytes:
    """The first bytes of a file; none where there is no regular file."""
    if not (is_file(file) if isinstance(file, Path) else source.exists(file)):
        return b""
    opened = source.open_file(file)
    try:
        content = bytearray(min(opened.state.nbytes, most_bytes))
        opened.read_into(0, memoryview(content))
    finally:
        opened.close()
    return bytes(content)
