"""Repositories of the Hugging Face hub: `hf://org/name@revision`, through its own client.

Headers are read by ranges. A shard whose data is wanted is fetched as a whole into the hub's cache, once, and read as a
local file. `?keep=N` keeps at most N of the shards fetched here on disk, the latest; `?keep=0` none: all is read by
ranges. A revision is resolved to a commit when a checkpoint is opened, and files of a commit do not change.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, unquote

from minimax_jax.errors import FormatError, Problem, saying
from minimax_jax.io.extras import needs
from minimax_jax.io.files import FileState
from minimax_jax.io.location import Location, Url
from minimax_jax.io.remote import RemoteFile, Transient, persist, require_part
from minimax_jax.io.shelf import Shelf, ShelvedFile
from minimax_jax.io.source import CachedFile, OpenFile

_FORM = "hf://org/name, hf://org/name@revision, and ?keep=N"
_PASSING = frozenset((408, 425, 429))
_SILENCE_SECONDS = 60
_COMMIT_LENGTH = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """What an `hf://` URL says; `path` is that of a file or folder in the repository, empty for the whole."""

    repository: str
    revision: str | None
    path: str
    keep: int | None


class Hub:
    """The store of `hf`; see `source.Store`."""

    def pin(self, url: Url) -> Location:
        """The same place at the commit that its revision is now; offline, the folder of the cache."""
        place = _parse(url)
        with needs("hub", url):
            from huggingface_hub import constants, snapshot_download
        if constants.HF_HUB_OFFLINE:
            with _errors(url):
                folder = snapshot_download(place.repository, revision=place.revision, local_files_only=True)
            return Path(folder) / place.path
        if place.revision is not None and len(place.revision) == _COMMIT_LENGTH:
            return url
        commit = persist(url, lambda: _commit(url, place))
        base = f"hf://{place.repository}@{commit}"
        return Url(f"{base}/{place.path}" if place.path else base, url.query)

    def names(self, folder: Url) -> list[str]:
        """The files of the repository right in a folder."""
        return sorted(name for name in _below(folder) if "/" not in name)

    def folders(self, folder: Url) -> list[str]:
        """The folders right in a folder."""
        return sorted({name.partition("/")[0] for name in _below(folder) if "/" in name})

    def look(self, file: Url) -> FileState:
        """The state of a file of a commit."""
        found = _files(file).get(_parse(file).path)
        if found is None:
            raise FileNotFoundError(2, "No such file in the repository", str(file))
        return found

    def open(self, file: Url, pinned: FileState, *, data: bool) -> OpenFile:
        """A file to read: by ranges, or from disk."""
        place = _parse(file)
        cached = _cached(place)
        if cached is not None:
            return CachedFile(file, cached, pinned)
        if place.keep == 0 or not data:
            return RemoteFile(file, pinned, _fetch)
        if place.keep is None:
            return CachedFile(file, _download(file), pinned)
        far = RemoteFile(file, pinned, _fetch)
        return ShelvedFile(far, _shelf(place.repository, place.revision, place.keep))


def _parse(url: Url) -> _Place:
    """Take an `hf://` URL apart."""
    head, at, tail = url.base.removeprefix("hf://").partition("@")
    steps, rest = head.split("/"), tail.split("/")
    options = parse_qs(url.query, keep_blank_values=True)
    keep = options.pop("keep", [""])[-1]
    if len(steps) < 2 or not all(steps) or (at and (len(steps) > 2 or not all(rest))) or options:
        raise FormatError(Problem(what="not the name of a hub repository", file=str(url), expected=_FORM))
    if url.query and (not keep.isdecimal() or int(keep) == 1):
        expected = "0 for none, or at least 2: units of work may read from two shards in turn"
        raise FormatError(Problem(what="no such number of shards to keep", file=str(url), expected=expected, got=keep))
    count = 3 if rest[:2] == ["refs", "pr"] else 1
    return _Place(
        repository="/".join(steps[:2]),
        revision=unquote("/".join(rest[:count])) if at else None,
        path="/".join(rest[count:] if at else steps[2:]),
        keep=int(keep) if keep else None,
    )


def _commit(url: Url, place: _Place) -> str:
    from huggingface_hub import HfApi

    with _errors(url):
        return str(HfApi().model_info(place.repository, revision=place.revision).sha)


def _files(url: Url) -> dict[str, FileState]:
    """Every file of a commit by its path in the repository."""
    place = _parse(url)

    def ask() -> dict[str, FileState]:
        with _errors(url):
            return _files_of(place.repository, place.revision or "main")

    return persist(url, ask)


def _below(folder: Url) -> Iterator[str]:
    """Paths of all files in a folder and in those below it, from that folder on."""
    place = _parse(folder)
    prefix = f"{place.path}/" if place.path else ""
    return (name.removeprefix(prefix) for name in _files(folder) if name.startswith(prefix))


@functools.lru_cache(maxsize=16)
def _files_of(repository: str, commit: str) -> dict[str, FileState]:
    from huggingface_hub import HfApi

    found = HfApi().model_info(repository, revision=commit, files_metadata=True).siblings or []
    return {
        file.rfilename: FileState(nbytes=file.size or 0, tag=file.lfs.sha256 if file.lfs else str(file.blob_id))
        for file in found
    }


def _cached(place: _Place) -> Path | None:
    """Where the hub's cache has a file, if it has it."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(place.repository, place.path, revision=place.revision)
    return Path(found) if isinstance(found, str) else None


