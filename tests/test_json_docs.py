"""docs/json.md is held to what the commands print: every key is told there with its type, and all told are seen."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import folders
import numpy as np
import pytest
from command_line import run_json

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.cli import cli

PAGE = Path(__file__).parents[1] / "docs" / "json.md"
TYPES = {
    "text": str,
    "count": int,
    "number": (int, float),
    "flag": bool,
    "list": list,
    "object": dict,
    "null": type(None),
}
SAME_AS = {"synth": "inspect", "demo": "verify"}
"""Commands that print what another does."""

FREE = {"config", "mesh.axes", "versions", "weights", "layers[].weights", "tensors"}
FREE |= {"checkpoints[].left_out_tensors", "checkpoints[].files.*.metadata"}
"""Objects whose keys are told in words: names of libraries, of axes, of attributes, of tensors."""

LIKE = {"tree[].children": "tree", "experts": "statistics"}
"""Lists whose members have a form that is told elsewhere on the page; so has `left_out` but for one."""

Table = Mapping[str, str]


def sections() -> dict[str, Table]:
    """Path to type, by section."""
    found: dict[str, dict[str, str]] = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            found[line.removeprefix("## ")] = table = {}
        elif line.startswith("| `"):
            path, kind = (cell.strip() for cell in line.split("|")[1:3])
            table[path.strip("`")] = kind
    return found


def fits(value: object, kind: str) -> bool:
    """Whether a value is of a type as the page writes it: `text or null`, `list of counts`."""
    known = [TYPES[word.split()[0]] for word in kind.split(" or ")]
    return any(isinstance(value, one) and (one is bool or not isinstance(value, bool)) for one in known)


def walk(value: object, at: str, table: Table) -> Iterator[tuple[str, object]]:
    """Every value of a document by its path; the names of an object that the page writes as `*` are `*`."""
    if at:
        yield at, value
    told = any(path.startswith(f"{at}.") for path in table)
    if isinstance(value, dict) and (told or at not in FREE):
        free = f"{at}.*" in table
        for name, own in value.items():
            step = "*" if free else name
            yield from walk(own, f"{at}.{step}" if at else step, table)
    elif isinstance(value, list):
        for own in value:
            if isinstance(own, dict) and at not in LIKE and any(path.startswith(f"{at}[].") for path in table):
                for name, below in own.items():
                    yield from walk(below, f"{at}[].{name}", table)


def check(table: Table, *documents: object) -> None:
    seen = [pair for document in documents for pair in walk(document, "", table)]
    assert {path for path, _ in seen} == table.keys()
    assert [(path, value) for path, value in seen if not fits(value, table[path])] == []


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    config = synthetic.config(layers=1, experts=8)
    synthetic.synthesize(root / "a", config)
    arrays = folders.arrays(root / "a")
    more = {"model.vision.weight": np.zeros(3, np.float32)}
    folders.write(root / "more", arrays | more, config)
    (root / "more" / "figures").mkdir()
    arrays["model.norm.weight"] = arrays["model.norm.weight"] * np.float32(np.nan).astype(
        arrays["lm_head.weight"].dtype
    )
    folders.write(root / "b", arrays, config)
    mj.verify(root / "a", output=root / "a.json")
    return root


def test_every_command_has_its_section():
    told = {section.split()[0] for section in sections()}
    assert {SAME_AS.get(name, name) for name in cli.commands} <= told


def test_errors(made):
    told = run_json("inspect", made / "no", code=3)[0]
    check(sections()["An error"], told)


def test_inspect_synth_and_their_other_forms(made, tmp_path):
    page = sections()
    leaving = run_json("inspect", made / "more", "--leave-out", "model.vision")[0]
    check(page["inspect"], leaving, run_json("synth", tmp_path / "s", "--layers", 1)[0])
    check(page["inspect --tree"], run_json("inspect", made / "a", "--tree")[0])
    grouped, vector = "model.layers.0.mlp.experts.down_projs", "model.norm.weight"
    tensors = [run_json("inspect", made / "a", "--tensor", name)[0] for name in (grouped, vector)]
    check(page["inspect --tensor"], *tensors)
    assert all(one.keys() == tensors[0]["statistics"].keys() for one in tensors[0]["experts"])


def test_plan_and_convert(made, tmp_path):
    whole = run_json("plan", made / "a", "--probe", tmp_path, "--mesh", "expert=2")[0]
    streamed = run_json("plan", made / "a", "--to", "orbax")[0]
    check(sections()["plan"], whole, streamed, run_json("plan", made / "a", "--to", "hf")[0])
    done = [run_json("convert", made / "a", tmp_path / to, "--to", to)[0] for to in ("hf", "dcp")]
    check(sections()["convert"], *done)


def test_verify_and_demo(made, tmp_path):
    two, one = (
        run_json("verify", made / "a", made / "b", "--sample", "100%", code=1)[0],
        run_json("verify", made / "a")[0],
    )
    held = run_json("verify", made / "b", "--certificate", made / "a.json", code=1)[0]
    check(sections()["verify"], two, one, held, run_json("demo", tmp_path / "demo")[0])


def test_diff_generate_and_completion(made):
    page = sections()
    check(page["diff"], run_json("diff", made / "a", made / "b", "--sample", "100%", code=1)[0])
    check(page["generate"], run_json("generate", made / "a", "--prompt-ids", "1,2", "--max-new-tokens", 1)[0])
    check(page["completion"], run_json("completion", "zsh")[0])


def test_a_page_that_says_something_else_would_be_seen(made):
    table, told = dict(sections()["inspect --tree"]), run_json("inspect", made / "a", "--tree")[0]
    for wrong in (
        table | {"tree[].colour": "text"},
        table | {"path": "count"},
        {k: v for k, v in table.items() if k != "path"},
    ):
        with pytest.raises(AssertionError):
            check(wrong, told)
