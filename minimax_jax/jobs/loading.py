"""How to load what was converted: three lines of Python for each target."""

from __future__ import annotations

import os
from pathlib import Path

_OWN = (
    "import minimax_jax as mj",
    "model = mj.load_model({path}, dtype=None)  # Flax, as stored; mesh=... spreads it over devices",
    "tree = mj.load({path}, dtype=None)  # or the arrays alone, by native name",
)
_TRANSFORMERS = (
    "import torch",
    "from transformers import AutoModelForCausalLM",
    "model = AutoModelForCausalLM.from_pretrained({path}, dtype={dtype})",
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
    **dict.fromkeys(("hf", "hf-fp8", "transformers-v5"), _TRANSFORMERS),
    **dict.fromkeys(("maxtext", "maxtext-unscanned"), _MAXTEXT),
    "dcp": _DCP,
}

_TORCH = {"f32": "torch.float32"}
"""dtypes that transformers is asked for, by that of the weights; bfloat16 for all others."""


def how_to_load(to: str, dtype: str | None, destination: Path) -> tuple[str, ...]:
    """The lines of Python that load a converted checkpoint; none for a target that another package adds.

    Args:
        to: the target.
        dtype: of its block-scaled weights, by the name that users give it; None for the target's own.
        destination: the folder.
    """
    path, wanted = repr(os.path.abspath(destination)), _TORCH.get(dtype or "", "torch.bfloat16")  # noqa: PTH100 - links
    return tuple(line.format(path=path, dtype=wanted) for line in _LINES.get(to, ()))
