"""How to load what was converted: three lines of Python for each target."""

from __future__ import annotations

import os
from pathlib import Path

from minimax_jax.jobs.targets import STORED

_OWN = (
    "import minimax_jax as mj",
    "model = mj.load_model({path}, dtype=None)  # Flax, as stored; mesh=... spreads it over devices",
    "tree = mj.load({path}, dtype=None)  # or the arrays alone, by native name",
)
_KEEP_ROUTER = (
    "Model._keep_in_fp32_modules_strict = ['mlp.gate', 'e_score_correction_bias']  # or the float32 router is rounded"
)
_TRANSFORMERS = (
    "from transformers import MiniMaxM2ForCausalLM as Model",
    _KEEP_ROUTER,
    "model = Model.from_pretrained({path}, dtype='auto')",
)
_TRANSFORMERS_F32 = (
    "from transformers import MiniMaxM2ForCausalLM as Model",
    "# as it is stored; dtype='auto' would round all of it to bfloat16, the dtype of config.json",
    "model = Model.from_pretrained({path}, dtype='float32')",
)
_TRANSFORMERS_FP8 = (
    "from transformers import FineGrainedFP8Config as FP8, MiniMaxM2ForCausalLM as Model",
    _KEEP_ROUTER,
    "model = Model.from_pretrained({path}, dtype='auto', device_map='auto')"
    "  # without a GPU: dtype='float32', quantization_config=FP8(dequantize=True)",
)
_DCP = (
    "from torch_bridge import dcp",
    "tensors = model.state_dict()  # of NeMo AutoModel's module, or any tensors by native name, sharded in any way",
    "dcp.load(tensors, {path})",
)

_MAXTEXT = (
    "from orbax.checkpoint import v1 as ocp",
    "params = ocp.load({path})['params']  # what MaxText calls params",
    "# MaxText takes the folder with _METADATA in it as load_parameters_path, without OCDBT and Zarr 3",
)

_LINES = {
    **dict.fromkeys(("native", "orbax"), _OWN),
    **dict.fromkeys(("hf", "transformers-v5"), _TRANSFORMERS),
    "hf-fp8": _TRANSFORMERS_FP8,
    **dict.fromkeys(("maxtext", "maxtext-unscanned"), _MAXTEXT),
    "dcp": _DCP,
}

_OTHER = {
    **dict.fromkeys((("hf", "F32"), ("transformers-v5", "F32")), _TRANSFORMERS_F32),
    **dict.fromkeys((("hf", "F8_E4M3"), ("transformers-v5", "F8_E4M3")), _TRANSFORMERS_FP8),
}
"""Lines that are others where the block-scaled weights are of that dtype."""


def how_to_load(to: str, dtype: str | None, destination: Path) -> tuple[str, ...]:
    """The lines of Python that load a converted checkpoint; none for a target that another package adds.

    Args:
        to: the target.
        dtype: of its block-scaled weights, by the name that users give it; None for the target's own.
        destination: the folder.
    """
    return lines_to_load(to, STORED.get(dtype or ""), repr(os.path.abspath(destination)))  # noqa: PTH100 - links


def lines_to_load(to: str, dtype: str | None, path: str) -> tuple[str, ...]:
    """As `how_to_load`, with the dtype by format name, and the folder as a Python expression."""
    return tuple(line.format(path=path) for line in _OTHER.get((to, dtype or ""), _LINES.get(to, ())))
