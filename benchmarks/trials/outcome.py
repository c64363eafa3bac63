"""What a trial is, and children to run it in: forked from a process that has imported all and started nothing."""

from __future__ import annotations

import json
import os
import pickle
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimax_jax.io.cards import CERTIFICATE_NAME
from minimax_jax.jobs.certified import seal

HANGS_AFTER_S = 120
"""Far longer than anything here takes."""

_NOTED_BY_ORBAX = {"_CHECKPOINT_METADATA": b"0123456789", "commit_success.txt": bytes(range(256))}
"""What Orbax writes of time and place, and the bytes of it that may differ."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A row of the table.

    Attributes:
        what: what was done.
        count: how many times.
        gave: what came of it.
        good: whether that is what has to come of it.
    """

    what: str
    count: int
    gave: str
    good: bool


class Child:
    """A process of its own that calls a function and tells what it returned or raised; see `ended`."""

    def __init__(self, function: Callable[[], Any]):
        self._from_child, to_parent = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._from_child)
            _be_child(function, to_parent)
        os.close(to_parent)

    def begun(self) -> None:
        """Wait until the function is called, or the child has died."""
        os.read(self._from_child, 1)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def ended(self) -> tuple[int, Any]:
        """Wait for the end: the status (negative: the signal that killed it), and what was returned or raised.

        A child that hangs is killed, and `TimeoutError` is what it raised.
        """
        deadline = time.monotonic() + HANGS_AFTER_S
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                self.kill()
                os.waitpid(self.pid, 0)
                os.close(self._from_child)
                return -signal.SIGKILL, TimeoutError("it hangs")
            time.sleep(0.005)
        with os.fdopen(self._from_child, "rb") as stream:
            told = stream.read().lstrip(b"\n")
        return os.waitstatus_to_exitcode(status), pickle.loads(told) if told else None


def _be_child(function: Callable[[], Any], to_parent: int) -> None:
    status = 1
    try:
        os.write(to_parent, b"\n")
        told, status = function(), 0
    except SystemExit as error:
        told, status = error, int(error.code or 0)
    except BaseException as error:  # whatever it is: the parent judges it
        told = error
    try:
        content = pickle.dumps(told)
    except (pickle.PicklingError, TypeError, AttributeError):
        content = pickle.dumps(RuntimeError(f"{type(told).__name__}: {told}"))
    try:
        with os.fdopen(to_parent, "wb") as stream:
            stream.write(content)
    finally:
        os._exit(status)


def in_child(function: Callable[[], Any]) -> Any:
    """What a function returns; what it raises is raised here."""
    status, told = Child(function).ended()
    if status:
        raise told if isinstance(told, BaseException) else RuntimeError(f"child ended with {status}")
    return told


def named(error: object) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def files(folder: Path) -> dict[str, bytes]:
    """Every file in a folder and below it, hidden ones too, by path; time and place that Orbax notes are taken out.

    So is the place that a certificate names, where it is this folder.
    """
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    noted = {name: found[name].translate(None, free) for name, free in _NOTED_BY_ORBAX.items() if name in found}
    if CERTIFICATE_NAME in found:
        noted[CERTIFICATE_NAME] = _placeless(found[CERTIFICATE_NAME], folder)
    return found | noted


def _placeless(certificate: bytes, folder: Path) -> bytes:
    """A certificate without the path that it names and the seal over it, as far as both are right."""
    document = json.loads(certificate)
    for right in (str(folder), seal(document)):
        certificate = certificate.replace(json.dumps(right).encode(), b"right", 1)
    return certificate
