"""What comes in and what goes out: arrivals, decisions, and the role of a rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

S = TypeVar("S")
Late = Literal["carry", "drop"]


@dataclass(frozen=True)
class Measured:
    """What a replica saw of a round that it took part in; a rule may learn from it.

    Attributes:
        round: which.
        loss: on the parameters that the round began with.
        mean_square: squared norm of the mean that the round brought.
        apart_square: squared norm of what this replica gave minus that mean.
    """

    round: int
    loss: float
    mean_square: float
    apart_square: float


@dataclass(frozen=True)
class Arrival:
    """A replica is ready for a round.

    Attributes:
        replica: its number.
        at_s: when, on the clock of who decides.
        version: the last round whose result it holds; 0 before any.
        step: inner steps that it has done.
        tokens_done: tokens that its process has trained on since it started, without those whose work it threw away.
            What of them is new to the next round, the meeting works out: a replica cannot always know what arrived.
        seconds: of work since it arrived last.
        measured: of an earlier round.
    """

    replica: int
    at_s: float
    version: int
    step: int
    tokens_done: float
    seconds: float = 0.0
    measured: Measured | None = None


@dataclass(frozen=True)
class Wait:
    """Not yet.

    Attributes:
        until_s: ask again then, or at the next arrival, join or leave; None: only then.
    """

    until_s: float | None = None


@dataclass(frozen=True)
class Take:
    """Now, with these.

    Attributes:
        replicas: who takes part, sorted.
    """

    replicas: tuple[int, ...]


@dataclass(frozen=True)
class RoundReport:
    """A round that was just decided.

    Attributes:
        round: which.
        begun_s: when the one before was decided, so that work on this one began.
        decided_s: when it was decided.
        num_counted: how many of its members bring something that counts.
        num_present: who could have.
    """

    round: int
    begun_s: float
    decided_s: float
    num_counted: int
    num_present: int


class Rule(ABC, Generic[S]):
    """When a round goes on without those who are late. A frozen dataclass of options; what it learns is in ``S``.

    All methods are pure: they depend on their arguments alone, and states are replaced, not changed. Who has left is
    not waited for, and nobody waits for more replicas than are present.
    """

    @abstractmethod
    def init(self, num_replicas: int) -> S:
        """The state before the first round.

        Args:
            num_replicas: how many are expected; more may come.
        """

    @abstractmethod
    def decide(
        self, state: S, arrivals: Sequence[Arrival], present: Sequence[int], begun_s: float, now_s: float
    ) -> Take | Wait:
        """Whether the round goes on now.

        Args:
            arrivals: of those who bring something that counts, in the order in which they came.
            present: who is here and brings something or may still do so, sorted.
            begun_s: when the last round was decided.
        """

    def hear(self, state: S, arrival: Arrival) -> S:
        """The state after an arrival, also a late one; by default the same."""
        return state

    def observe(self, state: S, ended: RoundReport) -> S:
        """The state after a decision; by default the same."""
        return state

    def learn(self, state: S, measured: Measured) -> S:
        """The state after a member of a round has told what it saw of it; by default the same."""
        return state


def take(arrivals: Sequence[Arrival]) -> Take:
    """All who have arrived: whoever is there when the round goes on costs nothing more."""
    return Take(tuple(sorted(arrival.replica for arrival in arrivals)))
