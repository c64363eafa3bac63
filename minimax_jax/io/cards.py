"""What is written about a checkpoint into its own folder: a model card and a certificate, which go nowhere else."""

from __future__ import annotations

from minimax_jax.io import source
from minimax_jax.io.location import Location

CARD_NAME = "README.md"
CERTIFICATE_NAME = "certificate.json"

CARD_MARK = "<!-- minimax_jax wrote this, of this folder alone. Without this line the card is yours, and kept. -->"
"""The line that tells a card of ours from one that somebody wrote."""

_MOST_CARD_BYTES = 2**16


def own_card(file: Location) -> str | None:
    """The text of a card that minimax_jax wrote; None of any other, and where there is none.

    Raises:
        FormatError: the file cannot be read.
    """
    if not source.exists(file):
        return None
    opened = source.open_file(file)
    try:
        content = bytearray(min(opened.state.nbytes, _MOST_CARD_BYTES))
        opened.read_into(0, memoryview(content))
    finally:
        opened.close()
    text = content.decode(errors="replace")
    return text if CARD_MARK in text.splitlines() else None
