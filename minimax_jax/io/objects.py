"""Objects of a store such as S3 or Google Cloud Storage, and whatever else fsspec knows: by its range reads."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from minimax_jax.errors import FormatError, Problem, saying
from minimax_jax.io.extras import needs
from minimax_jax.io.files import FileState
from minimax_jax.io.location import Url
from minimax_jax.io.remote import RemoteFile, Transient, persist
from minimax_jax.io.source import require_state

_TAGS = ("ETag", "etag", "generation", "md5Hash", "LastModified", "last_modified", "mtime", "created")
"""Where systems of fsspec tell what changes with an object, the best first."""

_LASTING = frozenset((errno.EPERM, errno.EACCES, errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG))

_FOREIGN = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("aiohttp", "ClientError"),
)
"""Errors that come through fsspec and are no OSError."""

_ASSUMED_LASTING = frozenset(("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "GoogleAuthError"))


class Objects:
    """The store of all other URLs; see `source.Store`."""

    def pin(self, url: Url) -> Url:
        """The same."""
        return url

    def names(self, folder: Url) -> list[str]:
        """The objects right below a prefix."""
        return self._named(folder, "file")

    def folders(self, folder: Url) -> list[str]:
        """The prefixes right below a prefix, each of which ends with a slash in the names of objects."""
        return self._named(folder, "directory")

    def _named(self, folder: Url, kind: str) -> list[str]:
        system, path = _system(folder)

        def ask() -> list[dict[str, Any]]:
            with _errors(folder):
                return list(system.ls(path, detail=True))

        found = (entry["name"].rstrip("/") for entry in persist(folder, ask) if entry["type"] == kind)
        return sorted(name for entry in found if (name := entry.rpartition("/")[2]))

    def look(self, file: Url) -> FileState:
        """The state of an object."""
        system, path = _system(file)

        def ask() -> Mapping[str, Any]:
            with _errors(file):
                return dict(system.info(path))

        found = persist(file, ask)
        if found["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "No such object", str(file))
        tag = next((f"{name} {found[name]}" for name in _TAGS if found.get(name)), "no ETag")
        return FileState(nbytes=found["size"], tag=tag)

    def open(self, file: Url, pinned: FileState, *, data: bool) -> RemoteFile:
        """An object to read by ranges. That it is the same is asked before its data is read, and at the end."""
        if data:
            require_state(file, pinned, self.look(file))
        return RemoteFile(file, pinned, _fetch, self.look)


def _fetch(file: Url, start: int, buffer: memoryview, pinned: FileState) -> int:
    system, path = _system(file)
    with _errors(file):
        content = system.cat_file(path, start=start, end=start + buffer.nbytes)
    if len(content) > buffer.nbytes:
        expected, got = f"{buffer.nbytes:,} bytes", f"{len(content):,} bytes"
        what = "store does not send the part of the object asked for"
        raise FormatError(Problem(what=what, file=str(file), expected=expected, got=got))
    buffer[: len(content)] = content
    return len(content)


def _system(url: Url) -> tuple[Any, str]:
    """The file system of a URL, which fsspec keeps, and the path in it. Nothing that it knows of files is kept."""
    with needs("remote", url):
        import fsspec

        try:
            fsspec.get_filesystem_class(url.scheme)
        except ValueError as error:
            expected = "hf://, s3://, gs://, https://, or another kind that fsspec knows"
            problem = Problem(what="unknown kind of URL", file=str(url), expected=expected, got=url.scheme)
            raise FormatError(problem) from error
        made: tuple[Any, str] = fsspec.core.url_to_fs(url.full, use_listings_cache=False)
    return made


@contextmanager
def _errors(url: Url) -> Iterator[None]:
    """Turn what a file system raises into `Transient`, a FileNotFoundError, or a FormatError where it will not pass."""
    foreign = tuple(getattr(sys.modules[module], name) for module, name in _FOREIGN if module in sys.modules)
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "No such object", str(url)) from error
    except (OSError, *foreign) as error:
        lasting = isinstance(error, OSError) and error.errno in _LASTING
        lasting = lasting or isinstance(error, PermissionError)
        if not lasting and _ASSUMED_LASTING.isdisjoint(kind.__name__ for kind in type(error).__mro__):
            raise Transient(f"{type(error).__name__}: {error}") from error
        remedy = "check the URL, your credentials, and the region and endpoint in their configuration"
        problem = Problem(what="store refuses to give this object", file=str(url), got=saying(error), remedy=remedy)
        raise FormatError(problem) from error
