"""Reading what is far away: in few requests, tried again when the connection fails, and never less than was asked for.

Small reads go through blocks, of which the latest are kept: the thousands of small tensors of a layer lie together in
its file, and a request for each would take far longer than their bytes. Large reads are one request each.
"""

from __future__ import annotations

import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TypeVar

from minimax_jax.errors import FormatError, Problem
from minimax_jax.io.files import FileState, short_file
from minimax_jax.io.location import Url
from minimax_jax.io.source import require_state

WAITS_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""How long to wait after each failure in a row; one more is an error."""

BLOCK_BYTES = 2**18
"""A read of fewer bytes goes through blocks of this size. The header of a published shard is 100 KB."""

_BLOCKS = 64
"""How many blocks of a file are kept: 16 MiB."""

Fetch = Callable[[Url, int, memoryview, FileState], int]
"""Reads from a position into a buffer, in one request: how many bytes came, which may be fewer than asked for.

Raises a `Transient` where none came and trying again may help, a FormatError where it will not.
"""

_T = TypeVar("_T")


class Transient(OSError):
    """A request that failed in a way that may pass: a dropped connection, a server too busy."""


def persist(file: Url, call: Callable[[], _T]) -> _T:
    """The result of a call that is made again, after longer and longer waits, while it raises `Transient`.

    Raises:
        FormatError: it failed too often in a row.
    """
    for wait in (*WAITS_SECONDS, None):
        try:
            return call()
        except Transient as error:
            if wait is None:
                what, remedy = "server cannot be reached, or keeps failing", "try again later"
                raise FormatError(Problem(what=what, file=str(file), got=str(error), remedy=remedy)) from error
            time.sleep(wait * random.uniform(0.5, 1.0))  # so that many readers do not come back at once
    raise AssertionError("unreachable")


def require_part(file: Url, status: int, headers: Mapping[str, str], start: int) -> int:
    """Check that an answer over HTTP holds the part of a file that was asked for, and return the size of the whole.

    Args:
        file: what was asked for.
        status: of the answer.
        headers: of the answer, found by names in any case. `Content-Range: bytes 0-99/1000` is a part, and
            `bytes */1000` says that nothing is there, behind the end of the file.
        start: where the part begins.

    Raises:
        FormatError: it holds something else, such as the whole file, or compressed bytes.
    """
    unit, _, rest = headers.get("Content-Range", "").partition(" ")
    part, _, total = rest.partition("/")
    plain = unit == "bytes" and total.isdecimal() and headers.get("Content-Encoding", "identity") == "identity"
    if plain and (part.partition("-")[0] == str(start) or (part == "*" and start >= int(total))):
        return int(total)
    what, remedy = "server does not send the part of the file asked for", "download the files, and give the folder"
    told = (f"{name} {headers[name]}" for name in ("Content-Range", "Content-Encoding") if name in headers)
    got = ", ".join((f"status {status}", *told))
    raise FormatError(Problem(what=what, file=str(file), expected=f"bytes {start}-", got=got, remedy=remedy))


class RemoteFile:
    """A file on a server, read by ranges; see `source.OpenFile`."""

    def __init__(self, file: Url, state: FileState, fetch: Fetch, look: Callable[[Url], FileState] | None = None):
        """Ask for nothing yet.

        Args:
            file: where it is.
            state: the state that it has to be in.
            fetch: reads some of it.
            look: tells its state now; None for one that cannot change, as its name says what it holds.
        """
        self.file = file
        self.state = state
        self._fetch = fetch
        self._look = look
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from position `start` on.

        Raises:
            FormatError: they cannot be had, or the file is not what it was.
        """
        if start + buffer.nbytes > self.state.nbytes:
            expected = start + buffer.nbytes
            raise FormatError(short_file(self.file, expected_bytes=expected, got_bytes=self.state.nbytes))
        if buffer.nbytes >= BLOCK_BYTES:
            self._read(start, buffer)
        elif buffer.nbytes:
            self._read_blocks(start, buffer)

    def require_unchanged(self) -> None:
        """Ask the server once more; see `source.OpenFile`."""
        if self._look is None:
            return
        try:
            now = self._look(self.file)
        except FileNotFoundError as error:
            raise FormatError(Problem(what="file is gone since it was opened", file=str(self.file))) from error
        require_state(self.file, self.state, now)

    def close(self) -> None:
        """Forget the blocks."""
        with self._lock:
            self._blocks.clear()

    def _read(self, start: int, buffer: memoryview) -> None:
        done = 0
        while done < buffer.nbytes:  # what came before a connection broke stays, and the rest is asked for
            at, rest = start + done, buffer[done:]
            done += persist(self.file, lambda at=at, rest=rest: self._some(at, rest))  # type: ignore[misc]

    def _some(self, start: int, buffer: memoryview) -> int:
        count = self._fetch(self.file, start, buffer, self.state)
        if count == 0:
            raise Transient("the server sent nothing")
        return count

    def _read_blocks(self, start: int, buffer: memoryview) -> None:
        stop = start + buffer.nbytes
        with self._lock:  # so that threads that want the same block fetch it once
            for at in range(start - start % BLOCK_BYTES, stop, BLOCK_BYTES):
                block = self._block(at)
                first, last = max(start, at), min(stop, at + BLOCK_BYTES)
                buffer[first - start : last - start] = block[first - at : last - at]

    def _block(self, at: int) -> bytes:
        if at in self._blocks:
            self._blocks.move_to_end(at)
        else:
            fetched = bytearray(min(BLOCK_BYTES, self.state.nbytes - at))
            self._read(at, memoryview(fetched))
            self._blocks[at] = bytes(fetched)
            if len(self._blocks) > _BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[at]
