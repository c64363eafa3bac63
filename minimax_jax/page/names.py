"""Names of weights as templates for plotly, which fills in layer and expert where the reader points."""

from __future__ import annotations

from collections.abc import Iterable

from minimax_jax.jobs.overview import Overview
from minimax_jax.layout.table import PREFIX

_NUMBER = "{}"


def weight_name(seen: Overview, kind: str, layer: str) -> str:
    """The name of a weight of a kind in a layer, a number or a template."""
    return _prefix(seen) + kind.replace(_NUMBER, layer, 1)


def expert_name(seen: Overview) -> str:
    """The name of an expert, in a map with experts along x and layers along y."""
    kind = seen.experts[0]
    name = kind[: kind.rindex(_NUMBER) + len(_NUMBER)]
    return weight_name(seen, name, "%{y}").replace(_NUMBER, "%{x}")


def matrix_names(seen: Overview) -> Iterable[str]:
    """The names of an expert's matrices, behind that of the expert."""
    return [kind[kind.rindex(_NUMBER) + len(_NUMBER) + 1 :] for kind in seen.experts]


def _prefix(seen: Overview) -> str:
    return PREFIX if any(each.key.startswith(PREFIX) for each in seen.weights) else ""
