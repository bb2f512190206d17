"""Faults drawn at random: lifetimes of ranks and regions, and preemptions, each from a seed of its own."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lowcomm.sim.cluster.faults import Event, Fault, Preempt, RegionShock, check_repair, outage
from lowcomm.sim.cluster.inputs import check_positive
from lowcomm.tensors import rng


class Drawn(Fault, ABC):
    """A fault that draws random numbers by its class and ``seed``."""

    seed: int

    def streams(self) -> Sequence[tuple[str, int]]:
        return ((type(self).__name__, self.seed),)


@dataclass(frozen=True)
class Weibull(Drawn):
    """Ranks that live for Weibull-distributed times.

    A shape below 1 is what failure logs show: who has just started, or just failed, fails sooner.

    Attributes:
        mtbf_s: mean lifetime of one rank, from its start or return.
        until_s: the last moment at which a rank crashes.
        shape: 1 is exponential.
        repair_s: from a crash to the return; None for never.
    """

    mtbf_s: float
    until_s: float
    shape: float = 0.7
    repair_s: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("mtbf_s", self.mtbf_s)
        check_positive("until_s", self.until_s)
        if not 0.01 <= self.shape < math.inf:
            raise ValueError(f"shape is {self.shape}; it must be at least 0.01 and finite (1 is exponential)")
        check_repair(self.repair_s)

    def events(self, regions: Sequence[str]) -> list[Event]:
        """Crashes and returns of every rank."""
        scale_s = self.mtbf_s / math.gamma(1 + 1 / self.shape)
        events: list[Event] = []
        for rank in range(len(regions)):
            lifetimes = (scale_s * e ** (1 / self.shape) for e in _exponentials(self.seed, "Weibull", rank))
            for at_s in _deaths(lifetimes, self.until_s, self.repair_s):
                events += outage(rank, at_s, self.repair_s)
        return events


@dataclass(frozen=True)
class Poisson(Fault):
    """Ranks that crash at a constant rate: `Weibull` of shape 1."""

    mtbf_s: float
    until_s: float
    repair_s: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._lifetimes()

    def _lifetimes(self) -> Weibull:
        return Weibull(self.mtbf_s, self.until_s, 1.0, self.repair_s, self.seed)

    def streams(self) -> Sequence[tuple[str, int]]:
        return self._lifetimes().streams()

    def events(self, regions: Sequence[str]) -> list[Event]:
        """Crashes and returns of every rank."""
        return self._lifetimes().events(regions)


@dataclass(frozen=True)
class RegionShocks(Drawn):
    """Regions that crash as a whole at a constant rate, as by a power cut.

    Attributes:
        mtbf_s: mean time between a region's return and its next shock.
        until_s: the last moment of a shock.
        repair_s: from a shock to the return of all ranks there; None for never.
    """

    mtbf_s: float
    until_s: float
    repair_s: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("mtbf_s", self.mtbf_s)
        check_positive("until_s", self.until_s)
        check_repair(self.repair_s)

    def events(self, regions: Sequence[str]) -> list[Event]:
        """Crashes and returns of every region's ranks."""
        events: list[Event] = []
        for region in sorted(set(regions)):
            lifetimes = (self.mtbf_s * e for e in _exponentials(self.seed, "RegionShocks", region))
            for at_s in _deaths(lifetimes, self.until_s, self.repair_s):
                events += RegionShock(region, at_s, self.repair_s).events(regions)
        return events


@dataclass(frozen=True)
class Preemptions(Drawn):
    """Ranks that are taken away at a constant rate, each after a notice of uniformly distributed length.

    Attributes:
        mean_s: mean time between a rank's start or return and its next notice.
        until_s: the last moment of a notice.
        notice_min_s: the shortest notice.
        notice_max_s: the longest.
        repair_s: from the crash to the return; None for never.
    """

    mean_s: float
    until_s: float
    notice_min_s: float = 30.0
    notice_max_s: float = 120.0
    repair_s: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("mean_s", self.mean_s)
        check_positive("until_s", self.until_s)
        check_repair(self.repair_s)
        if not 0 <= self.notice_min_s <= self.notice_max_s < math.inf:
            raise ValueError(
                f"notices last from {self.notice_min_s} to {self.notice_max_s} s; notice_min_s must be at least 0 and "
                "at most notice_max_s"
            )

    def events(self, regions: Sequence[str]) -> list[Event]:
        """Notices, crashes and returns of every rank."""
        events: list[Event] = []
        for rank in range(len(regions)):
            at_s = 0.0
            draws = _exponentials(self.seed, "Preemptions", rank)
            for wait, for_notice in zip(draws, draws, strict=True):  # two of the same row at a time
                at_s += self.mean_s * wait
                if at_s > self.until_s:
                    break
                # exp(-e) of an exponential e is uniform
                notice_s = self.notice_min_s + (self.notice_max_s - self.notice_min_s) * math.exp(-for_notice)
                events += Preempt(rank, at_s, notice_s, self.repair_s).events(regions)
                if self.repair_s is None:
                    break
                at_s += notice_s + self.repair_s
        return events


def _exponentials(seed: int, kind: str, whose: str | int) -> Iterator[float]:
    """Exponential numbers of mean 1, without end."""
    generator = rng(seed, "faults", kind, whose)
    while True:
        uniforms = torch.rand(16, dtype=torch.float64, generator=generator, device="cpu")
        yield from (-torch.log1p(-uniforms)).tolist()


def _deaths(lifetimes: Iterator[float], until_s: float, repair_s: float | None) -> Iterator[float]:
    """When one dies that lives for ``lifetimes``, each from the start or the return after ``repair_s``."""
    at_s = 0.0
    for lifetime in lifetimes:
        at_s += lifetime
        if at_s > until_s:
            return
        yield at_s
        if repair_s is None:
            return
        at_s += repair_s
