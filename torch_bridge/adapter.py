"""NeMo AutoModel's state-dict adapter for MiniMax-M2: the same interface, on the kernels and the layout of minimax_jax.

What NeMo does right comes out bit for bit. What differs, and why:

- `to_hf(quantization=True)` derives real block scales. NeMo's scales of one are only good to be overwritten by a
  loader: `load_destinations` makes those, and `for_checkpoint_load=True` asks for them.
- FP8 without scales, scales without their weight, an incomplete grid of experts and misnamed experts are errors.
- Block scales are found by global row and column, so that dequantisation is right wherever a shard begins.
- Experts that do not divide among ranks lie as DTensor's `Shard(0)` has them, and so do the parameters they load into.
- Nothing is remembered from one call to the next: the prefix of a name is that of the name it came from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Self

import torch
from torch.distributed.device_mesh import DeviceMesh

from minimax_jax.errors import ConfigError, LayoutError, Problem, raise_if
from minimax_jax.layout.table import NON_QUANTIZED_KEY_PATTERNS, SCALE_SUFFIX, should_quantize_key
from torch_bridge import export, matrices, nemo
from torch_bridge.experts import Filling, Part, fill
from torch_bridge.fp8 import WEIGHTS
from torch_bridge.mesh import cut, experts_layout, local_of, whole
from torch_bridge.names import LORA, NATIVE_EXPERTS, Names, Sizes
from torch_bridge.plan import Group, native_problems, plan, scaled_weights

__all__ = ["NON_QUANTIZED_KEY_PATTERNS", "MiniMaxM2StateDictAdapter", "should_quantize_key"]


class MiniMaxM2StateDictAdapter:
    """Converts state dicts between Hugging Face's tensors and NeMo AutoModel's grouped experts.

    Where NeMo has been imported, an instance is one of NeMo's bases too: its class is made with them behind this one.
    Keywords that NeMo's interface has room for and no method here speaks of have no effect.

    Attributes:
        config: NeMo's or transformers' config; read by attribute.
        moe_config: NeMo's `MoEConfig`, or anything with its `n_routed_experts` and `moe_inter_dim`.
        backend: NeMo's `BackendConfig`; kept for NeMo's callers.
        dtype: of dequantised weights and of grouped experts.
    """

    _uses_model_prefix = True
    _paramwrapper_layout_hint: str | None = None

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        """An instance of `cls` and of what NeMo bases there are."""
        return object.__new__(nemo.with_bases(cls))

    def __init__(self, config: Any, moe_config: Any, backend: Any, dtype: torch.dtype = torch.float32):
        self.config = config
        self.moe_config = moe_config
        self.backend = backend
        self.dtype = dtype
        if dtype not in WEIGHTS:
            expected = " or ".join(map(str, WEIGHTS))
            raise ConfigError(Problem(what="unsupported dtype of weights", expected=expected, got=str(dtype)))
        Sizes.of(config, moe_config)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made by the constructor: there is no other state."""
        return nemo.without_bases(type(self)), (self.config, self.moe_config, self.backend, self.dtype)

    def from_hf(
        self, hf_state_dict: MutableMapping[str, Any], device_mesh: DeviceMesh | None = None, **_kwargs: Any
    ) -> dict[str, Any]:
        """Convert Hugging Face tensors to native ones, taking them out of the dict one by one.

        The dict is empty afterwards, and memory stays near that of the result. When something is wrong with any
        tensor, nothing has been taken. The dict may be partial: any layers, and any tensors but experts, of which
        this rank's must be there if any of their layer are.

        Args:
            hf_state_dict: tensors by Hugging Face name, under any prefix; FP8 weights beside their `_scale_inv`.
                DTensors may lie as they like, if this rank holds what it needs of experts.
            device_mesh: a mesh of NeMo's `ep`, `ep_shard` and `ep_replicate`: each rank converts its experts alone.

        Returns:
            Tensors by native name. Grouped experts, `[experts, hidden, 2*inter]` and `[experts, inter, hidden]`, and
            what was FP8 are new, in `dtype`; on a mesh the experts are DTensors. The rest are the caller's own, also
            keys that the layout does not know, and experts that were read into `load_destinations`.

        Raises:
            LayoutError: everything that is wrong: see `torch_bridge.plan.plan`.
        """
        todo = plan(hf_state_dict, self._sizes, None if device_mesh is None else experts_layout(device_mesh))
        for key in todo.dropped:
            del hf_state_dict[key]
        native = {group.entry.native: self._assemble(group, hf_state_dict) for group in todo.groups}
        native |= {name: self._take_scaled(key, hf_state_dict) for key, name in todo.scaled.items()}
        native |= {name: hf_state_dict.pop(key) for key, name in todo.kept.items()}
        return native | self._lora_from_hf({key: hf_state_dict.pop(key) for key in todo.lora})

    def convert_from_hf(
        self, hf_state_dict: Mapping[str, Any], device_mesh: DeviceMesh | None = None
    ) -> dict[str, Any]:
        """`from_hf` that leaves its input as it is."""
        return self.from_hf(dict(hf_state_dict), device_mesh)

    def to_hf(
        self,
        state_dict: Mapping[str, Any],
        exclude_key_regex: str | None = None,
        quantization: bool = False,
        *,
        for_checkpoint_load: bool = False,
        **lora: Any,
    ) -> dict[str, Any]:
        """Convert native tensors to Hugging Face ones; the inverse of `from_hf`.

        Args:
            state_dict: tensors by native name, under any prefix; may be partial. Not changed.
            exclude_key_regex: Hugging Face names that match from their start are left out, and their scales.
            quantization: write block-scaled weights as FP8 with real scales. For sharded DTensors this is a
                collective: every rank must call it alike.
            for_checkpoint_load: what NeMo's loader says to get `load_destinations` instead.
            **lora: how NeMo's callers want LoRA tensors: `v4_compatible`, `legacy_paramwrapper_layout`. What they pass
                besides (`device_mesh`) has no effect: the tensors themselves say how they lie.

        Returns:
            Tensors by Hugging Face name; of experts, those that this rank holds. Experts are contiguous copies, other
            tensors that stay as they are the caller's own.

        Raises:
            LayoutError: grouped experts of a wrong shape or dtype, or sharded in a way that cannot be taken apart.
            NumericError: NaN or infinity in a weight to be quantised.
        """
        form = _form(quantization, for_checkpoint_load)
        return dict(self._convert(state_dict, form, exclude_key_regex, lora))

    def convert_single_tensor_to_hf(
        self,
        fqn: str,
        tensor: Any,
        *,
        exclude_key_regex: str | None = None,
        quantization: bool = False,
        for_checkpoint_load: bool = False,
        **lora: Any,
    ) -> list[tuple[str, Any]]:
        """Convert one native tensor; arguments, results and errors as in `to_hf`.

        Returns:
            Pairs of name and tensor, expert by expert; FP8 weights have their scales behind them.
        """
        form = _form(quantization, for_checkpoint_load)
        return list(self._convert({fqn: tensor}, form, exclude_key_regex, lora))

    def load_destinations(
        self, state_dict: Mapping[str, Any], exclude_key_regex: str | None = None, quantization: bool = False
    ) -> dict[str, Any]:
        """Tensors by Hugging Face name for a loader to write a checkpoint to. They are not data.

        Args:
            state_dict: the model's native tensors.
            exclude_key_regex: as in `to_hf`.
            quantization: for an FP8 checkpoint: block-scaled weights are FP8 codes, unset, beside scales of one.

        Returns:
            Destinations for this rank. Without `quantization` they are the model's own storage, or views of it, except
            where experts are sharded along another axis too: those are copies. `from_hf` takes what was loaded.

        Raises:
            LayoutError: as in `to_hf`.
        """
        return dict(self._convert(state_dict, _form(quantization, True), exclude_key_regex, {}))

    def get_hf_state_dict_keys(self, state_dict: Mapping[str, Any]) -> list[str]:
        """The names that `to_hf` gives, without `_extra_state`, from names and layouts alone."""
        pairs = self._convert(state_dict, export.name, r".*_extra_state.*", {})
        return [key for key, _ in pairs]

    @property
    def view_loaded_native_keys(self) -> set[str]:
        """Native names that `from_hf` leaves out of its result as loaded already: none, it has them all."""
        return set()

    @property
    def supports_write_through_checkpoint_load(self) -> bool:
        """Whether every destination is the model's own storage: not for FP8, nor where experts are sharded twice."""
        return False

    @property
    def supports_low_memory_dcp_load(self) -> bool:
        """The same question, as NeMo 0.7 asks it."""
        return False

    @property
    def _sizes(self) -> Sizes:
        return Sizes.of(self.config, self.moe_config)

    @property
    def _expert_path_segment(self) -> str:
        return ".".join(NATIVE_EXPERTS)

    @property
    def _is_gated_moe(self) -> bool:
        return True

    @property
    def _v5_peft_target_parameters(self) -> tuple[str, ...]:
        """What transformers calls the fused experts that PEFT adapts."""
        return tuple(f"{self._expert_path_segment}.{name}" for name in ("gate_up_proj", "down_proj"))

    def _dequantize(self, state_dict: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Dequantise every FP8 weight of a dict in place, and take its scales out; `state_dict` is returned.

        Raises:
            LayoutError: FP8 without scales, scales without their weight, or scales that do not fit.
        """
        for key in scaled_weights(state_dict, self._sizes):
            state_dict[key] = self._take_scaled(key, state_dict)
        return state_dict

    def _hf_key_to_native(self, key: str) -> str:
        """The native name of a tensor that does not group; of an expert's weight, NeMo's name half way to it."""
        return Names(self._sizes, {key: None}).hf_to_native(key)

    def _native_key_to_hf(self, key: str) -> str:
        """The inverse of `_hf_key_to_native`."""
        return Names(self._sizes, {key: None}).native_to_hf(key)

    def _assemble(self, group: Group, tensors: MutableMapping[str, Any]) -> torch.Tensor:
        local, layout = group.local, group.layout
        if group.owner is not None:
            for keys in local.keys:
                for key in keys:
                    del tensors[key]
            return group.owner
        like = next((local_of(tensors[key]) for keys in local.keys for key in keys), torch.empty(0))
        out = torch.empty([len(part) for part in group.region], dtype=self.dtype, device=like.device)
        fill(out, _fillings(group, out, tensors), group.entry.block)
        return out if layout is None else layout.wrap(out, group.entry.shape)

    def _take_scaled(self, key: str, tensors: MutableMapping[str, Any]) -> torch.Tensor:
        weight, scale_inv = tensors.pop(key), tensors.pop(key + SCALE_SUFFIX)
        return matrices.dequantize(weight, scale_inv, self.dtype, block=self._sizes.block)

    def _convert(
        self, state_dict: Mapping[str, Any], form: export.Form, exclude: str | None, lora: Mapping[str, Any]
    ) -> Iterator[tuple[str, Any]]:
        names = Names(self._sizes, state_dict)
        raise_if(_wrong_experts(names, state_dict), LayoutError)
        excluded = re.compile(exclude).match if exclude else _nothing
        for fqn, tensor in state_dict.items():
            entry = names.native(fqn)
            if LORA in fqn:
                yield from (pair for pair in self._lora_to_hf({fqn: tensor}, **lora).items() if not excluded(pair[0]))
            elif entry is None or not isinstance(tensor, torch.Tensor):
                yield from (pair for pair in [(names.native_to_hf(fqn), tensor)] if not excluded(pair[0]))
            else:
                weights = (weight for weight in export.weights(entry, tensor) if not excluded(weight.key))
                yield from (pair for weight in weights for pair in form(weight))

    def _lora_from_hf(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Native LoRA tensors of those of a state dict: as they are."""
        return tensors

    def _lora_to_hf(self, tensors: dict[str, Any], **_how: Any) -> dict[str, Any]:
        """Hugging Face's LoRA tensors of native ones: as they are."""
        return tensors


def _form(quantization: bool, for_checkpoint_load: bool) -> export.Form:
    if for_checkpoint_load:
        return export.fp8_destination if quantization else export.destination
    return export.fp8_data if quantization else export.data


def _wrong_experts(names: Names, state_dict: Mapping[str, Any]) -> Iterator[Problem]:
    for fqn, tensor in state_dict.items():
        entry = names.native(fqn)
        if entry is not None and entry.row.grouped:
            yield from native_problems(entry, tensor)


def _fillings(group: Group, out: torch.Tensor, tensors: MutableMapping[str, Any]) -> Iterator[Filling]:
    """What fills `out`, this rank's part of a grouped tensor; matrices leave `tensors` as they are asked for."""
    region = group.matrix_region
    offset = (region[0].start, region[1].start)
    for expert, keys in zip(out, group.local.keys, strict=True):
        scales = [tensors.pop(key + SCALE_SUFFIX, None) for key in keys]
        parts = (
            Part(cut(tensors.pop(key), region), None if scale_inv is None else whole(scale_inv), offset)
            for key, scale_inv in zip(keys, scales, strict=True)
        )
        yield Filling(expert, tuple(parts))


def _nothing(_key: str) -> None:
    return None