def _download(file: Url) -> Path:
    """Bring a file into the hub's cache."""
    from huggingface_hub import hf_hub_download

    place = _parse(file)

    def fetch() -> Path:
        with _errors(file):
            return Path(hf_hub_download(place.repository, place.path, revision=place.revision))

    return persist(file, fetch)


@functools.lru_cache(maxsize=16)
def _shelf(repository: str, commit: str | None, keep: int) -> Shelf:
    """The one shelf of a commit, which all readers share."""
    return Shelf(keep, _download, _delete)


def _delete(path: Path) -> None:
    """Take a file out of the hub's cache: its link, and the blob that it leads to unless another link does too."""
    blob = path.resolve()
    path.unlink()
    snapshots = next(folder for folder in path.parents if folder.name == "snapshots")
    if blob != path and not any(link.resolve() == blob for link in snapshots.rglob("*") if link.is_symlink()):
        blob.unlink()


def _fetch(file: Url, start: int, buffer: memoryview, pinned: FileState) -> int:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    place, done = _parse(file), 0
    part = {"Range": f"bytes={start}-{start + buffer.nbytes - 1}", "Accept-Encoding": "identity"}
    link, headers = hf_hub_url(place.repository, place.path, revision=place.revision), build_hf_headers() | part
    asked = http_stream_backoff("GET", link, headers=headers, timeout=_SILENCE_SECONDS, max_retries=0)
    with _errors(file), asked as response:
        hf_raise_for_status(response)
        require_part(file, response.status_code, response.headers, start)
        try:
            for chunk in response.iter_raw():
                taken = min(len(chunk), buffer.nbytes - done)
                buffer[done : done + taken] = chunk[:taken]
                done += taken
                if taken < len(chunk):  # more than was asked for
                    break
        except _broken() as error:  # must not leave the block, which would ask again
            if not done:
                raise Transient(saying(error)) from error
    return done


@contextmanager
def _errors(url: Url) -> Iterator[None]:
    """Turn what the hub's client raises into `Transient`, or a FormatError where it will not pass."""
    from huggingface_hub import constants, errors

    try:
        yield
    except Transient:
        raise
    except (errors.HFValidationError, errors.LocalEntryNotFoundError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE:
            raise Transient(saying(error.__cause__ or error)) from error
        raise _refusal(url, error) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in _PASSING or status >= 500:
            raise Transient(saying(error)) from error
        raise _refusal(url, error) from error
    except (_broken(), OSError) as error:
        if getattr(error, "errno", None) in (None, errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT):
            raise Transient(saying(error)) from error
        raise _refusal(url, error) from error


def _broken() -> type[Exception]:
    """What the client raises where a connection breaks: the error of the library that it builds on."""
    from huggingface_hub import errors

    return errors.HTTPError  # type: ignore[attr-defined]


def _refusal(url: Url, error: Exception) -> FormatError:
    remedy = "check the name and the revision; for a gated or private repository, hf auth login or HF_TOKEN"
    return FormatError(Problem(what="hub does not give this", file=str(url), got=saying(error), remedy=remedy))
