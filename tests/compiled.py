"""Compiled programs that tests keep in a folder: across workers, runs and processes, and across devices.

A program is known by its text, the options and the version of XLA; what XLA refuses is never kept. An entry that is not
whole, since another worker is writing it, is compiled again. JAX also tells programs apart by the device that they are
for, though their code is the same, and compiles what each of eight fake devices does by itself eight times; here, the
first device's is read for the others. That is inside of JAX: where it has no such function, it is as JAX does it.
"""

import functools

import jax
from jax._src import cache_key

_HASH = "_hash_serialized_compile_options"


def keep(folder):
    """Keep every program of this process in a folder, and take from there what it holds."""
    for name, value in settings(folder).items():
        jax.config.update(name, value)
    if hasattr(cache_key, _HASH):
        setattr(cache_key, _HASH, functools.partial(_hash_options, getattr(cache_key, _HASH)))


def settings(folder):
    """The settings of JAX that do so, but for the devices; none without a folder."""
    always = {"jax_persistent_cache_min_compile_time_secs": 0, "jax_persistent_cache_min_entry_size_bytes": -1}
    return {"jax_compilation_cache_dir": str(folder), **always} if folder else {}


def environment(folder):
    """What makes another process have these settings."""
    return {name.upper(): str(value) for name, value in settings(folder).items()}


def _hash_options(by_jax, into, options, strip_device_assignment=False):
    """As JAX does it, without the device of a program that runs on one."""
    devices = options.device_assignment
    alone = devices is not None and devices.replica_count() * devices.computation_count() == 1
    by_jax(into, options, strip_device_assignment=strip_device_assignment or alone)
