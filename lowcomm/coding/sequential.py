"""Sequential gradient coding (Krishnan, Ebrahimi, Khisti 2023, arXiv:2211.13802): codes over rounds.

Job t, a gradient, begins in round t and must be known after round t + T. That needs T + 1 jobs that do not depend on
each other, such as models trained side by side; one run of SGD cannot use it.

- `Repeated`, SR-SGC: a (n, s) gradient code with s = ceil(B lambda / (W - 1 + B)). If v > s results of job r - B are
  missing, then in round r the first v - s of those workers do their part of that job instead of one of job r; T = B.
- `Multiplexed`, M-SGC: a job is (W - 1) n chunks of share (lambda + 1) / Z, W - 1 for each worker alone, and B groups
  of n chunks of share 1 / Z, each in a (n, lambda) gradient code; Z = n (B + (W - 1)(lambda + 1)). Each round a worker
  does W - 1 + B parts, part m for job r - m: its own chunks, then what of them failed, then groups; T = W - 2 + B.

Differs from the paper in: schedules only, on which the simulator runs; nothing is encoded. A master waits for everyone
when stragglers would exceed what the code bears.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field

from lowcomm.coding.stragglers import Bursts


@dataclass(frozen=True)
class Part:
    """What a worker does for a job in a round.

    Attributes:
        job: from 1.
        chunk: which of the worker's own chunks; None for its share of a coded group.
        group: which coded group; None for a chunk of its own.
    """

    job: int
    chunk: int | None = None
    group: int | None = None


@dataclass
class Progress:
    """Attributes:
    done: of each job, the parts that each worker delivered.
    """

    done: dict[int, dict[int, set[Part]]] = field(default_factory=dict)

    def of(self, job: int, worker: int) -> set[Part]:
        """What a worker has delivered of a job."""
        return self.done.get(job, {}).get(worker, set())

    def deliver(self, worker: int, parts: Iterable[Part]) -> None:
        """A worker's results of a round came."""
        for part in parts:
            self.done.setdefault(part.job, {}).setdefault(worker, set()).add(part)

    def forget(self, job: int) -> None:
        """A job is decoded."""
        self.done.pop(job, None)


class Schedule(ABC):
    """What each worker does in each round. Frozen; what came in is in a `Progress`."""

    num_workers: int
    bursts: Bursts

    @property
    @abstractmethod
    def load(self) -> float:
        """The share of a job's batch that each worker computes in a round."""

    @property
    @abstractmethod
    def delay(self) -> int:
        """T: job t is known after round t + T."""

    @abstractmethod
    def parts(self, round: int, num_jobs: int, progress: Progress) -> list[list[Part]]:
        """What each worker does in a round from 1 to ``num_jobs + delay``."""

    @abstractmethod
    def is_known(self, job: int, progress: Progress) -> bool:
        """Whether a job's gradient can be decoded."""


@dataclass(frozen=True)
class Repeated(Schedule):
    """SR-SGC. With a window of one round it is a gradient code in each round alone, without stragglers none.

    Attributes:
        num_workers: n.
        bursts: what is borne; its length divides window - 1.
    """

    num_workers: int
    bursts: Bursts

    def __post_init__(self) -> None:
        check_bursts(self, self.bursts, self.num_workers)
        if (self.bursts.window - 1) % self.bursts.length:
            raise ValueError(f"{self}: the length of bursts must divide their window - 1; 2 and 3 do, for example")

    @property
    def num_missing(self) -> int:
        """s: results of a job that may be missing."""
        b = self.bursts
        return math.ceil(b.length * b.num_stragglers / (b.window - 1 + b.length))

    @property
    def load(self) -> float:
        return (self.num_missing + 1) / self.num_workers

    @property
    def delay(self) -> int:
        return self.bursts.length if self.bursts.window > 1 else 0

    def parts(self, round: int, num_jobs: int, progress: Progress) -> list[list[Part]]:
        earlier = round - self.delay  # the job that is due now
        missing = [i for i in range(self.num_workers) if not progress.of(earlier, i)]
        again = set(missing[: max(0, len(missing) - self.num_missing)]) if 1 <= earlier < round else set()
        usual = [Part(round, group=0)] if round <= num_jobs else []
        return [[Part(earlier, group=0)] if i in again else usual for i in range(self.num_workers)]

    def is_known(self, job: int, progress: Progress) -> bool:
        came = sum(bool(progress.of(job, i)) for i in range(self.num_workers))
        return came >= self.num_workers - self.num_missing


@dataclass(frozen=True)
class Multiplexed(Schedule):
    """M-SGC.

    Attributes:
        num_workers: n.
        bursts: what is borne; shorter than their window.
    """

    num_workers: int
    bursts: Bursts

    def __post_init__(self) -> None:
        check_bursts(self, self.bursts, self.num_workers)
        if self.bursts.length >= self.bursts.window:
            raise ValueError(f"{self}: bursts must be shorter than their window; 1 and 2 are, for example")

    @property
    def num_own(self) -> int:
        """W - 1: chunks that a worker does alone."""
        return self.bursts.window - 1

    @property
    def num_groups(self) -> int:
        """B: coded groups; none where all workers may straggle, since nobody else's chunks would help."""
        return self.bursts.length if self.bursts.num_stragglers < self.num_workers else 0

    @property
    def load(self) -> float:
        own, b, n = self.num_own, self.bursts, self.num_workers
        if not self.num_groups:
            return (own + b.length) / (n * own)
        return (b.num_stragglers + 1) * (own + b.length) / (n * (b.length + own * (b.num_stragglers + 1)))

    @property
    def delay(self) -> int:
        return self.bursts.window - 2 + self.bursts.length

    def parts(self, round: int, num_jobs: int, progress: Progress) -> list[list[Part]]:
        jobs = [(m, round - m) for m in range(self.delay + 1) if 1 <= round - m <= num_jobs]
        found = [[self._part(m, job, i, progress) for m, job in jobs] for i in range(self.num_workers)]
        return [[part for part in parts if part is not None] for parts in found]

    def is_known(self, job: int, progress: Progress) -> bool:
        done = [progress.of(job, i) for i in range(self.num_workers)]
        alone = all(Part(job, chunk=c) in parts for parts in done for c in range(self.num_own))
        needed = self.num_workers - self.bursts.num_stragglers
        return alone and all(sum(Part(job, group=g) in p for p in done) >= needed for g in range(self.num_groups))

    def _part(self, m: int, job: int, worker: int, progress: Progress) -> Part | None:
        if m < self.num_own:
            return Part(job, chunk=m)
        failed = [c for c in range(self.num_own) if Part(job, chunk=c) not in progress.of(job, worker)]
        if failed:
            return Part(job, chunk=failed[0])
        return Part(job, group=m - self.num_own) if self.num_groups else None


def check_bursts(schedule: Schedule, bursts: Bursts, num_workers: int) -> None:
    """Refuse patterns that no code bears.

    Raises:
        ValueError: naming the numbers.
    """
    if bursts.length < 1 or bursts.window < 1 or not 0 <= bursts.num_stragglers <= num_workers:
        raise ValueError(
            f"{schedule}: bursts last at least 1 round, in a window of at least 1, of 0 to {num_workers} workers"
        )
