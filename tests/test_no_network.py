"""Nothing goes to the network unasked: neither from tests, nor from the commands."""

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import compiled
import fsspec
import jax
import pytest
from command_line import process
from huggingface_hub import constants
from huggingface_hub.utils import _detect_agent
from no_network import PATH, is_here, taken
from servers import serving

FAR = "192.0.2.1"  # of the block that RFC 5737 keeps for documents: nobody has it
OFFLINE = Path(__file__).parent / "offline_commands.py"


@functools.cache
def namespace():
    """What runs a command in a network of its own, without a way out; empty where that is not allowed."""
    if shutil.which("unshare") and subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0:
        return ("unshare", "-rn")
    return ()


def offline(*arguments):
    own = namespace()
    places = [place for place in os.environ["PYTHONPATH"].split(os.pathsep) if place != str(PATH)]  # no guard there
    environment = os.environ | {"ALONE": str(int(bool(own))), "PYTHONPATH": os.pathsep.join(places), "XLA_FLAGS": ""}
    environment |= compiled.environment(jax.config.jax_compilation_cache_dir)
    command = [*own, sys.executable, OFFLINE, *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), {"packets": 0} if own else {}


# ---- the guard of these tests


def datagram(address):
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", address)


@pytest.mark.parametrize(
    "reach",
    [
        lambda: socket.create_connection((FAR, 80), 1),
        lambda: datagram((FAR, 53)),
        lambda: datagram(("2001:db8::1", 53)),
        lambda: socket.getaddrinfo("example.org", 443),
        lambda: socket.gethostbyname("example.org"),
        lambda: socket.gethostbyaddr(FAR),
        lambda: socket.getnameinfo((FAR, 53), 0),
        lambda: urllib.request.urlopen(f"http://{FAR}/", timeout=1),
        lambda: fsspec.filesystem("http").cat_file(f"http://{FAR}/file"),
    ],
)
def test_who_reaches_out_gets_an_error_and_is_written_down(reach):
    with pytest.raises(Exception, match=r"socket\.|192\.0\.2\.1"):
        reach()
    assert taken() and not taken()


def test_it_is_written_down_where_a_library_makes_nothing_of_it(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://{FAR}")
    monkeypatch.setattr(_detect_agent, "_registry", None)
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", "/nowhere")
    assert _detect_agent.detect_agent() is None
    assert taken()


CODE = f"import socket; socket.create_connection(({FAR!r}, 80), 1)"


@pytest.mark.parametrize("code", [CODE, f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CODE!r}])"])
def test_a_process_that_a_test_starts_cannot_either_nor_one_of_its_own(code):
    assert "NetworkUsedError" in process(sys.executable, "-c", code).stderr
    (line,) = taken()
    assert FAR in line


def test_a_test_that_hides_it_fails(tmp_path):
    lines = ["import contextlib, socket", "def test_hidden():", "    with contextlib.suppress(OSError):"]
    (tmp_path / "test_hidden.py").write_text("\n".join([*lines, f"        socket.create_connection(({FAR!r}, 80), 1)"]))
    places = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", "-p", "no:xdist", tmp_path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": places},
    )
    assert done.returncode == 1 and "1 passed, 1 error" in done.stdout, done.stdout
    assert FAR in done.stdout


def test_this_machine_can_be_reached(tmp_path):
    (tmp_path / "file").write_bytes(b"here")
    with serving(tmp_path) as server:
        assert urllib.request.urlopen(f"{server.url}/file").read() == b"here"
    assert all(map(is_here, ("127.0.0.1", "127.9.9.9", "::1", "localhost", b"127.0.0.1", None, "0.0.0.0")))
    assert not any(map(is_here, (FAR, "10.0.0.1", "169.254.169.254", "fe80::1%eth0", "example.org", "::ffff:8.8.8.8")))


# ---- the commands


def test_no_import_and_no_command_opens_a_socket_or_asks_for_a_name(tmp_path):
    found, none = offline(tmp_path)
    assert found == dict.fromkeys(found, none) and len(found) == 11


def test_one_that_did_would_be_seen(tmp_path):
    found, none = offline(tmp_path, "bite")
    seen = found["reaching out"]
    assert seen["socket.__new__"] == seen["socket.sendto"] == 1 and seen.get("packets") == (1 if none else None)
