"""When the kernels on the host are taken, and where their results lie."""

import concurrent.futures
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import BF16, F32
from kernel_cases import assert_same, by_xla, require_kernels, scaled_experts, weights

from minimax_jax.errors import LayoutError
from minimax_jax.ops import host, host_matrices
from minimax_jax.ops.assemble import assemble

require_kernels()


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    monkeypatch.setenv(host.VARIABLE, "numba")


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_results_lie_where_the_arguments_do():
    tree = scaled_experts(np.random.default_rng(11), 2, 2, 16, 16, (8, 8))
    third = jax.devices()[3]
    committed = jax.device_put(tree, third)
    for one in (tree, committed):
        got, want = host_matrices.assemble(one, BF16), by_xla(assemble, one, BF16)
        assert got.devices() == want.devices()
        assert got.committed == want.committed
    with jax.default_device(jax.devices()[2]):
        assert host_matrices.assemble(tree, BF16).devices() == {jax.devices()[2]}


def test_results_do_not_change_with_their_arguments():
    array = np.ones((16, 16), np.float32)
    grouped = assemble([[array]], None)
    array[:] = 2
    assert np.all(np.asarray(grouped) == 1)


def test_large_results_are_taken_over_without_a_copy():
    memory = host.empty((3, 5), BF16)
    assert host.place_of([memory])(memory).unsafe_buffer_pointer() == memory.ctypes.data


def test_arrays_in_any_order_of_memory():
    array = weights(np.random.default_rng(12), F32, 24, 40)
    want = array.T[None]
    for same in (np.asfortranarray(array), np.repeat(array, 2, 1)[:, ::2]):
        assert np.array_equal(host_matrices.assemble([[same]], None), want)


def test_several_threads_at_a_time():
    trees = [scaled_experts(np.random.default_rng(seed), 4, 2, 256, 256, (128, 128)) for seed in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda tree: host_matrices.assemble(tree, BF16), trees))
    for tree, got in zip(trees, done, strict=True):
        assert_same(got, by_xla(assemble, tree, BF16))


# --- the choice ------------------------------------------------------------------------------------------------------


def test_backend_is_what_was_asked_for(monkeypatch):
    assert host.backend() == "numba"
    monkeypatch.setenv(host.VARIABLE, "xla")
    assert host.backend() == "xla"
    assert host_matrices.assemble([[np.zeros((8, 8), np.float32)]], None) is None
    monkeypatch.delenv(host.VARIABLE)
    assert host.backend() == "numba"


def test_little_work_is_not_worth_numba_unless_asked_for(monkeypatch):
    monkeypatch.delenv(host.VARIABLE)
    assert host_matrices.assemble([[np.zeros((8, 8), np.float32)]], None) is None
    assert host_matrices.assemble([[np.zeros((1024, 1024), np.float32)]], None) is not None


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv(host.VARIABLE, "fortran")
    with pytest.raises(LayoutError, match="fortran"):
        host.backend()


def in_a_process(script, **environment):
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
from minimax_jax.errors import LayoutError
from minimax_jax.ops import host
try:
    print(host.backend())
except LayoutError as error:
    print(error.problems[0].remedy)
"""


def test_without_numba_xla_is_taken():
    assert in_a_process(WITHOUT_NUMBA, **{host.VARIABLE: ""}) == ["xla"]
    assert "'minimax_jax[fast]'," in in_a_process(WITHOUT_NUMBA, **{host.VARIABLE: "numba"})


AS_ITSELF = """
from minimax_jax.errors import LayoutError
from minimax_jax.ops import host
try:
    print(host.backend())
except LayoutError as error:
    print("NUMBA_DISABLE_JIT" in error.problems[0].remedy)
"""


def test_where_numba_may_not_compile_xla_is_taken():
    """The kernels are made of instructions that Python cannot run."""
    assert in_a_process(AS_ITSELF, NUMBA_DISABLE_JIT="1", **{host.VARIABLE: ""}) == ["xla"]
    assert in_a_process(AS_ITSELF, NUMBA_DISABLE_JIT="1", **{host.VARIABLE: "numba"}) == ["True"]


def test_numba_is_not_imported_before_it_is_used():
    script = "import sys, minimax_jax.conversion; print('numba' in sys.modules)"
    assert in_a_process(script) == ["False"]


def test_without_a_place_for_a_cache_the_kernels_are_compiled_each_time():
    script = """
import numba.core.caching as caching
caching.CacheImpl._locator_classes = []
import numpy as np
from minimax_jax.ops import host_matrices
print(np.asarray(host_matrices.assemble([[np.arange(6, dtype=np.float32).reshape(2, 3)]], None)).ravel().tolist())
"""
    assert "".join(in_a_process(script)) == "[0.0,3.0,1.0,4.0,2.0,5.0]"
