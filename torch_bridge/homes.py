"""Where the tensors of the layout live in a torch module: by name, how they lie on ranks, and which way round.

NeMo AutoModel's module holds the native form: grouped matrices transposed, `[experts, cols, parts*rows]`. That of
transformers holds them as they are stored, one below the other: `[experts, parts*rows, cols]`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from minimax_jax.errors import LayoutError, Problem, raise_if
from minimax_jax.layout.forms import module_names
from minimax_jax.layout.specs import Entry
from torch_bridge.kernels import WEIGHTS
from torch_bridge.mesh import Layout, Region, experts_layout, layout_of, local_of, region_of

_EXTRA_STATE = "_extra_state"
"""Last step of the names of state that is not a tensor of the model, such as that of NeMo's FP8 kernels."""


class Slot(NamedTuple):
    """A matrix of an expert, or the part of it that this rank holds.

    Attributes:
        part: which of the expert's matrices.
        rows: rows that are held, of the matrix as Hugging Face stores it.
        cols: columns that are held.
        place: `[rows, cols]`; a view of the module's storage.
    """

    part: int
    rows: range
    cols: range
    place: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Home:
    """One tensor of a module, or some rows or experts of it.

    Attributes:
        name: its name in the module.
        entry: what belongs in it.
        turned: whether its matrices are grouped in the native form: transposed.
        layout: how the whole tensor lies on ranks; None where each rank holds all of it.
        shape: of the whole tensor, on all ranks.
        region: what of it `local` is, in global coordinates.
        local: this rank's own storage.
    """

    name: str
    entry: Entry
    turned: bool
    layout: Layout | None
    shape: tuple[int, ...]
    region: Region
    local: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Size in bytes of the whole tensor, on all ranks."""
        return math.prod(self.shape) * self.local.itemsize

    @property
    def span(self) -> range:
        """What is held of the axis along which the matrices of an expert stand one behind the other."""
        return self.region[2 if self.turned else 1]

    @property
    def cols(self) -> range:
        """What is held of the columns of each matrix."""
        return self.region[1 if self.turned else 2]

    @property
    def whole_parts(self) -> bool:
        """Whether all matrices of an expert are held alike."""
        return self.entry.parts == 1 or len(self.span) == self.entry.parts * self.entry.part_shape[0]

    def narrow(self, start: int, stop: int) -> Home:
        """Rows, or experts, `start` to `stop` of what this rank holds."""
        region = (self.region[0][start:stop], *self.region[1:])
        return dataclasses.replace(self, region=region, local=self.local[start:stop])

    def batches(self, at_once: int) -> Iterator[Home]:
        """What this rank holds, so many rows, or experts, at a time; nothing where it holds nothing."""
        if self.local.numel():
            yield from (self.narrow(at, at + at_once) for at in range(0, len(self.local), at_once))

    def slots(self, here: int) -> Iterator[Slot]:
        """The matrices of the expert at `here` of `local`."""
        local, rows = self.local[here], self.entry.part_shape[0]
        for part in range(self.entry.parts):
            held = range(max(self.span.start, part * rows), min(self.span.stop, (part + 1) * rows))
            if held:
                start, stop = held.start - self.span.start, held.stop - self.span.start
                place = local[:, start:stop].T if self.turned else local[start:stop]
                yield Slot(part, range(held.start - part * rows, held.stop - part * rows), self.cols, place)


def find_homes(
    model: nn.Module, entries: Iterable[Entry], *, device_mesh: DeviceMesh | None = None, partial: bool = False
) -> list[Home]:
    """The home of every entry in a module of NeMo's form or of transformers'.

    Args:
        model: its parameters and persistent buffers count; of tensors that share their storage, one must be an entry's.
        entries: of the whole model, under their published names.
        device_mesh: of NeMo's `ep`, `ep_shard` and `ep_replicate`: where grouped experts are plain tensors of the size
            of this rank's part, they are taken for that. DTensors say themselves how they lie.
        partial: whether the module may lack tensors, as one stage of a pipeline does.

    Raises:
        LayoutError: everything that is wrong: tensors that only one side has, of another shape, of a dtype that cannot
            hold weights, without memory, sharded in no plain rectangles, or one storage for two entries.
    """
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(_EXTRA_STATE)}
    experts = None if device_mesh is None else experts_layout(device_mesh)
    named = {_name(entry, tensors): entry for entry in entries}
    problems: list[Problem] = []
    found: list[Home] = []
    for name, entry in named.items():
        if name in tensors:
            try:
                found.append(_home(name, entry, tensors[name], experts if entry.row.grouped else None))
            except LayoutError as error:
                problems += (dataclasses.replace(problem, key=name) for problem in error.problems)
        elif not partial:
            problems.append(Problem(what="the module has no such tensor", key=name))
    problems += _shared(found)
    problems += _unknown({name: tensor for name, tensor in tensors.items() if name not in named}, found)
    raise_if(problems, LayoutError)
    return found


def _name(entry: Entry, tensors: Mapping[str, torch.Tensor]) -> str:
    native, other = module_names(entry.row, entry.layer)
    return other if other in tensors else native


def _home(name: str, entry: Entry, tensor: torch.Tensor, experts: Layout | None) -> Home:
    turned = entry.row.grouped and name == module_names(entry.row, entry.layer)[0]
    shape = entry.shape if turned or not entry.row.grouped else (entry.shape[0], *entry.shape[:0:-1])
    layout, region, expected = layout_of(tensor), region_of(tensor), shape
    if layout is None and experts is not None and tuple(tensor.shape) != shape:
        layout, region = experts, experts.region(shape)
        expected = tuple(len(part) for part in region)
    raise_if(_problems(tensor, expected), LayoutError)
    return Home(
        name=name,
        entry=entry,
        turned=turned,
        layout=layout,
        shape=shape,
        region=region,
        local=local_of(tensor).detach(),
    )


def _problems(tensor: torch.Tensor, expected: tuple[int, ...]) -> Iterator[Problem]:
    if tuple(tensor.shape) != expected:
        yield Problem(what="a tensor of another shape", expected=str(list(expected)), got=str(list(tensor.shape)))
    if tensor.dtype not in WEIGHTS:
        dtypes = " or ".join(map(str, WEIGHTS))
        yield Problem(what="a dtype that cannot hold weights", expected=dtypes, got=str(tensor.dtype))
    if tensor.is_meta:
        yield Problem(what="a tensor without memory", got="the meta device", remedy="call model.to_empty(device=...)")


def _shared(found: Iterable[Home]) -> Iterator[Problem]:
    """A problem for each tensor whose storage is another's home already."""
    owners: dict[int, str] = {}
    for home in found:
        if home.local.numel():
            owner = owners.setdefault(home.local.data_ptr(), home.name)
            if owner != home.name:
                remedy = "the config does not tie them: untie them in the module, or set tie_word_embeddings"
                yield Problem(what="one storage for two tensors", key=home.name, got=f"that of {owner}", remedy=remedy)


def _unknown(tensors: Mapping[str, torch.Tensor], found: Iterable[Home]) -> Iterator[Problem]:
    """A problem for each of the tensors that is not tied to a home."""
    storages = {home.local.data_ptr() for home in found if home.local.numel()}
    for name, tensor in tensors.items():
        if local_of(tensor).data_ptr() not in storages:
            got = f"{tensor.dtype} {list(tensor.shape)}"
            yield Problem(what="a tensor of the module that no checkpoint has", key=name, got=got)
