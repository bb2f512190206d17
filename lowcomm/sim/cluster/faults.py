"""Faults: events on the virtual clock, and a plan that merges and checks them.

`lowcomm.sim.cluster.lifetimes` draws faults at random. Times are virtual seconds from 0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Literal

from lowcomm.sim.cluster.inputs import check_positive, parsed, read_csv


class Fault(ABC):
    """A cause of events."""

    @abstractmethod
    def events(self, regions: Sequence[str]) -> list[Event]:
        """What happens, in a cluster whose rank i stands in ``regions[i]``; in any order of time."""

    def streams(self) -> Sequence[tuple[str, int]]:
        """Which random numbers it draws, as (kind, seed)."""
        return ()


class Event(Fault, ABC):
    """Something that happens at ``at_s``, mostly to one rank. An event is also a `Fault` with itself as the only
    event.
    """

    rank: int
    at_s: float

    def events(self, regions: Sequence[str]) -> list[Event]:
        return [self]

    def ranks(self) -> Sequence[int]:
        """The ranks concerned."""
        return (self.rank,)


@dataclass(frozen=True)
class Crash(Event):
    """A rank is lost with its whole state."""

    rank: int
    at_s: float


@dataclass(frozen=True)
class Rejoin(Event):
    """A crashed rank returns without state."""

    rank: int
    at_s: float


@dataclass(frozen=True)
class Notice(Event):
    """A rank learns that it will crash at ``crash_at_s``; the `Crash` is an event of its own.

    Nothing else happens at ``at_s``, and no method listens to it yet: the rank computes on until the crash.
    """

    rank: int
    at_s: float
    crash_at_s: float

    def __post_init__(self) -> None:
        if not self.crash_at_s >= self.at_s:
            raise ValueError(f"crash_at_s is {self.crash_at_s}, before its notice at {self.at_s} s; put it later")


@dataclass(frozen=True)
class Pause(Event):
    """A rank's process is frozen for some seconds, as by SIGSTOP, and then continues.

    It does not compute, send or notice arrivals. Its pending messages still move, also in collectives (a real ring that
    needs this process to forward would stop), and it does not count as lost.
    """

    rank: int
    at_s: float
    seconds: float

    def __post_init__(self) -> None:
        check_positive("seconds", self.seconds)


@dataclass(frozen=True)
class SlowDown(Event):
    """A rank is slower for some seconds.

    Attributes:
        factor: how many times slower; below 1 it is faster.
        what: "compute" for its steps, "network" for its up-link and down-link.
    """

    rank: int
    factor: float
    at_s: float
    seconds: float
    what: Literal["compute", "network"] = "compute"

    def __post_init__(self) -> None:
        check_positive("factor", self.factor)
        check_positive("seconds", self.seconds)
        if self.what not in ("compute", "network"):
            raise ValueError(f'what is {self.what!r}; it must be "compute" or "network"')


@dataclass(frozen=True)
class Partition(Event):
    """Ranks of different groups cannot reach each other for some seconds; pending messages wait, none is lost.

    Attributes:
        groups: of ranks; unnamed ranks form one more group.
    """

    groups: Sequence[Sequence[int]]
    at_s: float
    seconds: float

    def __post_init__(self) -> None:
        check_positive("seconds", self.seconds)
        named = self.ranks()
        if not named or not all(self.groups):
            raise ValueError(f"groups is {self.groups}; it needs at least one group, and each at least one rank")
        if len(set(named)) != len(named):
            raise ValueError(f"groups is {self.groups}; a rank may stand in one group only")

    def ranks(self) -> Sequence[int]:
        """All that are named."""
        return [rank for group in self.groups for rank in group]

    def pairs(self, num_ranks: int) -> list[tuple[int, int]]:
        """Every (source, to) that cannot reach each other."""
        group_of = {rank: i for i, group in enumerate(self.groups) for rank in group}
        everyone = range(num_ranks)
        return [(a, b) for a in everyone for b in everyone if group_of.get(a) != group_of.get(b)]


@dataclass(frozen=True)
class Preempt(Fault):
    """A rank is taken away after a notice, as clouds do with spot machines (30 to 120 seconds).

    Attributes:
        at_s: of the notice.
        notice_s: from the notice to the crash.
        repair_s: from the crash until a machine takes its place; None for never.
    """

    rank: int
    at_s: float
    notice_s: float = 30.0
    repair_s: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.notice_s < math.inf:
            raise ValueError(f"notice_s is {self.notice_s}; it must be at least 0 and finite")
        check_repair(self.repair_s)

    def events(self, regions: Sequence[str]) -> list[Event]:
        """The notice, the crash, the return."""
        crash_at_s = self.at_s + self.notice_s
        return [Notice(self.rank, self.at_s, crash_at_s), *outage(self.rank, crash_at_s, self.repair_s)]


@dataclass(frozen=True)
class RegionShock(Fault):
    """All ranks of a region crash at once.

    Attributes:
        repair_s: until they all are there again; None for never.
    """

    region: str
    at_s: float
    repair_s: float | None = None

    def __post_init__(self) -> None:
        check_repair(self.repair_s)

    def events(self, regions: Sequence[str]) -> list[Event]:
        """A crash, and a return, of every rank there; ValueError for an unknown region."""
        if self.region not in regions:
            raise ValueError(f"there is no region {self.region!r}; the cluster has {sorted(set(regions))}")
        hit = [rank for rank, region in enumerate(regions) if region == self.region]
        return [event for rank in hit for event in outage(rank, self.at_s, self.repair_s)]


@dataclass(frozen=True)
class Availability(Fault):
    """When each rank was there, from a CSV file with the header ``worker,t_up,t_down``, one interval a line.

    Times are in seconds and rise within a worker, which is a rank; an empty ``t_down`` means until the end. A rank
    without a line is an error: one that is always there has the line ``rank,0,``.
    """

    path: str

    def events(self, regions: Sequence[str]) -> list[Event]:
        """A crash at the end of each interval, a return at the start of each but at 0."""
        found: dict[int, list[tuple[float, float]]] = {rank: [] for rank in range(len(regions))}
        for where, (worker, t_up, t_down) in read_csv(self.path, ("worker", "t_up", "t_down")):
            rank, up = parsed(where, worker, int), parsed(where, t_up, float)
            down = parsed(where, t_down, float) if t_down.strip() else math.inf
            _check_rank(where, rank, len(regions))
            last = found[rank][-1][1] if found[rank] else 0.0
            if not last <= up < down:
                raise ValueError(
                    f"{where}: rank {rank} is there from {up} to {down} s, after its interval that ended at {last} s; "
                    "times must not go back"
                )
            found[rank].append((up, down))
        events: list[Event] = []
        for rank, intervals in found.items():
            if not intervals:
                raise ValueError(f"{self.path} has no line for rank {rank}; one that is always there has {rank},0,")
            ends = [(0.0, 0.0), *intervals, (math.inf, math.inf)]
            for (_, down), (up, _) in pairwise(ends):
                events += [Crash(rank, down)] if down < up else []
                events += [Rejoin(rank, up)] if down < up < math.inf else []
        return events


@dataclass(frozen=True)
class FaultPlan:
    """All faults of a run.

    Attributes:
        faults: single events must be in order of time; faults of several events may be anywhere.
    """

    faults: Sequence[Fault] = ()

    def __post_init__(self) -> None:
        listed = [fault for fault in self.faults if isinstance(fault, Event)]
        for earlier, later in pairwise(listed):
            if later.at_s < earlier.at_s:
                raise ValueError(f"{later} is listed after {earlier}, but happens before it; list events by time")
        streams = [stream for fault in self.faults for stream in fault.streams()]
        for kind, seed in streams:
            if streams.count((kind, seed)) > 1:
                kinds = "Weibull or Poisson" if kind == "Weibull" else kind
                raise ValueError(
                    f"two faults are {kinds} with seed {seed} and would draw the same numbers; change a seed"
                )

    def events(self, regions: Sequence[str]) -> list[Event]:
        """All events by time, in a cluster whose rank i is in ``regions[i]``.

        Overlapping outages of a rank are one crash and one return, at the end of the last. Other events during an
        outage stay in the list without effect. At equal times returns come before crashes.

        Raises:
            ValueError: for an unknown rank or region, a time below 0, a return of a rank that is not down, and when at
                some moment every rank is down.
        """
        num_ranks = len(regions)
        merged = sorted((event for fault in self.faults for event in fault.events(regions)), key=_order)
        num_causes, num_down = [0] * num_ranks, 0
        kept: list[Event] = []
        for at_s, moment in groupby(merged, key=lambda event: event.at_s):
            for event in moment:
                for rank in event.ranks():
                    _check_rank(str(event), rank, num_ranks)
                if not 0 <= at_s < math.inf:
                    raise ValueError(f"{event}: at_s is {at_s}; it must be at least 0 and finite")
                if isinstance(event, Crash):
                    num_causes[event.rank] += 1
                    if num_causes[event.rank] > 1:
                        continue
                    num_down += 1
                if isinstance(event, Rejoin):
                    if num_causes[event.rank] == 0:
                        raise ValueError(f"{event}: rank {event.rank} is not down then; let it crash before")
                    num_causes[event.rank] -= 1
                    if num_causes[event.rank] > 0:
                        continue
                    num_down -= 1
                kept.append(event)
            if num_down == num_ranks:
                raise ValueError(
                    f"at {at_s} s all {num_ranks} ranks are down and nobody is left to go on from; spare one, or make "
                    "faults rarer or repairs shorter"
                )
        return kept


def outage(rank: int, at_s: float, repair_s: float | None) -> list[Event]:
    """A crash, and a return ``repair_s`` later unless that is None."""
    return [Crash(rank, at_s)] if repair_s is None else [Crash(rank, at_s), Rejoin(rank, at_s + repair_s)]


def check_repair(repair_s: float | None) -> None:
    """Raise ValueError unless a time of repair is positive and finite, or None for never."""
    if repair_s is not None:
        check_positive("repair_s", repair_s)


# At one moment: what ends, what begins, what breaks.
_KINDS = (Rejoin, Notice, Pause, SlowDown, Partition, Crash)


def _order(event: Event) -> tuple[float, int, tuple[int, ...]]:
    return event.at_s, _KINDS.index(type(event)), tuple(event.ranks())


def _check_rank(where: str, rank: int, num_ranks: int) -> None:
    if not 0 <= rank < num_ranks:
        raise ValueError(f"{where}: there is no rank {rank}; the cluster has ranks 0 to {num_ranks - 1}")
