"""Two processes that save together: both end well, or both by an error, and nothing looks whole that is not."""

from pathlib import Path

import members
import pytest

import minimax_jax as mj
from minimax_jax import synthetic


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "hf"
    synthetic.synthesize(folder, synthetic.config(layers=1, experts=4))
    return folder


@pytest.fixture(scope="module")
def two():
    """A function that gives what each of two processes says last."""
    script = Path(__file__).with_name("export_process.py")

    def run(*arguments):
        address = f"127.0.0.1:{members.free_port()}"
        _, told = members.finish([members.start(script, address, index, *arguments, XLA_FLAGS="") for index in (0, 1)])
        return [out.splitlines()[-1] if out else error for out, error in told]

    return run


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_both_end_well(two, source, tmp_path, kind):
    assert two(source, tmp_path / "out", kind, 0, 0) == ["good", "good"]
    assert mj.verify(source, tmp_path / "out").good


@pytest.mark.parametrize(
    ("kind", "victim", "count", "ends"),
    [
        ("hf", 0, 3, ["OSError", "PeerFailed"]),
        ("hf", 1, 3, ["PeerFailed", "KeyboardInterrupt"]),
        ("orbax", 0, 1, ["KeyboardInterrupt", "PeerFailed"]),
    ],
)
def test_the_failure_of_one_ends_both(two, source, tmp_path, kind, victim, count, ends):
    assert two(source, tmp_path / "out", kind, victim, count) == ends
    assert list(tmp_path.iterdir()) == []
