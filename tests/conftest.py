"""Every test runs with strict dtype promotion, no implicit rank promotion, eight fake devices, and no network.

Programs that XLA has compiled before, in another worker or in an earlier run, are taken from pytest's cache: most of
the time of these tests goes into compiling (see `compiled.py`). `pytest --cache-clear` forgets them. Of the other
processes that tests start, the commands of pages and those that work as a group share it.
"""

import gc
import os
import shutil

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads else spin on processors that other tests need

import compiled
import jax
import no_network
import pytest

no_network.forbid_everywhere()

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    if config.pluginmanager.hasplugin("cacheprovider"):
        compiled.keep(config.cache.mkdir("xla"))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What the imports make stays to the end: no search for garbage looks at it, each of which would take a second."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """Nor does any look at what a module of tests leaves behind, such as compiled programs: that is searched once."""
    result = yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()
    return result


@pytest.fixture(autouse=True)
def no_network_is_used():
    """Fails a test that tried to leave this machine, or that started a process that did."""
    yield
    assert no_network.taken() == []


# Checkpoints that tests of several modules read, and none changes: made once in each worker, when first asked for.


@pytest.fixture(scope="session")
def cfg():
    """The small config of the adapter's tests."""
    from helpers import config

    return config()


@pytest.fixture(scope="session")
def native(cfg):
    """The random checkpoint of `cfg` in torch, as NeMo's own adapter makes it native."""
    from nemo_oracle import checkpoint, nemo_adapter

    return nemo_adapter(cfg).from_hf(checkpoint(cfg))


@pytest.fixture(scope="session")
def odd():
    """A config of sizes that are no multiples of a block, nor are their halves."""
    from helpers import config

    return config(num_local_experts=4)


@pytest.fixture(scope="session")
def torch_sources(odd, tmp_path_factory):
    """A folder of checkpoints of `odd` in every form, and their Hugging Face tensors."""
    from torch_load_cases import write_all

    folder = tmp_path_factory.mktemp("odd")
    return folder, write_all(folder, odd)


@pytest.fixture(scope="session")
def torch_even(tmp_path_factory):
    """A checkpoint that NeMo and transformers can both load, and its config."""
    import folders
    from helpers import config, random_hf
    from torch_modules import SIZES

    cfg = config(**SIZES)
    return folders.write(tmp_path_factory.mktemp("even") / "fp8", random_hf(cfg), cfg), cfg


@pytest.fixture(scope="session")
def orbax_source(tmp_path_factory):
    """An FP8 checkpoint in several files; among its tensors, one that is all zeros."""
    from orbax_cases import synthesize

    return synthesize(tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture(scope="session")
def orbax_written(orbax_source, tmp_path_factory):
    """`orbax_source` in Orbax: folders by the dtype of its block-scaled weights."""
    from orbax_cases import write_all

    return write_all(orbax_source, tmp_path_factory.mktemp("written"))


@pytest.fixture(scope="session")
def forms(tmp_path_factory):
    """A folder of one model in every form that can be compared."""
    from form_cases import write_all

    return write_all(tmp_path_factory.mktemp("forms"))


@pytest.fixture(scope="session")
def certified(tmp_path_factory):
    """A checkpoint in three forms, and the certificates of two of them."""
    from certified_cases import make

    return make(tmp_path_factory.mktemp("certified"))


@pytest.fixture
def certified_copy(certified, tmp_path):
    """Copies one of them, to be changed."""
    return lambda name: shutil.copytree(certified / name, tmp_path / name)


@pytest.fixture(scope="session")
def made(served):
    """What commands are run on. Modules that want other checkpoints have a fixture of this name."""
    return served


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """A checkpoint in several files, and one converted from it: what servers of tests hold."""
    from remote_cases import make

    return make(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def served_hf(served):
    """The first of them alone."""
    return served / "hf"


@pytest.fixture
def web(served):
    """A web server of them."""
    from servers import serving

    with serving(served) as server:
        yield server
