"""Where something lies: a path on this machine, or a URL."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeAlias
from urllib.parse import quote, urlsplit

from minimax_jax.errors import FormatError, Problem
from minimax_jax.paths import is_file, is_folder

WEB_SCHEMES = frozenset(("http", "https"))


@dataclass(frozen=True, order=True)
class Url:
    """A folder or file elsewhere, with the few manners of a `Path` that finding files in a folder takes.

    Attributes:
        base: the URL without its query; `str()` gives it, and messages show it.
        query: what followed the question mark, kept for all files of a folder. It may hold a signature: never shown.
    """

    base: str
    query: str = ""

    def __post_init__(self) -> None:
        if "?" in self.base and self.scheme in WEB_SCHEMES:
            raise ValueError("a query goes by itself")

    def __str__(self) -> str:
        return self.base

    def __repr__(self) -> str:
        return f"Url({self.base!r})"

    def __truediv__(self, name: str) -> Url:
        """The file of that name, which may hold slashes, in this folder."""
        return Url(f"{self.base}/{quote(name) if self.scheme in WEB_SCHEMES else name}", self.query)

    @property
    def scheme(self) -> str:
        """What stands before `://`."""
        return self.base.partition("://")[0]

    @property
    def name(self) -> str:
        """The last step."""
        return self.base.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The end of the name, from its last dot on."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> Url:
        """The folder that holds it."""
        return Url(self.base.rpartition("/")[0], self.query)

    @property
    def full(self) -> str:
        """The URL with its query, as a server wants it: not for messages."""
        return f"{self.base}?{self.query}" if self.query else self.base


Location: TypeAlias = Path | Url


def locate(place: str | Location) -> Location:
    """What a user's text or path names: text with a scheme is a URL, all else a local path.

    Raises:
        FormatError: a URL with a user name or password, which would show in messages; a URL that was made a `Path`,
            which takes one of its slashes away.
    """
    if isinstance(place, Path):
        first = place.parts[0] if place.parts else ""
        if first.endswith(":") and len(first) > 2 and not (is_folder(place) or is_file(place)):
            what, remedy = "URL given as a Path, which has lost a slash", "give it as text"
            raise FormatError(Problem(what=what, file=str(place), remedy=remedy))
        return place
    if isinstance(place, Url):
        return place
    scheme, mark, rest = place.partition("://")
    if not mark or not scheme.replace("+", "").isalnum():
        return Path(place)
    if scheme == "file":
        return Path(rest)
    return _url(scheme.lower(), rest)


def _url(scheme: str, rest: str) -> Url:
    base, query = rest, ""
    if scheme in (*WEB_SCHEMES, "hf"):
        base, _, query = rest.partition("#")[0].partition("?")
    url = Url(f"{scheme}://{base.rstrip('/')}", query)
    if scheme in WEB_SCHEMES and "@" in urlsplit(url.base).netloc:
        what, remedy = "URL with a user name or password", "put them into the configuration of fsspec, or into ~/.netrc"
        raise FormatError(Problem(what=what, file=f"{scheme}://...@{base.partition('@')[2]}", remedy=remedy))
    return url
