"""The page as text: the template filled in, with style, script, figures and plotly itself inside of it."""

from __future__ import annotations

import base64
import gzip
import json
from importlib.metadata import version
from importlib.resources import files

import plotly.io
import plotly.offline
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from minimax_jax.display import plain, size
from minimax_jax.jobs.findings import findings
from minimax_jax.jobs.overview import Overview
from minimax_jax.page.parts import Section
from minimax_jax.page.sections import sections


def render(seen: Overview) -> str:
    """A report as one HTML document that fetches nothing: its own policy forbids the browser to."""
    shown = list(sections(seen))
    page = _environment().get_template("report.html.j2")
    return page.render(
        seen=seen,
        facts=_facts(seen),
        findings=findings(seen),
        sections=shown,
        figures=_figures(shown),
        style=_asset("report.css"),
        script=_asset("report.js"),
        plotly=_packed(plotly.offline.get_plotlyjs()),
        version=version("minimax_jax"),
    )


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("minimax_jax.page", "assets"),
        autoescape=True,
        finalize=_written_out,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _written_out(value: object) -> str:
    """What is filled in, as text that UTF-8 can hold: paths may have bytes that are no text."""
    return value if isinstance(value, Markup) else plain(str(value))


def _asset(name: str) -> Markup:
    return Markup((files("minimax_jax.page") / "assets" / name).read_text(encoding="utf-8"))


def _facts(seen: Overview) -> dict[str, str]:
    """What stands in the tiles on top."""
    config, first = seen.config, seen.checkpoints[0]
    parameters = sum(each.elements for each in seen.weights)
    return {
        "size": size(first.total.nbytes),
        "parameters": _short(parameters),
        "tensors": f"{first.total.tensors:,}",
        "layers x experts": f"{config.num_hidden_layers} x {config.num_local_experts}",
        "weights in": ", ".join(seen.scaled_dtypes[0]),
        "layout": first.layout,
    }


def _short(count: int) -> str:
    unit, name = (1e9, "billion") if count >= 1e9 else (1e6, "million")
    return f"{count / unit:.3g} {name}"


def _figures(shown: list[Section]) -> Markup:
    """All figures as one JSON object by the id of their elements; nothing in it ends a script."""
    made = {plot.name: json.loads(plotly.io.to_json(plot.figure)) for section in shown for plot in section.plots}
    return Markup(json.dumps(made, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c"))


def _packed(text: str) -> Markup:
    """Text as gzip in base64: a third of the size, and in a page nothing but letters."""
    return Markup(base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode())
