"""Servers on this machine that hand out a folder: a web server with every vice, and a stand-in of the hub."""

import hashlib
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Faults:
    """What a server does wrong, on requests for safetensors files alone but for `status`."""

    status: Callable[[str], int | None] = lambda path: None
    """The status to answer a path with instead."""
    drop_after: int | None = None
    """Close the connection after so many bytes of a body."""
    drops: int = 10**9
    """How often to do that."""
    ignore_range: bool = False
    shift: int = 0
    """Send the bytes so many places further on, and say so."""
    etag: Callable[[], str] | None = None
    """What to say instead of the true ETag."""
    headers: dict[str, str] = field(default_factory=dict)
    """What else to say, or to say instead."""


@dataclass
class Server:
    """A server and what was asked of it."""

    folder: Path
    url: str = ""
    faults: Faults = field(default_factory=Faults)
    requests: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    sent_bytes: Counter[str] = field(default_factory=Counter)

    def asked(self, end: str = ".safetensors") -> list[str]:
        """Paths of requests that were asked for, those that end so."""
        return [path for path in self.requests if path.endswith(end)]


def etag_of(file: Path) -> str:
    """A digest of a small file; time and size of one that takes too long to digest."""
    status = file.stat()
    small = status.st_size < 2**24
    return hashlib.sha256(file.read_bytes()).hexdigest() if small else f"{status.st_mtime_ns}-{status.st_size}"


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD with files of a folder, whole or in part."""

    protocol_version = "HTTP/1.1"
    server_of: Server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, path = self.server_of, unquote(urlsplit(self.path).path)
        server.requests.append(path)
        server.headers.append({name.lower(): value for name, value in self.headers.items()})
        status = server.faults.status(path)
        if status is not None:
            self.answer(status, b"no")
            return
        self.serve(path)

    def serve(self, path: str) -> None:
        file = self.server_of.folder / path.lstrip("/")
        if file.is_file():
            self.send_file(file)
        else:
            self.answer(404, b"not found")

    def answer(self, status: int, body: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def send_file(self, file: Path, extra: dict[str, str] | None = None) -> None:
        size, faults = file.stat().st_size, self.server_of.faults
        bad = file.suffix == ".safetensors"
        part = self.headers.get("Range")
        status, start, stop = 200, 0, size
        if part is not None and not (bad and faults.ignore_range):
            first, _, last = part.removeprefix("bytes=").partition("-")
            status, start, stop = 206, int(first), min(int(last) + 1, size)
            if start >= size:
                status, stop = 416, start
        shift = faults.shift if bad else 0
        with file.open("rb") as stream:
            stream.seek(start + shift)
            body = stream.read(stop - start)
        self.send_response(status)
        etag = faults.etag() if bad and faults.etag else etag_of(file)
        headers = {"ETag": f'"{etag}"', "Content-Length": str(len(body)), "Accept-Ranges": "bytes"}
        if status == 206:
            headers["Content-Range"] = f"bytes {start + shift}-{stop + shift - 1}/{size}"
        elif status == 416:
            headers["Content-Range"] = f"bytes */{size}"
        for name, value in {**headers, **(extra or {}), **(faults.headers if bad else {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.send_body(file, body)

    def send_body(self, file: Path, body: bytes) -> None:
        faults = self.server_of.faults
        cut = faults.drop_after if file.suffix == ".safetensors" and faults.drops > 0 else None
        if cut is not None and cut < len(body):
            faults.drops -= 1
            body = body[:cut]
            self.close_connection = True
        self.server_of.sent_bytes[file.name] += len(body)
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Not on stderr."""


class HubHandler(Handler):
    """The two calls of the hub that a client makes: what is in a repository, and a file of a revision."""

    def serve(self, path: str) -> None:
        steps = path.strip("/").split("/")
        if steps[:2] == ["api", "models"]:
            self.describe(steps)
        elif steps[:3] == ["org", "tiny", "resolve"] and steps[3] in ("main", COMMIT):
            self.resolve("/".join(steps[4:]))
        else:
            self.missing("RepoNotFound")

    def describe(self, steps: list[str]) -> None:
        revision = steps[5] if len(steps) > 5 else "main"
        if steps[2:4] != ["org", "tiny"]:
            self.missing("RepoNotFound")
        elif revision not in ("main", COMMIT):
            self.missing("RevisionNotFound")
        else:
            root = self.server_of.folder
            siblings = [self.sibling(file, root) for file in sorted(root.rglob("*")) if file.is_file()]
            found = {"id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "siblings": siblings, "tags": []}
            self.answer(200, json.dumps(found).encode(), "application/json")

    def sibling(self, file: Path, root: Path) -> dict[str, object]:
        digest = etag_of(file)
        size = file.stat().st_size
        known: dict[str, object] = {"rfilename": file.relative_to(root).as_posix(), "size": size, "blobId": digest[:40]}
        if file.suffix == ".safetensors":
            known["lfs"] = {"sha256": digest, "size": size, "pointerSize": 134}
        return known

    def resolve(self, name: str) -> None:
        file = self.server_of.folder / name
        if file.is_file():
            self.send_file(file, {"X-Repo-Commit": COMMIT})
        else:
            self.missing("EntryNotFound")

    def missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


class _Quiet(ThreadingHTTPServer):
    """A server whose clients may hang up."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that had enough are no news; any other error goes on."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@contextmanager
def serving(folder: Path, handler: type[Handler] = Handler) -> Iterator[Server]:
    """A server of a folder, for as long as the block runs."""
    server = Server(folder)
    bound = type("Bound", (handler,), {"server_of": server})
    listening = _Quiet(("127.0.0.1", 0), bound)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{listening.server_address[1]}"
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()
