"""Files of a web server: HTTP range requests. It lists nothing, and a file is told by its ETag and date."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from minimax_jax.errors import FormatError, Problem, saying
from minimax_jax.io.extras import needs
from minimax_jax.io.files import FileState
from minimax_jax.io.location import Url
from minimax_jax.io.remote import RemoteFile, Transient, persist, require_part
from minimax_jax.io.source import require_state

if TYPE_CHECKING:
    import aiohttp

_CONNECT_SECONDS, _SILENCE_SECONDS = 30, 60
_NOTHING_THERE = 416
_GONE = frozenset((404, 410))
_PASSING = frozenset((408, 425, 429))
_REFUSED = frozenset((401, 403, 407))


class Web:
    """The store of `http` and `https`; see `source.Store`."""

    def pin(self, url: Url) -> Url:
        """The same: a server has no versions."""
        return url

    def names(self, folder: Url) -> None:
        """Not told by a web server."""

    def folders(self, folder: Url) -> list[str]:
        """Not told either."""
        return []

    def look(self, file: Url) -> FileState:
        """The state of a file, by a request for its first byte: signed URLs allow no other kind of request."""
        return persist(file, lambda: _get(file, 0, memoryview(bytearray(1)))[0])

    def open(self, file: Url, pinned: FileState, *, data: bool) -> RemoteFile:
        """A file to read by ranges."""
        return RemoteFile(file, pinned, _fetch, self.look)


def _fetch(file: Url, start: int, buffer: memoryview, pinned: FileState) -> int:
    state, count = _get(file, start, buffer)
    require_state(file, pinned, state)
    return count


def _get(file: Url, start: int, buffer: memoryview) -> tuple[FileState, int]:
    """The state of a file and how many bytes were read from `start` on: fewer than asked for where it broke off."""
    with needs("remote", file):
        import aiohttp
        import fsspec
        from fsspec.asyn import sync

        system = fsspec.filesystem("http")
    try:
        found: tuple[FileState, int] = sync(system.loop, _read, system, file, start, buffer)
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        raise Transient(saying(error)) from error
    return found


async def _read(system: Any, file: Url, start: int, buffer: memoryview) -> tuple[FileState, int]:
    import aiohttp

    session = await system.set_session()
    options: dict[str, Any] = dict(system.kwargs)
    headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{start + buffer.nbytes - 1}"}
    headers["Accept-Encoding"] = "identity"
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
    request = functools.partial(session.get, system.encode_url(file.full), headers=headers, timeout=timeout, **options)
    async with request() as response:
        state = _state(file, response, start)
        done = 0
        try:
            async for chunk in response.content.iter_any():
                taken = min(len(chunk), buffer.nbytes - done)
                buffer[done : done + taken] = chunk[:taken]
                done += taken
                if taken < len(chunk):  # more than was asked for, perhaps all of the file: not to be waited for
                    break
        except (aiohttp.ClientError, TimeoutError, ConnectionError):
            if not done:
                raise
        return state, done


def _state(file: Url, response: aiohttp.ClientResponse, start: int) -> FileState:
    """The state that an answer speaks of; an error for an answer that is not the part that was asked for."""
    _require_good(file, response)
    total = require_part(file, response.status, response.headers, start)
    tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or "no ETag"
    return FileState(nbytes=total, tag=tag)


def _require_good(file: Url, response: aiohttp.ClientResponse) -> None:
    status, said = response.status, f"HTTP status {response.status} {response.reason or ''}".strip()
    if status in _GONE:
        raise FileNotFoundError(2, "No such file on the server", str(file))
    if status in _PASSING or status >= 500:
        raise Transient(said)
    if status == _NOTHING_THERE or status < 400:
        return
    what = "server refuses to give this file" if status in _REFUSED else "server cannot answer this request"
    remedy = "check the URL, its signature and its date; put a token into the configuration of fsspec (headers)"
    raise FormatError(Problem(what=what, file=str(file), got=said, remedy=remedy))
