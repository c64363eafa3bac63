import ctypes
import threading

import jax
import ml_dtypes
import numpy as np
import pytest
from kernel_cases import require_kernels

from minimax_jax.io import files
from minimax_jax.jobs.run import Report
from minimax_jax.ops import host, host_matrices, workspace
from minimax_jax.ops.scaled import BlockScaled
from minimax_jax.ops.workspace import ALIGNMENT_BYTES, Workspace

BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)


def test_pieces_are_aligned_and_apart_and_taken_again_in_the_next_context():
    mine = Workspace(1000)
    with mine.holding():
        first, second = workspace.empty((3, 5), np.float32), workspace.empty((7,), BF16)
        assert (first.shape, first.dtype, second.shape, second.dtype) == ((3, 5), np.float32, (7,), BF16)
        assert not np.shares_memory(first, second)
        assert first.ctypes.data % ALIGNMENT_BYTES == second.ctypes.data % ALIGNMENT_BYTES == 0
    with mine.holding():
        assert workspace.empty((60,), np.uint8).ctypes.data == first.ctypes.data


def test_without_room_memory_is_fresh():
    mine = Workspace(1000)
    with mine.holding():
        whole, more = workspace.empty((1000,), np.uint8), workspace.empty((1,), np.uint8)
        assert not np.shares_memory(whole, more)
        assert more.ctypes.data % ALIGNMENT_BYTES == 0


def test_a_workspace_is_active_in_its_context_and_thread_alone():
    mine, seen = Workspace(10), []
    with pytest.raises(KeyError), mine.holding():
        assert workspace.active() is mine
        other = threading.Thread(target=lambda: seen.append(workspace.active()))
        other.start()
        other.join()
        raise KeyError
    assert seen == [None] and workspace.active() is None


def test_results_in_a_workspace_are_those_outside_of_it_by_this_thread_and_without_jax(monkeypatch):
    require_kernels()
    monkeypatch.setenv(host.VARIABLE, "numba")
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (2, 3, 40, 24), np.uint8).view(FP8)
    scales = rng.uniform(0.5, 2, (2, 3, 5, 3)).astype(np.float32)
    experts = [
        [BlockScaled(values=v, scale_inv=s, block=(8, 8)) for v, s in zip(*pair, strict=True)]
        for pair in zip(codes, scales, strict=True)
    ]
    for dtype in (BF16, None):
        want = host_matrices.assemble(experts, dtype)
        with Workspace(2**20).holding():
            monkeypatch.setattr(jax, "device_put", None)
            monkeypatch.setattr(host, "ThreadPoolExecutor", None)
            got = host_matrices.assemble(experts, dtype)
            monkeypatch.undo()
            monkeypatch.setenv(host.VARIABLE, "numba")
            for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                assert type(one) is np.ndarray and one.flags.c_contiguous
                assert np.array_equal(host.units(one), host.units(other))


def test_a_flush_that_the_system_does_not_offer_is_left_out(monkeypatch, tmp_path):
    with (tmp_path / "file").open("wb") as stream:
        stream.write(b"some")
        files.start_flush(stream.fileno(), 0, 4)
        files._sync_file_range.cache_clear()
        monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
        files.start_flush(stream.fileno(), 0, 4)
    files._sync_file_range.cache_clear()


def test_a_report_says_which_code_did_the_work(monkeypatch, tmp_path):
    numbers = {"tensors": 0, "read_bytes": 0, "written_bytes": 0, "seconds": 0.0, "kept_scales": 0}
    monkeypatch.setenv(host.VARIABLE, "xla")
    assert Report(destination=tmp_path, fresh_scales=(), **numbers).kernels == "xla"
