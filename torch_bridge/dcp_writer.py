"""How torch is had to save what `dcp_items` writes: it plans, and writes the table of contents."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from minimax_jax.io import points
from torch_bridge.arrays import TORCH
from torch_bridge.chunks import Chunk, Unit
from torch_bridge.dcp_items import Spot


class Planner(DefaultSavePlanner):
    """Plans what units will give: one item for each chunk, in the same order."""

    def __init__(self, units: Sequence[Unit]):
        super().__init__()
        self._units = units

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


class Nameless(FileSystemWriter):
    """A writer of files that say neither where they were written nor when: the same tensors are the same bytes."""

    def storage_meta(self) -> StorageMeta:
        """Nothing is told."""
        return StorageMeta()


class Files(Nameless):
    """A writer that has the items of a `Planner` written by somebody else, and says where they lie."""

    def __init__(self, folder: Path, write: Callable[[], Sequence[Spot]]):
        """Ready; `write` writes all items, and is called once."""
        super().__init__(folder)
        self._write = write

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Have the items written."""
        future: Future[list[WriteResult]] = Future()
        spots = (spot._replace(file=sys.intern(spot.file)) for spot in self._write())  # pickle tells equal from same
        pairs = zip(plan.items, spots, strict=True)
        future.set_result([WriteResult(item.index, spot.length, _StorageInfo(*spot)) for item, spot in pairs])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the table of contents, which comes last."""
        points.reach("before the index")
        super().finish(metadata, results)


def _item(chunk: Chunk) -> WriteItem:
    offsets = torch.Size([chunk.first, *[0] * (len(chunk.shape) - 1)])
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(chunk.shape)),
        properties=TensorProperties(dtype=TORCH[chunk.whole.dtype]),
        size=torch.Size(chunk.whole.shape),
    )
    return WriteItem(index=MetadataIndex(chunk.whole.key, offsets), type=WriteItemType.SHARD, tensor_data=data)
