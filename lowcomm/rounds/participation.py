"""Weights of replicas in a round, and rounds that drop replicas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lowcomm.comm.base import Comm
from lowcomm.feedback.none import NoFeedback
from lowcomm.reduce import Reducer
from lowcomm.tensors import rng


@dataclass(frozen=True)
class DroppedRounds:
    """Dropped communication (DiLoCo, arXiv:2311.08105, section 3): each round, each replica's delta is lost
    independently with some probability. That replica keeps its own parameters; its next delta is measured from the
    current anchor and so covers both rounds.

    The draw depends on seed and round only, so all replicas know who is missing. A round without any delta is skipped.

    Attributes:
        probability: of losing one replica's delta in one round, at least 0 and below 1.
        divide_by: "survivors" averages over the deltas that arrived; "all" counts missing ones as zero. The paper does
            not say which it uses.
        seed: of the draw.
    """

    probability: float
    divide_by: Literal["survivors", "all"] = "survivors"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.probability < 1:
            raise ValueError(f"DroppedRounds(probability={self.probability}): it must be at least 0 and below 1")
        if self.divide_by not in ("survivors", "all"):
            raise ValueError(f"DroppedRounds(divide_by={self.divide_by!r}): choose 'survivors' or 'all'")

    def arrived(self, round: int, num_replicas: int) -> list[bool]:
        """Whether each replica's delta arrives in this round, from 1."""
        draws = torch.rand(num_replicas, generator=rng(self.seed, "dropped", round), dtype=torch.float64)
        return (draws >= self.probability).tolist()


def check_number(name: str, options: Sequence[object] | None, members: Sequence[int]) -> None:
    """Check that a list has one entry for each replica.

    Raises:
        ValueError: naming both numbers.
    """
    if options is not None and len(options) != len(members):
        raise ValueError(f"{name} has {len(options)} entries for {len(members)} replicas; give one for each")


def check_participation(reducer: Reducer, weights: Sequence[float] | None, dropped: DroppedRounds | None) -> None:
    """Refuse what cannot be weighted.

    Raises:
        ValueError: for a weight that is not positive and finite; for a mean over the ranks that sent a place, whose
            weights are unknown; and for dropped rounds with a feedback, whose memory would be sent although its replica
            is dropped.
    """
    if weights is not None and any(not (w > 0 and math.isfinite(w)) for w in weights):
        raise ValueError(
            f"weights {list(weights)}: each must be positive and finite; leave a replica out to give it none"
        )
    if (weights is not None or dropped is not None) and not reducer.compressor.divides_by_all():
        raise ValueError(
            f"weights or dropped with {reducer.compressor}: its mean is over those that sent a place, however much "
            "they count; take divide_by='all'"
        )
    if dropped is not None and not isinstance(reducer.feedback, NoFeedback):
        raise ValueError(
            f"dropped with {reducer.feedback}: what it remembers would be sent by a lost replica too; take NoFeedback"
        )


def counted(members: Sequence[int], *options: object) -> list[int]:
    """The first members, to which weights or dropped rounds refer; empty without such options."""
    return list(members) if any(option is not None for option in options) else []


def factor(
    round: int,
    comm: Comm,
    replicas: Sequence[int],
    weights: Sequence[float] | None,
    dropped: DroppedRounds | None,
) -> float | None:
    """This replica's factor on its delta, so that the plain mean becomes the weighted mean over arrivals.

    0: this replica's delta is dropped; None: all are.

    Args:
        comm: of those who still take part.
        replicas: the members at the start, in whose order weights and draws are.
    """
    if weights is None and dropped is None:
        return 1.0  # without a look at all others, which thousands of replicas would each take
    places = [replicas.index(member) for member in comm.members]
    base = [1.0 if weights is None else weights[i] for i in places]
    arrived = [True] * len(replicas) if dropped is None else dropped.arrived(round, len(replicas))
    shares = [w if arrived[i] else 0.0 for w, i in zip(base, places, strict=True)]
    by_all = dropped is not None and dropped.divide_by == "all"
    total = sum(base) if by_all else sum(shares)
    return shares[comm.place] * len(places) / total if any(shares) else None
