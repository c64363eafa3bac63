"""What can be wrong with a checkpoint: each is made of a good tiny one, opened, and has to be told."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from minimax_jax import synthetic
from minimax_jax.errors import CheckpointError
from minimax_jax.jobs import after, front
from trials.bad import LEFT_OUT, REFUSED, TOLD
from trials.damage import Damage
from trials.outcome import Outcome, in_child

CONFIG = synthetic.config(layers=2, experts=3)


def tried(folder: Path, *, refused: Mapping[str, Damage] = REFUSED) -> Iterator[Outcome]:
    """Every bad input once."""
    good = folder / "good"
    in_child(partial(synthetic.synthesize, good, CONFIG))
    yield from in_child(lambda: [_refusal(what, good, damage) for what, damage in refused.items()])
    yield from in_child(lambda: [_telling(what, good, *told) for what, told in TOLD.items()])
    yield from in_child(lambda: [_leaving(what, good, damage) for what, damage in LEFT_OUT.items()])


def _damaged(good: Path, damage: Damage, use: Callable[[Path], Outcome]) -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "hf"
        shutil.copytree(good, folder)
        damage(folder)
        return use(folder)


def _refusal(what: str, good: Path, damage: Damage) -> Outcome:
    def use(folder: Path) -> Outcome:
        try:
            front.plan(folder)
        except CheckpointError as error:
            problem = error.problems[0]
            named = bool(problem.file or problem.key or problem.expected)
            return Outcome(what=what, count=1, gave=f"{type(error).__name__}: {problem.what}", good=named)
        except Exception as error:  # the very thing that is looked for
            return Outcome(what=what, count=1, gave=f"a crash: {error!r}", good=False)
        return Outcome(what=what, count=1, gave="let through", good=False)

    return _damaged(good, damage, use)


def _telling(what: str, good: Path, damage: Damage, word: str) -> Outcome:
    def use(folder: Path) -> Outcome:
        (seen,) = after.verify(folder).checkpoints
        told = ", ".join(f"{each.count} {each.what}" for each in seen.unusual)
        front.convert(folder, folder.with_name("native"), dtype="fp8")
        same = after.verify(folder, folder.with_name("native"), by="bytes").good
        gave = f"carried along bit for bit; verify tells: {told}" if same else "other bits"
        return Outcome(what=what, count=1, gave=gave, good=same and word in told)

    return _damaged(good, damage, use)


def _leaving(what: str, good: Path, damage: Damage) -> Outcome:
    def use(folder: Path) -> Outcome:
        done = front.convert(folder, folder.with_name("native"), dtype="fp8")
        same = after.verify(folder.with_name("native"), good, by="bytes").good
        count = sum(len(part.keys) for part in done.left_out)
        gave = f"left out by name, and said: {count} tensors; the rest byte for byte" if same else "other bytes"
        return Outcome(what=what, count=1, gave=gave, good=same and count > 0)

    return _damaged(good, damage, use)
