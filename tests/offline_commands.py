"""Runs commands, and prints how often each of them tried to reach the network: `offline_commands.py FOLDER [STEP]`.

Counted are the events of Python's own sockets, and what the kernel could not send because there is no network: run in
a namespace of its own (`unshare -rn`), that tells of libraries in other languages as well.
"""

import json
import os
import runpy
import socket
import sys
from collections import Counter
from pathlib import Path

EVENTS = Counter()
CALLS = ("connect", "sendto", "sendmsg", "getaddrinfo", "getnameinfo", "gethostbyname", "gethostbyaddr")


def _note(event, arguments):
    """Counts it; of sockets of this machine alone, a pair is how an event loop of asyncio wakes itself."""
    source, _, call = event.partition(".")
    if source == "socket" and (call in CALLS or (call == "__new__" and arguments[1] != socket.AF_UNIX)):
        EVENTS[event] += 1


def unsent():
    """Packets that this namespace had no way to send."""
    lines = Path("/proc/net/snmp").read_text().splitlines()
    names, numbers = (line.split()[1:] for line in lines if line.startswith("Ip:"))
    six = dict(line.split() for line in Path("/proc/net/snmp6").read_text().splitlines())
    return int(dict(zip(names, numbers, strict=True))["OutNoRoutes"]) + int(six["Ip6OutNoRoutes"])


def importing(folder):
    import minimax_jax

    for name in minimax_jax.__all__:
        getattr(minimax_jax, name)
    import torch_bridge

    for name in torch_bridge.__all__:
        getattr(torch_bridge, name)


def command(*arguments):
    def step(folder):
        sys.argv = ["minimax-jax", *(argument.replace("@", f"{folder}/") for argument in arguments)]
        try:
            runpy.run_module("minimax_jax", run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"{sys.argv} ended with {ended.code}") from ended

    return step


def reaching_out(folder):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto(b"x", ("192.0.2.1", 53))
        except OSError:
            return


# On the checkpoint and the prompt of README.md: its programs are compiled for both at once.
STEPS = {
    "import": importing,
    "synth": command("synth", "@hf", "--experts", "8"),
    "inspect": command("inspect", "@hf", "--json"),
    "convert": command("convert", "@hf", "@native"),
    "to orbax": command("convert", "@hf", "@orbax", "--to", "orbax"),
    "to dcp": command("convert", "@hf", "@dcp", "--to", "dcp"),
    "verify": command("verify", "@hf", "@native"),
    "certificate": command("verify", "@native", "--certificate", "@native/certificate.json"),
    "diff": command("diff", "@hf", "@native"),
    "report": command("report", "@hf", "-o", "@report.html"),
    "generate": command("generate", "@native", "--prompt-ids", "1,2,3"),
}
BITE = {"reaching out": reaching_out}


def main():
    folder, steps = Path(sys.argv[1]), BITE if sys.argv[2:] else STEPS
    alone = os.environ.get("ALONE") == "1"
    sys.addaudithook(_note)
    told = {}
    stdout, sys.stdout = sys.stdout, sys.stderr
    for name, step in steps.items():
        EVENTS.clear()
        before = unsent() if alone else 0
        step(folder)
        told[name] = dict(EVENTS) | ({"packets": unsent() - before} if alone else {})
    print(json.dumps(told), file=stdout)


main()
