"""Connections to anything but this machine raise, in this process and in those that it starts, and are written down.

Python's audit hooks see every connection that is made through its sockets, by whatever library, and nothing takes them
away again. `PATH` holds a `sitecustomize` that sets the hook in every Python that is started with it. What is written
down is found even where a library makes nothing of the error.
"""

import atexit
import ipaddress
import os
import socket
import sys
import tempfile
from pathlib import Path

PATH = Path(__file__).parent / "startup"
TRIED = "TESTS_TRIED_THE_NETWORK"
"""The variable of the environment that names the file where it is written down."""

ALLOWED = ("localhost", "", socket.gethostname())
"""Names that stand for this machine."""

WITH_ADDRESS = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getnameinfo")
WITH_NAME = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")

_watching = False


class NetworkUsedError(OSError):
    """A connection out of this machine was tried."""


def is_here(host):
    """Whether a host, by name or address, is this machine."""
    if isinstance(host, bytes):
        host = host.decode()
    if host is None or host in ALLOWED:
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _watch(event, arguments):
    host = None
    if event in WITH_ADDRESS and isinstance(arguments[-1], tuple):
        host = arguments[-1][0]
    elif event in WITH_NAME:
        host = arguments[0]
    if is_here(host):
        return
    with Path(os.environ[TRIED]).open("a") as stream:
        stream.write(f"{event} {host} by {sys.argv}\n")
    raise NetworkUsedError(f"{event} {host}")


def forbid():
    """Forbid it in this process."""
    global _watching
    if not _watching:
        sys.addaudithook(_watch)
        _watching = True


def forbid_everywhere():
    """Forbid it here and in Pythons that are started from now on, which write down together what they tried."""
    descriptor, os.environ[TRIED] = tempfile.mkstemp(prefix="network-")
    os.close(descriptor)
    atexit.register(Path(os.environ[TRIED]).unlink, missing_ok=True)
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(PATH) not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(PATH), *filter(None, known)])
    forbid()


def taken():
    """What was tried since this was last asked, and is forgotten."""
    file = Path(os.environ[TRIED])
    found = file.read_text().splitlines()
    if found:
        file.write_text("")
    return found
