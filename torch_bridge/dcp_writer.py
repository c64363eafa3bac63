"""How torch is had to write a checkpoint of tensors that are made one after the other, while it writes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from minimax_jax.errors import JobError, Problem
from minimax_jax.io.shards import DEFAULT_SHARD_BYTES
from minimax_jax.progress import Ticker
from torch_bridge.arrays import TORCH
from torch_bridge.chunks import Chunk, Unit


class Planner(DefaultSavePlanner):
    """Plans what units will give, and takes it from them when it is to be written, in the same order."""

    def __init__(self, units: list[Unit], made: Iterator[tuple[Unit, list[torch.Tensor]]], ticker: Ticker):
        super().__init__()
        self._units = units
        self._tensors = _one_by_one(made, ticker)

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """There is no state dict to look at."""

    def create_local_plan(self) -> SavePlan:
        """One item for each chunk."""
        items = [_item(chunk) for unit in self._units for chunk in unit.chunks]
        return SavePlan(items, planner_data={item.index.fqn: (item.index.fqn,) for item in items})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan is kept as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The next tensor, which is that of `write_item`."""
        chunk, tensor = next(self._tensors)
        if _item(chunk).index != write_item.index:
            raise JobError(Problem(what="torch asks for tensors in another order than planned", key=chunk.whole.key))
        return tensor


class Nameless(FileSystemWriter):
    """A writer of files that say neither where they were written nor when: the same tensors are the same bytes."""

    def storage_meta(self) -> StorageMeta:
        """Nothing is told."""
        return StorageMeta()


class Files(Nameless):
    """A writer of files of bounded size, which writes them in the order of the plan, on the calling thread."""

    def __init__(self, folder: Path):
        super().__init__(folder, thread_count=1, per_thread_copy_ahead=0)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write some items after the other to files of their own."""
        results: list[WriteResult] = []
        for number, items in enumerate(_by_file(plan.items)):
            prefix = dataclasses.replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            written = super().write_data(dataclasses.replace(plan, items=items, storage_data=prefix), planner)
            results += written.value()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _one_by_one(
    made: Iterator[tuple[Unit, list[torch.Tensor]]], ticker: Ticker
) -> Iterator[tuple[Chunk, torch.Tensor]]:
    for unit, tensors in made:
        ticker.tick(unit.read_bytes)
        yield from zip(unit.chunks, tensors, strict=True)


def _item(chunk: Chunk) -> WriteItem:
    offsets = torch.Size([chunk.first, *[0] * (len(chunk.shape) - 1)])
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(chunk.shape)),
        properties=TensorProperties(dtype=TORCH[chunk.whole.dtype]),
        size=torch.Size(chunk.whole.shape),
    )
    return WriteItem(index=MetadataIndex(chunk.whole.key, offsets), type=WriteItemType.SHARD, tensor_data=data)


def _by_file(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    group, filled = list[WriteItem](), 0
    for item in items:
        data = cast(TensorWriteData, item.tensor_data)
        nbytes = data.chunk.sizes.numel() * data.properties.dtype.itemsize
        if group and filled + nbytes > DEFAULT_SHARD_BYTES:
            yield group
            group, filled = [], 0
        group.append(item)
        filled += nbytes
    yield group
