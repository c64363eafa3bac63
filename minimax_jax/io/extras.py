"""What is installed only where it is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from minimax_jax.errors import FormatError, Problem
from minimax_jax.io.location import Url

_COVERED = frozenset(("http", "https", "s3", "hf"))
"""Kinds of URLs for which the extras are enough; fsspec says what the others take."""


@contextmanager
def needs(extra: str, url: Url) -> Iterator[None]:
    """Turn an ImportError inside the block into the advice to install an extra of this package.

    Raises:
        FormatError: something that reading the URL takes is not installed.
    """
    try:
        yield
    except ImportError as error:
        what = "something is not installed that reading this URL takes"
        remedy = f"pip install 'minimax_jax[{extra}]'" if url.scheme in _COVERED else "install what is named here"
        raise FormatError(Problem(what=what, file=str(url), got=str(error), remedy=remedy)) from error
