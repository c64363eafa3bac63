"""NeMo AutoModel's state-dict adapter for MiniMax-M2: the same interface, on the kernels and the layout of minimax_jax.

What NeMo does right comes out bit for bit. What differs, and why:

- `to_hf(quantization=True)` derives real block scales. NeMo's scales of one are only good to be overwritten by a
  loader: `load_destinations` makes those, and `for_checkpoint_load=True` asks for them.
- FP8 without scales, scales without their weight, an incomplete grid of experts and misnamed experts are errors.
- Block scales are found by global row and column, so that dequantisation is right wherever a shard begins.
- Experts that do not divide among ranks lie as DTensor's `Shard(0)` has them, and so do the parameters they load into.
- Expert LoRA loses nothing: where gate and up have an A each, the second is kept by `concatenate_lora`, or it is an
  error. The published names of experts are read, and written by `lora_names="hub"`.
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
from torch_bridge import export, lora, matrices, nemo
from torch_bridge.assembly import assemble
from torch_bridge.kernels import WEIGHTS
from torch_bridge.mesh import experts_layout
from torch_bridge.names import NATIVE_EXPERTS, Names, Sizes
from torch_bridge.plan import plan, scaled_weights, wrong_experts

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
        self,
        hf_state_dict: MutableMapping[str, Any],
        device_mesh: DeviceMesh | None = None,
        *,
        concatenate_lora: bool = False,
        legacy_paramwrapper_layout: bool | None = None,
        **_kwargs: Any,
    ) -> dict[str, Any]:
        """Convert Hugging Face tensors to native ones, taking them out of the dict one by one.

        The dict is empty afterwards, and memory stays near that of the result. When something is wrong with any
        tensor, nothing has been taken. The dict may be partial: any layers, and any tensors but experts, of which
        this rank's must be there if any of their layer are.

        Args:
            hf_state_dict: tensors by Hugging Face name, under any prefix; FP8 weights beside their `_scale_inv`.
                DTensors may lie as they like, if this rank holds what it needs of experts.
            device_mesh: a mesh of NeMo's `ep`, `ep_shard` and `ep_replicate`: each rank converts its experts alone.
            concatenate_lora: keep an A each for gate and up, at twice the rank (see `minimax_jax.lora`).
            legacy_paramwrapper_layout: whether PEFT 0.19.0 or older laid LoRA out; None finds out from the shapes.

        Returns:
            Tensors by native name. Grouped experts, `[experts, hidden, 2*inter]` and `[experts, inter, hidden]`, and
            what was FP8 are new, in `dtype`; on a mesh the experts are DTensors. The rest are the caller's own, also
            keys that the layout does not know, and experts that were read into `load_destinations`.

        Raises:
            LayoutError: everything that is wrong: see `torch_bridge.plan.plan` and `minimax_jax.lora`.
        """
        todo = plan(hf_state_dict, self._sizes, None if device_mesh is None else experts_layout(device_mesh))
        adapters = {key: hf_state_dict[key] for key in todo.lora}
        adapters = self._lora_from_hf(adapters, concatenate_lora, legacy_paramwrapper_layout)
        for key in [*todo.dropped, *todo.lora]:
            del hf_state_dict[key]
        native = {group.entry.native: assemble(group, hf_state_dict, self.dtype) for group in todo.groups}
        native |= {name: self._take_scaled(key, hf_state_dict) for key, name in todo.scaled.items()}
        native |= {name: hf_state_dict.pop(key) for key, name in todo.kept.items()}
        return native | adapters

    def convert_from_hf(
        self,
        hf_state_dict: Mapping[str, Any],
        device_mesh: DeviceMesh | None = None,
        *,
        concatenate_lora: bool = False,
        legacy_paramwrapper_layout: bool | None = None,
    ) -> dict[str, Any]:
        """`from_hf` that leaves its input as it is."""
        return self.from_hf(
            dict(hf_state_dict),
            device_mesh,
            concatenate_lora=concatenate_lora,
            legacy_paramwrapper_layout=legacy_paramwrapper_layout,
        )

    def to_hf(
        self,
        state_dict: Mapping[str, Any],
        exclude_key_regex: str | None = None,
        quantization: bool = False,
        *,
        for_checkpoint_load: bool = False,
        v4_compatible: bool = False,
        legacy_paramwrapper_layout: bool = False,
        lora_names: lora.Names = "nemo",
        concatenated_lora: bool = False,
        **_kwargs: Any,
    ) -> dict[str, Any]:
        """Convert native tensors to Hugging Face ones; the inverse of `from_hf`.

        Args:
            state_dict: tensors by native name, under any prefix; may be partial. Not changed.
            exclude_key_regex: Hugging Face names that match from their start are left out, and their scales.
            quantization: write block-scaled weights as FP8 with real scales. For sharded DTensors this is a
                collective: every rank must call it alike.
            for_checkpoint_load: what NeMo's loader says to get `load_destinations` instead.
            v4_compatible: write expert LoRA for each expert, as PEFT stores that of linear layers; else as PEFT's
                ParamWrapper, of all experts of a layer.
            legacy_paramwrapper_layout: ParamWrapper as PEFT 0.19.0 and older laid it out.
            lora_names: names of experts in LoRA for each: NeMo's, or `hub` for the published ones.
            concatenated_lora: take apart what `concatenate_lora` made, in LoRA for each expert.

        Returns:
            Tensors by Hugging Face name; of experts, those that this rank holds. Experts are contiguous copies, other
            tensors that stay as they are the caller's own. Expert LoRA is new and plain.

        Raises:
            LayoutError: grouped experts or LoRA of a wrong shape or dtype, or sharded beyond being taken apart.
            NumericError: NaN or infinity in a weight to be quantised.
        """
        form = export.form_of(quantization, for_checkpoint_load)
        factors = lora.Form(v4_compatible, lora_names, concatenated_lora, legacy_paramwrapper_layout)
        return dict(self._convert(state_dict, form, exclude_key_regex, factors))

    def convert_single_tensor_to_hf(
        self,
        fqn: str,
        tensor: Any,
        *,
        exclude_key_regex: str | None = None,
        quantization: bool = False,
        for_checkpoint_load: bool = False,
        v4_compatible: bool = False,
        legacy_paramwrapper_layout: bool = False,
        lora_names: lora.Names = "nemo",
        concatenated_lora: bool = False,
        **_kwargs: Any,
    ) -> list[tuple[str, Any]]:
        """Convert one native tensor; arguments, results and errors as in `to_hf`.

        Returns:
            Pairs of name and tensor, expert by expert; FP8 weights have their scales behind them.
        """
        form = export.form_of(quantization, for_checkpoint_load)
        factors = lora.Form(v4_compatible, lora_names, concatenated_lora, legacy_paramwrapper_layout)
        return list(self._convert({fqn: tensor}, form, exclude_key_regex, factors))

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
        return dict(self._convert(state_dict, export.form_of(quantization, True), exclude_key_regex, lora.Form()))

    def get_hf_state_dict_keys(self, state_dict: Mapping[str, Any]) -> list[str]:
        """The names that `to_hf` gives, without `_extra_state`, from names and layouts alone."""
        pairs = self._convert(state_dict, export.name, r".*_extra_state.*", lora.Form())
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

    def _take_scaled(self, key: str, tensors: MutableMapping[str, Any]) -> torch.Tensor:
        weight, scale_inv = tensors.pop(key), tensors.pop(key + SCALE_SUFFIX)
        return matrices.dequantize(weight, scale_inv, self.dtype, block=self._sizes.block)

    def _convert(
        self, state_dict: Mapping[str, Any], form: export.Form, exclude: str | None, factors: lora.Form
    ) -> Iterator[tuple[str, Any]]:
        names = Names(self._sizes, state_dict)
        raise_if([*wrong_experts(names, state_dict), *lora.problems(state_dict, names.config)], LayoutError)
        excluded = re.compile(exclude).match if exclude else _nothing
        for fqn, tensor in state_dict.items():
            entry = names.native(fqn)
            if lora.is_factor(fqn, tensor):
                adapters = lora.ungroup(fqn, tensor, names.config, factors)
                yield from (pair for pair in adapters.items() if not excluded(pair[0]))
            elif entry is None or not isinstance(tensor, torch.Tensor):
                yield from (pair for pair in [(names.native_to_hf(fqn), tensor)] if not excluded(pair[0]))
            else:
                weights = (weight for weight in export.weights(entry, tensor) if not excluded(weight.key))
                yield from (pair for weight in weights for pair in form(weight))

    def _lora_from_hf(self, tensors: Mapping[str, Any], concatenate: bool, legacy: bool | None) -> dict[str, Any]:
        """Native LoRA tensors of those of a state dict; NeMo's loader may have left word of their layout."""
        if legacy is None:
            legacy = lora.legacy_of(self._paramwrapper_layout_hint)
        return lora.group(tensors, Names(self._sizes, tensors).config, concatenate=concatenate, legacy=legacy)


def _nothing(_key: str) -> None:
    return None
