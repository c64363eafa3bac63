"""Errors as they travel between processes."""

import ast
import pickle
from pathlib import Path

import pytest

from minimax_jax import errors
from minimax_jax.errors import CheckpointError, Problem, saying


@pytest.mark.parametrize("kind", [CheckpointError, *CheckpointError.__subclasses__()])
def test_errors_cross_processes_with_all_their_problems_and_notes(kind):
    problems = (Problem(what="a", file="f", got="1"), Problem(what="b", key="k"))
    sent = kind(problems)
    sent.add_note("what was done is kept")
    got = pickle.loads(pickle.dumps(sent))
    assert type(got) is kind and got.problems == problems and str(got) == str(sent)
    assert got.__notes__ == ["what was done is kept"]
    assert getattr(errors, kind.__name__) is kind


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(), "OSError"),
        (TimeoutError(" \n"), "TimeoutError"),
        (RuntimeError(" no room\n"), "no room"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_an_error_always_says_something(error, words):
    assert saying(error) == words


BROAD = {"BaseException", "Exception"}
ROOT = Path(__file__).parents[1]


def broad_handlers(tree):
    """The handlers that take whatever comes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = {each.id for each in ast.walk(node.type) if isinstance(each, ast.Name)} if node.type else BROAD
            if kinds & BROAD:
                yield node


def raises_again(handler, tree):
    """Whether it ends by `raise`, or hands the error to `agree`, which tells the other ranks and raises it."""
    if isinstance(handler.body[-1], ast.Raise):
        return handler.body[-1].exc is None
    kept = ast.unparse(handler.body[-1]) == f"failure = {handler.name}"
    return kept and any(
        isinstance(node, ast.Call) and ast.unparse(node.func) == "agree" and "failure" in ast.unparse(node)
        for node in ast.walk(tree)
    )


@pytest.mark.parametrize("package", ["minimax_jax", "torch_bridge"])
def test_who_catches_everything_raises_it_again(package):
    found = []
    for file in sorted((ROOT / package).rglob("*.py")):
        tree = ast.parse(file.read_text())
        for handler in broad_handlers(tree):
            found.append(f"{file.name}:{handler.lineno}")
            assert raises_again(handler, tree), found[-1]
    assert found


@pytest.mark.parametrize(
    "handler", ["except:\n  pass", "except Exception as e:\n  log(e)", "except (OSError, BaseException):\n  return"]
)
def test_one_that_does_not_is_seen(handler):
    tree = ast.parse(f"def f():\n try:\n  g()\n {handler}")
    (found,) = broad_handlers(tree)
    assert not raises_again(found, tree)
