"""Which job a conversion is: what must be the same for one to go on with the work of another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version

from minimax_jax.jobs.source import Source
from minimax_jax.layout.config import MiniMaxConfig


def stamp(source: Source, *, target: str, config: MiniMaxConfig, division: Mapping[str, bytes]) -> dict[str, str]:
    """The stamp of a conversion, as `io.journal` keeps it: plain words by what they tell.

    Args:
        source: what is read; each of its files counts with its state.
        target: the target and the dtype.
        config: what is written.
        division: how the output is divided, by what it is divided into; of any length, as a digest is taken.
    """
    told = {"version": version("minimax_jax"), "target": target}
    for name, each in (("config", config), ("config of the source", source.config)):
        told[name] = _sha256(json.dumps(each.to_dict(), sort_keys=True).encode())
    told |= {f"division into {name}": _sha256(content) for name, content in division.items()}
    left_out = [key for part in source.left_out for key in part.keys]
    told["left out"] = _sha256("\n".join(sorted(left_out)).encode()) if left_out else "nothing"
    return told | {f"source file {file}": str(state) for file, state in source.readable.states.items()}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
