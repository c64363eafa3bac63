"""Errors as they travel between processes."""

import pickle

import pytest

from minimax_jax import errors
from minimax_jax.errors import CheckpointError, Problem


@pytest.mark.parametrize("kind", [CheckpointError, *CheckpointError.__subclasses__()])
def test_errors_cross_processes_with_all_their_problems_and_notes(kind):
    problems = (Problem(what="a", file="f", got="1"), Problem(what="b", key="k"))
    sent = kind(problems)
    sent.add_note("what was done is kept")
    got = pickle.loads(pickle.dumps(sent))
    assert type(got) is kind and got.problems == problems and str(got) == str(sent)
    assert got.__notes__ == ["what was done is kept"]
    assert getattr(errors, kind.__name__) is kind
