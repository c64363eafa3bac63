"""The floors of the house: what each module may import, and where the text of keys may stand.

Every rule is a pure function from sources to a list of offences, so that a test can also show that the rule bites.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import minimax_jax

ROOT = Path(minimax_jax.__file__).parent
PACKAGE = "minimax_jax"

# From the lowest to the highest: a module imports from lower floors and from its own package alone.
FLOORS = (
    ("errors", "progress", "display", "bulk", "nearby"),
    ("dtypes", "paths"),
    ("layout",),
    ("ops",),
    ("leaves",),
    ("merging",),
    ("conversion", "trees", "lora"),
    ("layouts",),
    ("io",),
    ("synthetic", "jobs"),
    ("models", "page"),
    ("",),  # the package itself, whose names resolve to any of the above
    ("console", "demo"),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(FLOORS) for name in names}

# `layout` knows no arrays, `ops` no names, `io` neither: of the project they may import these alone.
NARROW = {
    "layout": {"errors", "dtypes", "display", "bulk", "nearby", "paths"},
    "ops": {"errors", "dtypes", "display"},
    "io": {"errors", "dtypes", "bulk", "nearby", "paths"},
}

WITHOUT_JAX = {
    "",
    "errors",
    "progress",
    "display",
    "bulk",
    "nearby",
    "paths",
    "dtypes",
    "layout",
    "io",
    "trees",
    "cli",
    "console",
}
TABLE = ("layout/table.py", "layout/forms.py")
KEY_TEXT = (
    *("block_sparse_moe", "_scale_inv", "gate_and_up_projs", "down_projs", "input_layernorm", "embed_tokens"),
    *("self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
)
KEY_STEPS = {"experts", "gate", "layers", "mlp", "weight"}
"""Plain words, which are key text only between dots."""

Sources = Mapping[str, str]
"""Source text by path below the package, such as `layout/table.py`."""


def sources() -> Sources:
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in sorted(ROOT.rglob("*.py"))}


def floor_of(path: str) -> str:
    """The first step below the package: `layout/table.py` -> `layout`, `errors.py` -> `errors`, `__init__.py` -> ``."""
    step = path.split("/")[0].removesuffix(".py")
    return "" if step == "__init__" else step


def imports(path: str, text: str) -> Iterator[tuple[str, bool]]:
    """Absolute names of what a module imports, anywhere in it, and whether that happens as soon as it is imported."""
    tree = ast.parse(text)
    eager = set(_eager(tree))
    package = [PACKAGE, *path.split("/")[:-1]]
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        yield from ((name, node in eager) for name in names)


def _eager(node: ast.AST) -> Iterator[ast.AST]:
    """What runs on import: everything but the bodies of functions and of `if TYPE_CHECKING`."""
    yield node
    for child in ast.iter_child_nodes(node):
        lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if not lazy and not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield from _eager(child)


def floors_imported(path: str, text: str) -> Iterator[str]:
    for name, _ in imports(path, text):
        top, *steps = name.split(".")
        if top == PACKAGE:
            yield steps[0] if steps and steps[0] in RANK else ""


def without_a_floor(found: Sources) -> list[str]:
    return [path for path in found if floor_of(path) not in RANK]


def upward_imports(found: Sources) -> list[str]:
    return [
        f"{path} -> {other or PACKAGE}"
        for path, text in found.items()
        for other in floors_imported(path, text)
        if other != floor_of(path) and RANK[other] >= RANK.get(floor_of(path), len(FLOORS))
    ]


def wide_imports(found: Sources) -> list[str]:
    return [
        f"{path} -> {other}"
        for path, text in found.items()
        for other in floors_imported(path, text)
        if floor_of(path) in NARROW and other not in {floor_of(path), *NARROW[floor_of(path)]}
    ]


def foreign_imports(found: Sources) -> list[str]:
    """torch nowhere, flax in `models` alone, jax on import only where there is maths."""
    offences = []
    for path, text in found.items():
        for name, eager in imports(path, text):
            top = name.split(".")[0]
            if (
                top in ("torch", "torch_bridge", "transformers", "nemo_automodel")
                or (top == "flax" and floor_of(path) != "models")
                or (top in ("jax", "jaxlib") and eager and floor_of(path) in WITHOUT_JAX)
            ):
                offences.append(f"{path} -> {top}")
    return offences


def key_text(found: Sources) -> list[str]:
    """Strings with the text of keys outside the table.

    Modules of `models` are named as the steps of a nested native tree are, so there such a step may stand alone.
    """
    return [
        f"{path}: {literal!r}"
        for path, text in found.items()
        if path not in TABLE
        for literal in _literals(ast.parse(text))
        if _is_key_text(literal) and not (floor_of(path) == "models" and literal.isidentifier())
    ]


def _is_key_text(literal: str) -> bool:
    steps = literal.split(".")
    return any(text in literal for text in KEY_TEXT) or (len(steps) > 1 and not KEY_STEPS.isdisjoint(steps))


def _literals(tree: ast.AST) -> Iterator[str]:
    """Every string but those that are statements by themselves: docstrings."""
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            yield node.value


# ---- the rules hold


@pytest.mark.parametrize("rule", [without_a_floor, upward_imports, wide_imports, foreign_imports, key_text])
def test_rule(rule):
    assert rule(sources()) == []


def test_the_sources_are_really_read():
    assert {"errors.py", "layout/table.py", "ops/fp8.py", "io/reader.py", "conversion.py"} <= sources().keys()
    assert "layout" in floors_imported("conversion.py", sources()["conversion.py"])
    assert key_text({"layout/other.py": sources()["layout/table.py"]}) != []


# ---- the rules bite


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (without_a_floor, "utils.py", ""),
        (without_a_floor, "helpers/text.py", ""),
        (upward_imports, "errors.py", "from minimax_jax.layout import table"),
        (upward_imports, "layout/table.py", "import minimax_jax.ops.fp8"),
        (upward_imports, "layout/table.py", "import minimax_jax"),
        (upward_imports, "layout/table.py", "from minimax_jax import conversion"),
        (upward_imports, "layout/table.py", "from minimax_jax import from_hf"),
        (upward_imports, "layout/table.py", "from ..ops import fp8"),
        (upward_imports, "layout/table.py", "from .. import ops"),
        (upward_imports, "dtypes.py", "from .layout import table"),
        (upward_imports, "layout/table.py", "def f():\n    from minimax_jax.jobs import run"),
        (upward_imports, "layout/table.py", "if TYPE_CHECKING:\n    from minimax_jax.jobs import run"),
        (upward_imports, "trees.py", "from minimax_jax.conversion import from_hf"),
        (upward_imports, "synthetic/noise.py", "from minimax_jax.jobs import run"),
        (upward_imports, "jobs/run.py", "import importlib\nimportlib.import_module('minimax_jax.cli')"),
        (wide_imports, "io/reader.py", "from minimax_jax.layout.table import ROWS"),
        (wide_imports, "ops/fp8.py", "from minimax_jax.layout.table import ROWS"),
        (wide_imports, "io/reader.py", "from ..ops import fp8"),
        (foreign_imports, "conversion.py", "import torch"),
        (foreign_imports, "models/minimax.py", "def f():\n    from torch.nn import Linear"),
        (foreign_imports, "conversion.py", "__import__('torch')"),
        (foreign_imports, "jobs/run.py", "from torch_bridge import adapter"),
        (foreign_imports, "conversion.py", "from flax import nnx"),
        (foreign_imports, "layout/specs.py", "import jax.numpy as jnp"),
        (foreign_imports, "layout/specs.py", "try:\n    import jax\nexcept ImportError:\n    pass"),
        (foreign_imports, "io/reader.py", "class A:\n    import jax"),
        (key_text, "conversion.py", "x = 'model.layers.0.block_sparse_moe.gate'"),
        (key_text, "layout/check.py", "key + '_scale_inv'"),
        (key_text, "jobs/run.py", "f'{prefix}.self_attn.{name}'"),
        (key_text, "io/reader.py", "key.endswith('.weight')"),
        (key_text, "io/reader.py", "key.rpartition('mlp.')"),
        (key_text, "models/load.py", "leaves['self_attn.q_proj']"),
        (key_text, "models/load.py", "key + '_scale_inv' + '.x'\n'a.self_attn'.split()"),
    ],
)
def test_rule_bites(rule, path, text):
    assert len(rule({path: text})) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("layout/check.py", "from minimax_jax.errors import Problem\nfrom minimax_jax.layout.specs import specs"),
        ("layout/check.py", "from .specs import specs\nfrom ..errors import Problem"),
        ("layout/specs.py", "if TYPE_CHECKING:\n    import jax\ndef f():\n    import jax"),
        ("models/minimax.py", "from flax import nnx\nimport jax\nleaves['self_attn']"),
        ("jobs/run.py", "from minimax_jax.io.reader import Reader\nfrom minimax_jax.conversion import from_hf"),
        ("conversion.py", '"""Of block_sparse_moe."""\nx = 1\n"""And _scale_inv."""\ny = "a weight. A scale"'),
    ],
)
def test_rules_let_good_code_pass(path, text):
    for rule in (without_a_floor, upward_imports, wide_imports, foreign_imports, key_text):
        assert rule({path: text}) == []


# ---- what really gets imported


def imported_by(statement: str, *paths: Path) -> set[str]:
    """Top-level modules that a fresh interpreter has after `statement`."""
    script = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT.parent), *map(str, paths)])}
    command = [sys.executable, "-c", script]
    return set(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import minimax_jax", {"jax", "jaxlib", "torch", "flax", "numpy"}),
        ("import minimax_jax.layout.specs, minimax_jax.layout.check", {"jax", "jaxlib", "torch", "flax"}),
        ("import minimax_jax.io.reader, minimax_jax.io.writer", {"jax", "jaxlib", "torch", "flax"}),
        ("import minimax_jax.conversion", {"torch", "flax", "transformers"}),
        ("import minimax_jax.cli", {"jax", "jaxlib", "torch", "flax"}),
    ],
)
def test_importing_stays_light(statement, absent):
    imported = imported_by(statement)
    assert "minimax_jax" in imported
    assert imported & absent == set()


def test_the_names_of_the_package_resolve():
    assert "jax" in imported_by("import minimax_jax; minimax_jax.from_hf")


def test_importing_something_heavy_would_be_seen(tmp_path):
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "heavy.py").write_text("def f():\n    import torch\nf()")
    assert "torch" in imported_by("import heavy", tmp_path)
    assert "torch" not in imported_by("import json", tmp_path)
