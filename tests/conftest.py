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
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    if config.pluginmanager.hasplugin("cacheprovider"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("xla")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session")
def cfg():
    """The small config of the adapter's tests."""
    from helpers import config

    return config()


@pytest.fixture(scope="session")
def native(cfg):
    """The random checkpoint of `cfg` in torch, as NeMo's own adapter makes it native; not to be changed."""
    from nemo_oracle import checkpoint, nemo_adapter

    return nemo_adapter(cfg).from_hf(checkpoint(cfg))
