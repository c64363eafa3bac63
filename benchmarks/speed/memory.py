"""Contestants in memory: dequantise and group, ungroup and quantise."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import minimax_jax as mj
from benchmarks.speed import bounds, peers
from benchmarks.speed.cases import BF16, FP8, Case, require_same
from benchmarks.speed.rounds import Contestant, Role
from minimax_jax.layout.specs import Entry
from minimax_jax.leaves import emit, load
from minimax_jax.ops.workspace import Workspace

DEQUANTISE, QUANTISE = "dequantise + group", "ungroup + quantise"
STREAM, STREAM_BACK = "memory stream: read 1 byte, write 2", "memory stream: read 2 bytes, write 1"
SINGLE_PASS, REUSED, FRESH = "single pass, a plain loop", "minimax_jax, reused buffers", "minimax_jax, fresh outputs"
RANDOM_CODES = "minimax_jax, reused buffers, weights of random codes"
FRESH_BACK, NEMO, TORCH = "minimax_jax, fresh outputs", "NeMo AutoModel from_hf", "torch, vectorised"

_WORKSPACE_BYTES = 64 * 2**20
_POOL = ThreadPoolExecutor(2)
_THREAD = threading.local()
Result = dict[str, Any]


def contestants(case: Case, few: Case) -> Iterator[Contestant]:
    """All of both sections; peers get the `few` experts."""
    one = functools.partial(_contestant, DEQUANTISE, case, "native")
    yield one(STREAM, "bound", bounds.stream(case, widen=True), check=None)
    yield one(SINGLE_PASS, "bound", bounds.single_pass(case))
    yield one(REUSED, "ours", functools.partial(in_workspaces, _dequantise, case), check=_check_dequantised)
    yield one(FRESH, "ours", lambda: jax.block_until_ready(mj.from_hf(case.tree, case.config, partial=True)))
    slow = functools.partial(_contestant, DEQUANTISE, few, "native", role="peer")
    yield slow(NEMO, run=lambda: peers.to_numpy(peers.nemo_from_hf(few)()))
    untransposed = {name: leaf.swapaxes(1, 2) for name, leaf in few.native.items()}
    yield slow(
        "transformers Fp8Dequantize + merge (no transpose)",
        run=peers.transformers_from_hf(few),
        check=lambda _, got: require_same(peers.to_numpy(got), untransposed, "transformers"),
    )
    yield slow(TORCH, run=lambda: peers.to_numpy(peers.torch_from_hf(few)()))
    yield slow("numpy + ml_dtypes", run=peers.numpy_from_hf(few))
    yield from _back(case, few)


def _back(case: Case, few: Case) -> Iterator[Contestant]:
    one, slow = (functools.partial(_contestant, QUANTISE, which, "quantized") for which in (case, few))
    native = {name: jnp.asarray(leaf) for name, leaf in case.weights.items()}
    yield one(STREAM_BACK, "bound", bounds.stream(case, widen=False), check=None)
    for name, weights, want in ((REUSED, "weights", "quantized"), (RANDOM_CODES, "native", "requantized")):
        quantise = functools.partial(_quantise, weights)
        check = functools.partial(_check_quantised, quantise, want)
        yield one(name, "ours", functools.partial(in_workspaces, quantise, case), check=check)
    back = functools.partial(mj.to_hf, native, case.config, quantization=True, partial=True)
    yield one(FRESH_BACK, "ours", lambda: jax.block_until_ready(back()))
    yield slow(TORCH, "peer", lambda: peers.to_numpy(peers.torch_to_hf(few)()))
    yield slow("numpy + ml_dtypes", "peer", peers.numpy_to_hf(few), check=None)


def _same(want: str, case: Case, got: Any) -> None:
    require_same(got, getattr(case, want), "result")


def _contestant(
    section: str,
    case: Case,
    want: str,
    name: str,
    role: Role,
    run: Callable[[], object],
    check: Callable[[Case, Any], object] | str | None = "",
) -> Contestant:
    """One that works on the experts of a case; by default, its result has to be `want` of the case."""
    checks = functools.partial(_same, want) if check == "" else check or (lambda case, got: None)
    return Contestant(
        section=section,
        name=name,
        role=role,
        nbytes=case.fp8_bytes,
        run=run,
        check=functools.partial(checks, case),
        experts=case.experts,
    )


def in_workspaces(
    convert: Callable[[Case, Entry, int], Result], case: Case, keep: Callable[[Result], object] = lambda result: None
) -> None:
    """Convert expert by expert on two threads, as jobs do: each result is overwritten by the thread's next."""

    def one(task: tuple[Entry, int]) -> None:
        if not hasattr(_THREAD, "workspace"):
            _THREAD.workspace = Workspace(_WORKSPACE_BYTES)
        with _THREAD.workspace.holding():
            keep(convert(case, *task))

    list(_POOL.map(one, [(entry, expert) for entry in case.entries for expert in range(entry.experts)]))


def _dequantise(case: Case, entry: Entry, expert: int) -> Result:
    narrow = entry.narrow(slice(expert, expert + 1))
    return {entry.native: (expert, load(narrow, case.tree, jnp.bfloat16))}


def _quantise(weights: str, case: Case, entry: Entry, expert: int) -> Result:
    narrow = entry.narrow(slice(expert, expert + 1))
    return emit(narrow, getattr(case, weights)[entry.native][expert : expert + 1], FP8)


def _check_dequantised(case: Case, _: object) -> None:
    kept = {name: np.empty(leaf.shape, BF16) for name, leaf in case.native.items()}

    def keep(result: Result) -> None:
        for name, (expert, leaf) in result.items():
            kept[name][expert] = np.asarray(leaf)[0]

    in_workspaces(_dequantise, case, keep)
    require_same(kept, case.native, REUSED)


def _check_quantised(quantise: Callable[[Case, Entry, int], Result], want: str, case: Case, _: object) -> None:
    kept: Result = {}
    in_workspaces(quantise, case, lambda result: kept.update({key: np.array(leaf) for key, leaf in result.items()}))
    _same(want, case, kept)
