"""Who counts as a straggler, and which patterns of straggling a sequential code bears.

From Krishnan, Ebrahimi, Khisti 2023 (arXiv:2211.13802): in any W consecutive rounds at most lambda workers straggle,
and bursts are short: who straggles in a round did not from W - 1 to B rounds before.

Differs from the paper in: nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bursts:
    """A pattern of straggling that can be borne.

    Attributes:
        length: B, rounds that a burst may last.
        window: W, in rounds.
        num_stragglers: lambda, how many different workers may straggle in a window.
    """

    length: int
    window: int
    num_stragglers: int

    def bears(self, past: Sequence[frozenset[int]], now: frozenset[int]) -> bool:
        """Whether these may straggle now, after those of the rounds before, of which the last is the newest."""
        recent = past[max(0, len(past) - self.window + 1) :]
        apart = recent[: len(recent) - self.length + 1]
        too_soon = any(now & before for before in apart)
        return len(now.union(*recent)) <= self.num_stragglers and not too_soon


@dataclass(frozen=True)
class Ended:
    """How a round ended for its master.

    Attributes:
        seconds: that it took.
        stragglers: whose results are missing.
        waited_out: whether everyone was waited for, though some were slow.
    """

    seconds: float
    stragglers: frozenset[int]
    waited_out: bool = False


def end_round(seconds: Sequence[float], bursts: Bursts, past: Sequence[frozenset[int]], patience: float = 1.0) -> Ended:
    """End a round without its stragglers, if the code bears it, else with everyone.

    Args:
        seconds: what each worker takes.
        past: stragglers of the rounds before.
        patience: mu; a straggler takes longer than 1 + mu times the fastest.
    """
    limit_s = (1 + patience) * min(seconds)
    slow = frozenset(worker for worker, s in enumerate(seconds) if s > limit_s)
    if not slow:
        return Ended(max(seconds), slow)
    if bursts.bears(past, slow):
        return Ended(limit_s, slow)
    return Ended(max(seconds), frozenset(), waited_out=True)
