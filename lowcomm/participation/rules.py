"""Rules that learn nothing: all, the first k, a deadline, a quorum with grace.

`FirstK` is static backup workers (Chen et al. 2016, arXiv:1604.00981): of n replicas the n - k slowest back the others
up. Where late work is carried instead of dropped, it is STSyn (each round waits for the K fastest, and every completed
step counts).
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass

from lowcomm.participation.base import Arrival, Rule, Take, Wait, take


class Stateless(Rule[None], ABC):
    """A rule whose decisions depend on the present round alone."""

    def init(self, num_replicas: int) -> None:
        return None


@dataclass(frozen=True)
class All(Stateless):
    """Wait for everyone who is present."""

    def decide(
        self, state: None, arrivals: Sequence[Arrival], present: Sequence[int], begun_s: float, now_s: float
    ) -> Take | Wait:
        return take(arrivals) if present and len(arrivals) >= len(present) else Wait()


@dataclass(frozen=True)
class FirstK(Stateless):
    """Wait for the first ``k``, or for everyone when fewer are present.

    Attributes:
        k: how many, at least 1.
    """

    k: int

    def __post_init__(self) -> None:
        check_count("FirstK", "k", self.k)

    def decide(
        self, state: None, arrivals: Sequence[Arrival], present: Sequence[int], begun_s: float, now_s: float
    ) -> Take | Wait:
        return take(arrivals) if present and len(arrivals) >= min(self.k, len(present)) else Wait()


@dataclass(frozen=True)
class Deadline(Stateless):
    """Wait until a time after the last decision, or for everyone, whichever comes first.

    Attributes:
        deadline_s: counted from the last decision.
        at_least: how many there must be at the deadline; with fewer, the next to come ends the wait.
    """

    deadline_s: float
    at_least: int = 1

    def __post_init__(self) -> None:
        check_seconds("Deadline", "deadline_s", self.deadline_s)
        check_count("Deadline", "at_least", self.at_least)

    def decide(
        self, state: None, arrivals: Sequence[Arrival], present: Sequence[int], begun_s: float, now_s: float
    ) -> Take | Wait:
        if present and len(arrivals) >= len(present):
            return take(arrivals)
        if not present or len(arrivals) < min(self.at_least, len(present)):
            return Wait()
        return by(begun_s + self.deadline_s, arrivals, now_s)


@dataclass(frozen=True)
class Quorum(Stateless):
    """Wait for some, and then a little longer for others; for no one once everyone is there.

    Attributes:
        num: how many are enough: a number of replicas, or below 1 a share of those present.
        grace_s: how long after the last of them came.
    """

    num: float
    grace_s: float

    def __post_init__(self) -> None:
        if not (0 < self.num < 1 or (self.num >= 1 and float(self.num).is_integer())):
            raise ValueError(
                f"Quorum(num={self.num}): it must be a whole number of replicas, or a share between 0 and 1; "
                "0.5 waits for half of those present"
            )
        check_seconds("Quorum", "grace_s", self.grace_s)

    def decide(
        self, state: None, arrivals: Sequence[Arrival], present: Sequence[int], begun_s: float, now_s: float
    ) -> Take | Wait:
        wanted = math.ceil(self.num * len(present)) if self.num < 1 else min(int(self.num), len(present))
        if not present or len(arrivals) < wanted:
            return Wait()
        if len(arrivals) >= len(present):
            return take(arrivals)
        return by(arrivals[wanted - 1].at_s + self.grace_s, arrivals, now_s)


def by(until_s: float, arrivals: Sequence[Arrival], now_s: float) -> Take | Wait:
    """Those who have come by a time, or wait for it."""
    return take(arrivals) if now_s >= until_s else Wait(until_s)


def check_count(rule: str, name: str, value: int) -> None:
    """Refuse what is not a whole number of at least 1.

    Raises:
        ValueError: naming the rule and the number.
    """
    if value < 1 or int(value) != value:
        raise ValueError(f"{rule}({name}={value}): it must be a whole number of replicas, at least 1")


def check_seconds(rule: str, name: str, value: float) -> None:
    """Refuse what is no time to wait.

    Raises:
        ValueError: naming the rule and the number.
    """
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{rule}({name}={value}): it must be finite and at least 0 seconds; All waits for everyone")
