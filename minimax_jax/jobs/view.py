"""A checkpoint of either layout, looked at in its Hugging Face form, some experts or some rows at a time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from minimax_jax.io.reader import Reader
from minimax_jax.jobs.compare import Array, Weight
from minimax_jax.jobs.read import read_leaf, read_rows
from minimax_jax.jobs.source import Source
from minimax_jax.layout.specs import Entry
from minimax_jax.layout.table import SCALE_SUFFIX
from minimax_jax.leaves import emit
from minimax_jax.ops.workspace import empty


class View:
    """A checkpoint seen in the Hugging Face form, whatever its layout."""

    def __init__(self, source: Source, reader: Reader):
        self.source = source
        self.reader = reader

    def tensors(self, native: str, experts: slice) -> dict[str, Array]:
        """The Hugging Face tensors of some experts of a block-scaled entry; in the thread's workspace, if any."""
        entry = self.source.survey.specs.by_native[native].narrow(experts)
        if self.source.survey.layout == "hf":
            infos = self.source.checkpoint.tensors
            return {spec.key: self.reader.read(infos[spec.key], empty=empty) for spec in self.source.specs(entry)}
        leaf = read_leaf(self.source, self.reader, entry, experts.start)
        return {key: np.asarray(tensor) for key, tensor in emit(entry, leaf, None).items()}

    def weight(self, key: str, tensors: Mapping[str, Array]) -> Weight:
        """One of the weights in what `tensors` returned."""
        scales = tensors.get(key + SCALE_SUFFIX)
        return Weight(values=tensors[key], scales=scales, block=self.source.config.block)

    def rows(self, entry: Entry, start: int, stop: int) -> Array:
        """Rows of the one tensor of an entry that is not block-scaled."""
        return read_rows(self.source, self.reader, entry, start, stop)
