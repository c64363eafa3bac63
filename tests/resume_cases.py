"""Conversions that die at named moments, and what is done of them then."""

from minimax_jax.io import points


class Killed(BaseException):
    """Stands for the death of the process."""


def dies_at(monkeypatch, count, name=None):
    """Die when a moment, or any, is reached for the `count`-th time, and all threads at whatever moment comes next."""
    left = [count]

    def die(reached):
        if name in (None, reached) or left[0] <= 0:
            left[0] -= 1
        if left[0] <= 0:
            raise Killed

    monkeypatch.setattr(points, "on_reach", die)


def count_units(monkeypatch):
    """A list that gets an item for each unit that is done, and not found done."""
    made = []
    monkeypatch.setattr(points, "on_reach", lambda name: made.append(name) if name == "before the journal" else None)
    return made
