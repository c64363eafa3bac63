"""A checkpoint onto devices: sharded arrays, or a model of them. Each process reads what its own devices hold.

    mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))
    model = load_model("MiniMax-M2", mesh=mesh, dtype=None)  # weights stay FP8

Host memory stays within a budget whatever the size of the model: a few experts at a time are read, cross to their
devices as they are stored, and are dequantised and grouped there into shards that are filled in place.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from minimax_jax.errors import JobError, LayoutError, Problem, raise_if
from minimax_jax.jobs.heap import give_back
from minimax_jax.jobs.left_out import warn_of
from minimax_jax.jobs.source import Source, open_source, require_own_layout
from minimax_jax.layout.config import MiniMaxConfig
from minimax_jax.leaves import Leaf, native_blocks
from minimax_jax.models.boxes import Box, box_of, whole
from minimax_jax.models.fill import Filler
from minimax_jax.models.load_plan import Unit, plan_units, require_budget, unit_bytes_of
from minimax_jax.models.minimax import MiniMaxForCausalLM
from minimax_jax.models.pieces import Goal, Home, goals
from minimax_jax.models.sharding import Rules, shardings
from minimax_jax.ops.checks import result_problems
from minimax_jax.ops.scaled import BlockScaled
from minimax_jax.progress import Progress, Ticker

DEFAULT_MEMORY_BYTES = 4 * 2**30
DEFAULT_WORKERS = 4

Listener: TypeAlias = Callable[[Progress], None]


def load(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    dtype: DTypeLike | None = jnp.bfloat16,
    stacked: bool = False,
    max_memory_bytes: int = DEFAULT_MEMORY_BYTES,
    workers: int = DEFAULT_WORKERS,
    ignore: Collection[str] = (),
    leave_out: Collection[str] = (),
    progress: Listener | None = None,
) -> dict[str, Leaf]:
    """Load a checkpoint as a native tree of sharded arrays.

    The numbers are those of `from_hf`, bit for bit, whatever the mesh. With several processes all of them call this;
    each reads the byte ranges of its own shards, once for all of its devices, and none waits for another. Where the
    devices of a process hold only some columns of a matrix as it is stored, that is a read for each row: let processes
    hold whole experts where reads are slow.

    Args:
        path: a checkpoint in either layout, in FP8, bf16 or f32; any place that `open_source` opens.
        mesh: the devices, of any number of processes; None: the default device.
        rules: which mesh axes each logical axis is split over; see `Rules` for the default.
        dtype: what FP8 weights are dequantised to and grouped experts cast to: bfloat16, float32 or float16. None
            keeps what is stored, FP8 as `BlockScaled`. Norms, embeddings and the router keep what they have.
        stacked: stack the layers, as `stack_layers` does, for a model that scans over them.
        max_memory_bytes: budget of host memory over what the process holds at the start and the arrays themselves.
        workers: threads.
        ignore: attributes of config.json to leave unread.
        leave_out: what the names of tensors to leave out begin with; as in `open_source`.
        progress: called on the calling thread after each unit of work, with bytes of this process.

    Returns:
        JAX arrays (or `BlockScaled`s of them) by native name, each with its `NamedSharding`.

    Raises:
        CheckpointError: as `open_source`; FormatError where the source changes or ends too early while it is read.
        JobError: a mesh and rules that do not fit the model, or a budget too small for one expert.
        LayoutError: an unsupported dtype.

    Examples:
        >>> mj.synthesize("MiniMax-M2")
        >>> mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> tree = mj.load("MiniMax-M2", mesh=mesh)
        >>> tree["model.layers.0.mlp.experts.down_projs"].sharding.spec
        P('expert', None, None)
    """
    source = _open(path, ignore, leave_out)
    warn_of(source.left_out)  # here, so that it points at the caller
    arrays = _arrays(source, mesh, rules, dtype, stacked)
    return _load(source, arrays, max_memory_bytes=max_memory_bytes, workers=workers, progress=progress)


def load_model(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    dtype: DTypeLike | None = jnp.bfloat16,
    stacked: bool = False,
    max_memory_bytes: int = DEFAULT_MEMORY_BYTES,
    workers: int = DEFAULT_WORKERS,
    ignore: Collection[str] = (),
    leave_out: Collection[str] = (),
    progress: Listener | None = None,
) -> MiniMaxForCausalLM:
    """Load a checkpoint as a Flax NNX model of sharded weights.

    Args:
        path: as in `load`, like all that is not named here.
        mesh: as in `load`, of `AxisType.Auto` axes.
        rules: as in `load`.
        dtype: as in `load`, and the dtype of activations; None keeps weights as they are stored, with activations in
            bfloat16.
        stacked: as in `load`: the model scans over its layers, and compiles in a fraction of the time.
        max_memory_bytes: as in `load`.
        workers: as in `load`.
        ignore: as in `load`.
        leave_out: as in `load`.
        progress: as in `load`.

    Raises:
        CheckpointError: as `load`; JobError for a mesh of other axes.

    Examples:
        >>> mj.synthesize("MiniMax-M2")
        >>> model = mj.load_model("MiniMax-M2", dtype=None, stacked=True)  # FP8 stays FP8
        >>> model.config.num_hidden_layers
        2
    """
    raise_if(_explicit_axes(mesh), JobError)
    source = _open(path, ignore, leave_out)
    warn_of(source.left_out)  # here, so that it points at the caller
    arrays = _arrays(source, mesh, rules, dtype, stacked)
    native = _load(source, arrays, max_memory_bytes=max_memory_bytes, workers=workers, progress=progress)
    return MiniMaxForCausalLM(source.config, native, dtype=jnp.bfloat16 if dtype is None else dtype)


def _open(path: str | Path, ignore: Collection[str], leave_out: Collection[str]) -> Source:
    source = open_source(path, ignore=ignore, leave_out=leave_out)
    require_own_layout(source)
    return source


@dataclass(frozen=True, kw_only=True)
class _Array:
    """One array of the tree that is made.

    Attributes:
        goals: what it is made of: one, or one for each layer that is stacked.
        sharding: its own.
        devices: the shards of this process by their box in each goal, and which of its devices hold them.
    """

    goals: tuple[Goal, ...]
    sharding: Sharding
    devices: Mapping[Box, Sequence[jax.Device]]

    @property
    def home(self) -> Home:
        return self.goals[0].home

    def finish(self, filler: Filler) -> jax.Array:
        first = self.goals[0]
        shards = [filler.finished(self.home, box, one, first.dtype) for box, own in self.devices.items() for one in own]
        shape = (*first.layers, *first.shape)
        return jax.make_array_from_single_device_arrays(shape, self.sharding, shards, dtype=first.dtype)


def _load(
    source: Source, arrays: Sequence[_Array], *, max_memory_bytes: int, workers: int, progress: Listener | None
) -> dict[str, Leaf]:
    wanted = {goal: tuple(array.devices) for array in arrays for goal in array.goals}
    units = plan_units(wanted, unit_bytes=unit_bytes_of(max_memory_bytes, workers))
    require_budget(units, max_memory_bytes, workers)
    devices = {(array.home, box): own for array in arrays for box, own in array.devices.items()}
    with source.reader() as reader:
        filler = Filler(reader, devices)
        _run(filler, units, workers, progress)
    made = {array.home: array.finish(filler) for array in arrays}
    return dict(_leaves([array.goals[0] for array in arrays], made))


def _arrays(
    source: Source, mesh: Mesh | None, rules: Rules | None, dtype: DTypeLike | None, stacked: bool
) -> list[_Array]:
    """The arrays of the whole tree."""
    raise_if([] if dtype is None else result_problems(dtype), LayoutError)
    where = _one_device(rules) if mesh is None else _on_mesh(source.config, mesh, rules, stacked)
    by_home: dict[Home, list[Goal]] = {}
    for goal in goals(source, None if dtype is None else np.dtype(dtype), stacked=stacked):
        by_home.setdefault(goal.home, []).append(goal)
    raise_if(_unlike_layers(by_home), LayoutError)
    shardings_of = {home: where(home) for home in by_home}
    return [
        _Array(goals=tuple(own), sharding=shardings_of[home], devices=_by_box(shardings_of[home], own[0]))
        for home, own in by_home.items()
    ]


def _unlike_layers(by_home: Mapping[Home, Sequence[Goal]]) -> Iterator[Problem]:
    for home, own in by_home.items():
        if own[0].layers and (len(own) != math.prod(own[0].layers) or len({goal.dtype for goal in own}) > 1):
            remedy = "give a dtype, or load it without stacking"
            yield Problem(what="layers differ in dtype: they cannot be stacked", key=home.name, remedy=remedy)


def _on_mesh(config: MiniMaxConfig, mesh: Mesh, rules: Rules | None, stacked: bool) -> Callable[[Home], Sharding]:
    plain = shardings(config, mesh, rules=rules, stacked=stacked)
    fp8 = shardings(config, mesh, rules=rules, stacked=stacked, scaled="F8_E4M3")

    def where(home: Home) -> Sharding:
        leaf = plain[home.name] if home.role == "weights" else fp8[home.name]
        own: Sharding = leaf if home.role == "weights" else leaf.values if home.role == "codes" else leaf.scale_inv
        return own

    return where


def _one_device(rules: Rules | None) -> Callable[[Home], Sharding]:
    if rules is not None:
        raise JobError(Problem(what="rules without a mesh", remedy="give the mesh as well"))
    (device,) = jnp.zeros(()).devices()  # where arrays go by default
    return lambda home: SingleDeviceSharding(device)


def _by_box(sharding: Sharding, goal: Goal) -> dict[Box, list[jax.Device]]:
    shape = (*goal.layers, *goal.shape)
    boxes: dict[Box, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        box = whole(shape) if index is None else box_of(index, shape)
        boxes.setdefault(box[len(goal.layers) :], []).append(device)
    return boxes


def _run(filler: Filler, units: Sequence[Unit], workers: int, progress: Listener | None) -> None:
    ticker = Ticker(sum(unit.read_bytes for unit in units), progress)
    with ThreadPoolExecutor(workers, thread_name_prefix="load") as pool, contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)  # the first error stops the rest
        futures = {pool.submit(filler.do, unit): unit for unit in units}
        for future in as_completed(futures):
            future.result()
            give_back(futures[future].memory_bytes)
            ticker.tick(futures[future].read_bytes)


def _leaves(made_of: Sequence[Goal], arrays: Mapping[Home, jax.Array]) -> Iterator[tuple[str, Leaf]]:
    """Arrays as leaves by name: codes and scales together."""
    for goal in made_of:
        array = arrays[goal.home]
        if goal.role == "weights":
            yield goal.name, array
        elif goal.role == "codes":
            (block, parts), scales = native_blocks(goal.entry), arrays[Home(goal.name, "scales")]
            yield goal.name, BlockScaled(values=array, scale_inv=scales, block=block, parts=parts)


def _explicit_axes(mesh: Mesh | None) -> Iterator[Problem]:
    if mesh is not None and set(mesh.axis_types) != {AxisType.Auto}:
        remedy = f"jax.make_mesh(..., axis_types=(AxisType.Auto,) * {len(mesh.axis_names)})"
        yield Problem(what="the model needs a mesh of Auto axes", got=str(mesh.axis_types), remedy=remedy)
