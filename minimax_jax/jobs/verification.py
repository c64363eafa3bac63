"""What a verification saw: digests of one checkpoint, or a comparison of two, weight by weight and layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from minimax_jax.display import Displayed
from minimax_jax.io.location import Location
from minimax_jax.jobs.compare import Comparison, Relation
from minimax_jax.jobs.digests import Digest, FileDigest, overall
from minimax_jax.jobs.held import Held
from minimax_jax.jobs.left_out import LeftOut
from minimax_jax.jobs.numbers import Unusual
from minimax_jax.jobs.sample import Sample
from minimax_jax.layout.check import Layout

By: TypeAlias = Literal["bytes", "value"]


@dataclass(frozen=True, kw_only=True)
class Digested:
    """One checkpoint, with the digests of what was looked at.

    Attributes:
        path: what was opened.
        layout: which layout it has.
        stored: how many tensors it holds, by the names of its layout, whether they were looked at or not.
        nbytes: bytes of all its tensors.
        digests: the stored tensors of its Hugging Face form that were looked at, in canonical order.
        config: digest of what its config.json says; see `digests.config_digest`.
        files: the files that hold them and that lie beside them.
        unusual: numbers that a sound checkpoint does not hold; they are told, and make no difference.
        unread: attributes of config.json that were left unread.
        left_out: tensors in its files that are not the model's.
        aside: their digests, by the names that they have there.
    """

    path: Location
    layout: Layout
    stored: int
    nbytes: int
    digests: tuple[Digest, ...]
    config: str
    files: tuple[FileDigest, ...]
    unusual: tuple[Unusual, ...]
    unread: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    aside: tuple[Digest, ...]

    @property
    def sha256(self) -> str:
        """One digest for all the tensors; see `overall`."""
        return overall(self.digests)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSummary:
    """What was seen of one layer.

    Attributes:
        layer: its number; None for what is outside of the layers.
        tensors: how many stored tensors, of each checkpoint.
        sha256: one digest for them, of each checkpoint.
        counts: how many weights have each relation; empty for one checkpoint alone.
        differing: how many elements differ in value.
        max_abs: largest absolute difference; NaN where a NaN stands against a number.
    """

    layer: int | None
    tensors: tuple[int, ...]
    sha256: tuple[str, ...]
    counts: Mapping[Relation, int]
    differing: int
    max_abs: float


@dataclass(frozen=True, kw_only=True, repr=False)
class Verification(Displayed):
    """What `verify` saw.

    Attributes:
        by: what was asked for.
        sample: which part was looked at; None for all of it.
        checkpoints: the one or two that were read.
        comparisons: every weight of the two; empty for one checkpoint alone.
        layers: the same in short, layer by layer.
        held: how the checkpoint compares with an earlier certificate, where one was given.
    """

    by: By
    sample: Sample | None
    checkpoints: tuple[Digested, ...]
    comparisons: tuple[Comparison, ...]
    layers: tuple[LayerSummary, ...]
    held: Held | None

    @property
    def good(self) -> bool:
        """Whether all weights agree as asked, and with the certificate."""
        return not any(self.failures) and (self.held is None or not self.held.mismatches)

    @property
    def failures(self) -> Iterator[Comparison]:
        """The weights that do not agree as asked."""
        allowed = ("identical",) if self.by == "bytes" else ("identical", "equal")
        return (comparison for comparison in self.comparisons if comparison.relation not in allowed)

    def views(self) -> Iterable[Any]:
        """What there is to look at."""
        from minimax_jax.jobs.verify_report import verification_view

        return verification_view(self)

    def count(self, relation: Relation) -> int:
        """How many weights have this relation."""
        return sum(comparison.relation == relation for comparison in self.comparisons)
