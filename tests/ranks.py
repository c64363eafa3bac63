"""Scenarios in several processes over gloo: every rank runs each of them, and raises if anything is wrong."""

import os
import traceback

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import forked
import torch
import torch.distributed as dist
from members import free_port

SECONDS = 120
_IMPORTED_BY = os.getpid()
_SCENARIOS = []


def scenario(function):
    _SCENARIOS.append(function)
    return function


def scenarios(*modules, kind=""):
    """Name to scenario, of those that the modules hold; of one kind, names start with it."""
    held = {module.__name__ for module in modules}
    found = (function for function in _SCENARIOS if function.__module__ in held)
    return {function.__name__: function for function in found if function.__name__.startswith(kind)}


def run(world, scenarios, *arguments):
    """Run scenarios in `world` processes; gives by name what each rank says of it: nothing if all is well."""
    queue = forked.CONTEXT.SimpleQueue()
    shared = (world, free_port(), queue, tuple(scenarios.values()), arguments)
    ranks = forked.start(_rank, *((rank, *shared) for rank in range(world)))
    for process in ranks:
        process.join(SECONDS)
        process.kill()
    said = {name: ["was not reached"] * world for name in scenarios}
    while not queue.empty():
        name, rank, text = queue.get()
        said[name][rank] = text
    return said


def _rank(rank, world, port, queue, scenarios, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    for function in scenarios:
        try:
            assert os.getpid() != _IMPORTED_BY, "every rank imports for itself"
            function(*arguments)
        except Exception:
            queue.put((function.__name__, rank, traceback.format_exc()))
            break  # the other ranks may be waiting for this one in a collective: no later one would match
        queue.put((function.__name__, rank, ""))
    else:
        dist.barrier()
    os._exit(0)  # what threads of libraries do at exit is not what is tested
