"""How much each replica counts in a round, and the rounds it misses."""

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
    """Dropped communication (DiLoCo, arXiv:2311.08105, section 3): at each round every replica's delta is lost with
    some probability, independently. That replica goes on from its own parameters; its next delta is measured from the
    current anchor and so covers both rounds.

    The draw depends on seed and round only, so every replica knows who is missing. A round that nobody reaches is
    skipped.

    Attributes:
        probability: of losing one replica's delta in one round, at least 0 and below 1.
        divide_by: "survivors" averages over those that arrived; "all" counts the missing as zero, which shortens the
            step. The paper does not say which it uses.
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
        """Whether each replica's delta arrives in this round (from 1)."""
        draws = torch.rand(num_replicas, generator=rng(self.seed, "dropped", round), dtype=torch.float64)
        return (draws >= self.probability).tolist()


def check_weights(weights: Sequence[float] | None) -> None:
    """Refuse weights that cannot be shares, or lack one of the members.

    Raises:
        ValueError: for a weight that is not positive and finite.
    """
    if weights is not None and any(not (w > 0 and math.isfinite(w)) for w in weights):
        raise ValueError(
            f"weights {list(weights)}: each must be positive and finite; leave a replica out to give it none"
        )


def check_number(name: str, options: Sequence[object] | None, members: Sequence[int]) -> None:
    """Refuse a list of something for each replica that has too many or too few.

    Raises:
        ValueError: naming both numbers.
    """
    if options is not None and len(options) != len(members):
        raise ValueError(f"{name} has {len(options)} entries for {len(members)} replicas; give one for each")


def check_participation(reducer: Reducer, weights: Sequence[float] | None, dropped: DroppedRounds | None) -> None:
    """Refuse reducers in which a replica's share is not what its factor says.

    Raises:
        ValueError: for a mean over those that sent a place, of whom nobody knows how much they count; and for lost
            rounds with a feedback, whose memory would be sent although its replica is lost.
    """
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
    """The replicas that ``options`` are about, weights or lost rounds: the first members, or nobody without any."""
    return list(members) if any(option is not None for option in options) else []


def factor(
    round: int,
    comm: Comm,
    replicas: Sequence[int],
    weights: Sequence[float] | None,
    dropped: DroppedRounds | None,
) -> float | None:
    """What a replica multiplies its delta by before the plain mean, to make it the weighted mean over arrivals.

    A factor of 1 everywhere is the plain mean; 0: this replica's delta is lost; None: nobody's arrives.

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
