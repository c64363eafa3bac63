"""What results show of themselves: one line as text, all of it in rich, in notebooks and in treescope."""

import io

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import treescope
from rich.console import Console

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.jobs.probe import probe
from minimax_jax.jobs.source import open_source
from minimax_jax.models.mesh_plan import mesh_plan


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Every kind of result, of a checkpoint whose path looks like markup."""
    root = tmp_path_factory.mktemp("made") / "[bold]"
    config = synthetic.config(layers=1, experts=2)
    synthetic.synthesize(root / "hf", config)
    report = mj.convert(root / "hf", root / "native")
    plan = mj.plan(root / "hf")
    return {
        "Inspection": mj.inspect(root / "hf"),
        "Plan": plan,
        "Report": report,
        "Verification": mj.verify(root / "hf", root / "native"),
        "Diff": mj.diff(root / "hf", root / "native"),
        "Probe": probe(plan, root),
        "MeshPlan": mesh_plan(open_source(root / "hf"), {"expert": 2}),
        "Specs": mj.specs(config),
        "BlockScaled": mj.BlockScaled.quantize(jnp.ones((2, 256, 130))),
    }


NAMES = ["Inspection", "Plan", "Report", "Verification", "Diff", "Probe", "MeshPlan", "Specs", "BlockScaled"]


@pytest.mark.parametrize("name", NAMES)
def test_a_repr_is_one_short_line(shown, name):
    text = repr(shown[name])
    assert text.startswith((f"<{name}: ", f"{name}(")) and "\n" not in text and len(text) < 300


@pytest.mark.parametrize("name", NAMES)
def test_rich_and_notebooks_show_all_of_it(shown, name):
    result = shown[name]
    page = io.StringIO()
    Console(file=page, width=200, highlight=False).print(result)
    html = result._repr_html_()
    first = repr(result).removeprefix(f"<{name}: ").removesuffix(">")
    assert (first in page.getvalue() and len(page.getvalue().splitlines()) > 1) or name == "Report"
    assert html.startswith("<pre ") and html.endswith("</pre>") and "\x1b" not in html
    Console(file=(narrow := io.StringIO()), width=40).print(result)
    assert "…" not in narrow.getvalue()
    assert "[bold]" in page.getvalue() or "[bold]" not in str(getattr(result, "path", ""))


def test_the_figures_are_those_of_the_result(shown):
    plan, seen = shown["Plan"], shown["Inspection"]
    assert all(kind.replace("<", "&lt;") in seen._repr_html_() for kind in seen.by_kind)
    assert all(shard.file_name in plan._repr_html_() for shard in plan.shards)
    assert "the same" in shown["Verification"]._repr_html_() and "the same" in shown["Diff"]._repr_html_()
    table = shown["Specs"]._repr_html_()
    assert all(entry.row.native in table and str(list(entry.shape)) in table for entry in shown["Specs"].entries)
    assert repr(shown["Specs"].entries[-1]).startswith("Entry('lm_head.weight', BF16[264, 256]")


def test_names_from_files_cannot_speak_to_a_notebook(tmp_path):
    folder = tmp_path / "<script>\x1b[2J"
    config = synthetic.config(layers=1, experts=2)
    synthetic.synthesize(tmp_path / "hf", config, sparse=True)
    (tmp_path / "hf").rename(folder)
    seen = mj.inspect(folder)
    assert "<script>" not in seen._repr_html_() and "&lt;script&gt;" in seen._repr_html_()
    assert "\x1b" not in repr(seen) + seen._repr_html_()


def test_what_is_traced_or_abstract_has_a_view_too():
    scaled = mj.BlockScaled.quantize(jnp.ones((128, 128)))
    abstract = jax.eval_shape(lambda: scaled)
    for node in (abstract, jax.tree.map(lambda leaf: "name", scaled)):
        assert node._repr_html_().startswith("<pre ") and "BlockScaled" in repr(node)
    jax.jit(lambda node: (repr(node), node._repr_html_(), node)[2])(scaled)


def test_treescope_shows_trees_with_their_arrays(tmp_path):
    config = synthetic.config(layers=1, experts=2)
    synthetic.synthesize(tmp_path / "hf", config)
    native = mj.from_hf(mj.read_tree(tmp_path / "hf"), config, dtype=None)
    for tree in (native, mj.nest(native), jax.tree.map(np.asarray, native)):
        text = treescope.render_to_text(tree)
        scaled = sum(isinstance(leaf, mj.BlockScaled) for leaf in native.values())
        assert text.count("BlockScaled(") == scaled > 0 and text.count("block=(128, 128)") == scaled
        assert "float8_e4m3fn" in text and "scale_inv" in text
        with treescope.active_autovisualizer.set_scoped(treescope.ArrayAutovisualizer()):
            html = treescope.render_to_html(tree, compressed=False)
        assert "BlockScaled" in html and "gate_and_up_projs" in html
    assert set(folders.described(native)) == {spec.key for spec in mj.specs(config).native("F8_E4M3")}
