import pytest

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import JobError, RequestError
from minimax_jax.jobs import front, streamed


class Offered:
    """What an installed package offers: an entry point that resolves to a function."""

    name = "elsewhere"

    def __init__(self, function):
        self.load = lambda: function


@pytest.fixture
def source(tmp_path):
    synthetic.synthesize(tmp_path / "hf", synthetic.config(layers=1, experts=2))
    return tmp_path / "hf"


def test_a_target_of_another_package_gets_the_opened_source_and_the_options(source, tmp_path, monkeypatch):
    got = {}

    def write(opened, destination, **options):
        got.update(options, opened=opened, destination=destination)
        return "done"

    for module in (front, streamed):
        monkeypatch.setattr(module, "streamed_targets", lambda: {"elsewhere": Offered(write)})
    assert mj.convert(source, tmp_path / "out", to="elsewhere", dtype="fp8", workers=3, max_memory_bytes=7) == "done"
    assert got.pop("opened").survey.layout == "hf" and got.pop("destination") == tmp_path / "out"
    assert got == {"dtype": "F8_E4M3", "workers": 3, "max_memory_bytes": 7, "progress": None}
    mj.convert(source, tmp_path / "out", to="elsewhere")
    assert got["dtype"] == "BF16"
    with pytest.raises(RequestError) as caught:  # a writer that does not say that it takes them
        mj.convert(source, tmp_path / "out", to="elsewhere", check="all", restart=True)
    assert [problem.what.split()[0] for problem in caught.value.problems] == ["check", "restart"]


def test_a_target_of_another_package_that_goes_on_after_a_stop_gets_what_that_takes(source, tmp_path, monkeypatch):
    def write(opened, destination, *, check, restart, **options):
        return check, restart

    for module in (front, streamed):
        monkeypatch.setattr(module, "streamed_targets", lambda: {"elsewhere": Offered(write)})
    assert mj.convert(source, tmp_path / "out", to="elsewhere") == ("sample", False)
    assert mj.convert(source, tmp_path / "out", to="elsewhere", check="all", restart=True) == ("all", True)


def test_a_target_that_nobody_offers_is_refused(source, tmp_path):
    with pytest.raises(JobError, match="no such target"):
        mj.convert(source, tmp_path / "out", to="elsewhere")
