"""What several processes saw of a checkpoint, each of its share of the pieces, known to all of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from minimax_jax.jobs.compare import Comparison
from minimax_jax.jobs.digests import Digest
from minimax_jax.jobs.look import Look
from minimax_jax.jobs.numbers import Unusual
from minimax_jax.jobs.team import Team


def shared(team: Team, looks: Sequence[Look]) -> list[Look]:
    """The looks of all processes in the order of the pieces, which are dealt out in turn.

    Args:
        team: the processes; all of them call this.
        looks: what this one saw, in the order of its pieces.

    Raises:
        PeerFailed: another process failed.
    """
    if team.count == 1:
        return list(looks)
    told = team.share(json.dumps([dataclasses.asdict(look) for look in looks]).encode())
    rounds = itertools.zip_longest(*(map(_look, json.loads(text)) for text in told))
    return [look for one in rounds for look in one if look is not None]


def _look(told: Mapping[str, Any]) -> Look:
    return Look(
        layer=told["layer"],
        digests=[[Digest(**each | {"shape": tuple(each["shape"])}) for each in some] for some in told["digests"]],
        unusual=[[Unusual(**each) for each in some] for some in told["unusual"]],
        comparisons=[Comparison(**each | {"dtypes": tuple(each["dtypes"])}) for each in told["comparisons"]],
        nbytes=told["nbytes"],
    )
