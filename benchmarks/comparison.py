"""Methods beside each other: by how much one is behind another, how sure that is, and whether a claim holds.

Two runs of one seed that differ in rounding alone, such as data parallel among 4 and among 8 replicas, end apart. The
largest such distance in a record is its `rounding`. A gap of methods is uncertain by that over the square root of the
number of seeds that both have, or by half of the gap's range over these if that is more. What lies within that of its
limit is a tie.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

from benchmarks.methods import Claim
from benchmarks.record import Runs


def loss_of(result: dict[str, object]) -> float:
    """Its validation loss, infinite if it diverged."""
    loss = result["val_loss"]
    return float("inf") if loss is None or loss != loss else float(str(loss))


def rounding(results: Runs) -> float | None:
    """The largest relative distance of runs of data parallel that differ in replicas alone; None without any."""
    alike: dict[tuple[str, str, str], list[float]] = {}
    for key, run in results.items():
        method, _, tuned, seed = key.split(" | ")
        if method.split(",")[0] == "data parallel":
            alike.setdefault((method, tuned, seed), []).append(loss_of(run))
    pairs = [pair for losses in alike.values() for pair in combinations(sorted(losses), 2)]
    return max((high / low - 1 for low, high in pairs), default=None)


@dataclass(frozen=True)
class Gap:
    """By which part of the other's loss, or perplexity, a method's is higher.

    Attributes:
        error: how far it may be off; None where the record cannot say.
    """

    value: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.value:+.2%}" + ("" if self.error is None else f" ± {100 * self.error:.2f}")

    def holds(self, limit: float) -> str:
        """Whether it is at most ``limit``: yes, no, or a tie."""
        if self.error is not None and abs(self.value - limit) <= self.error:
            return "tie"
        return ("yes" if self.value <= limit else "no") + (", one run each" if self.error is None else "")


@dataclass(frozen=True)
class Row:
    """A method with a number of replicas at its best choice.

    Attributes:
        tuned: the choice.
        losses: by seed.
        edge: on which side no worse rate was tried; "" if on neither.
    """

    name: str
    num_replicas: int
    tuned: object
    losses: dict[int, float]
    wire_bytes: float
    edge: str = ""

    @property
    def loss(self) -> float:
        """Of its seeds, the mean."""
        return statistics.fmean(self.losses.values())

    @property
    def spread(self) -> float:
        """Half of the range of its seeds."""
        return (max(self.losses.values()) - min(self.losses.values())) / 2

    def behind(self, other: Row, noise: float | None = None, in_perplexity: bool = False) -> Gap:
        """The gap over the seeds that both have; seed 0 always is one.

        Args:
            noise: `rounding`.
            in_perplexity: of e to the loss instead.
        """
        seeds = sorted(self.losses.keys() & other.losses.keys())
        mine, its = (statistics.fmean(row.losses[seed] for seed in seeds) for row in (self, other))
        relative = (lambda a, b: math.expm1(a - b)) if in_perplexity else (lambda a, b: a / b - 1)
        gaps = [relative(self.losses[seed], other.losses[seed]) for seed in seeds]
        if noise is None:
            return Gap(relative(mine, its), None)
        error = relative(its * (1 + noise), its) / math.sqrt(len(seeds))
        return Gap(relative(mine, its), max(error, (max(gaps) - min(gaps)) / 2))


def held(rows: Iterable[Row], claims: Iterable[Claim], noise: float | None) -> list[tuple[Claim, int, Gap, str]]:
    """Each claim with each number of replicas for which both methods have runs."""
    by_key = {(row.name, row.num_replicas): row for row in rows}
    numbers = list(dict.fromkeys(n for _, n in by_key))
    found = []
    for claim in claims:
        for n in numbers:
            mine, other = by_key.get((claim.method, n)), by_key.get((claim.other, n))
            if mine and other:
                gap = mine.behind(other, noise, claim.in_perplexity)
                found.append((claim, n, gap, gap.holds(claim.limit)))
    return found
