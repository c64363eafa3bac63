"""Every test runs with strict dtype promotion, no implicit rank promotion, and eight fake devices.

Programs that XLA has compiled before, in another worker or in an earlier run, are taken from pytest's cache: most of
the time of these tests goes into compiling. A program is known by its text, the options and the version of XLA; what
XLA refuses is never kept. An entry that is not whole, since another worker is writing it, is compiled again.
`pytest --cache-clear` forgets them. Of the other processes that tests start, the commands of pages share it.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    if config.pluginmanager.hasplugin("cacheprovider"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("xla")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
