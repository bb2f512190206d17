"""How many gradients to wait for: static numbers of backup workers, dynamic ones as published, and ours.

    python -m benchmarks.backup_workers

16 workers compute noisy gradients of a quadratic of 50 dimensions for a parameter server, in virtual time. The server
takes the first k; a worker that is late finishes, its gradient is thrown away, and it goes on from the newest
parameters. A gradient takes (1 - a) + a Exp(1), a mean of 1; in some rows half of the workers become 5 times slower.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import parser, save_picture, table, write_record
from lowcomm.participation.base import Arrival, Measured, RoundReport, Rule, Take, Wait
from lowcomm.participation.dbw import DynamicBackup, published
from lowcomm.participation.rules import FirstK

NUM_WORKERS, DIMENSION = 16, 50
# An earlier table of ours does not say these. Spectrum, step and noise are fitted to its times of full synchronisation
# and of the best static number alone; the noise of a loss to the rows of dynamic workers, of which it is the only knob.
CURVATURE = np.linspace(0.1, 1.0, DIMENSION)
LR = 0.096
NOISE = 16.0  # trace of the covariance of a gradient
LOSS_NOISE = 0.2  # of a mini-batch's loss, relative


@dataclass(frozen=True)
class Row:
    """Attributes:
    a: how random the time of a gradient is.
    target: the loss to reach.
    slow_at_s: when half of the workers become slower.
    """

    a: float
    target: float
    slow_at_s: float | None = None

    def __str__(self) -> str:
        return f"{self.a:g}, {self.target:g}" + ("" if self.slow_at_s is None else f", slow from {self.slow_at_s:g} s")


# what that table says: full synchronisation, the best static number, dynamic with windows of 5 and 20
EARLIER: dict[Row, tuple[float, ...]] = {
    Row(0.2, 0.25): (72.6, 54.1, 54.5, 62.4),
    Row(0.2, 0.12): (103.2, 82.0, 84.3, 89.8),
    Row(0.2, 0.25, 20.0): (259.8, 57.8, 151.0, 103.1),
}
ROWS = (*EARLIER, Row(0.5, 0.25), Row(0.5, 0.12), Row(1.0, 0.25), Row(1.0, 0.12))
OURS = "ours"
DYNAMIC: dict[str, Rule[Any]] = {
    "published, D=5": published(LR, 5),
    "published, D=20": published(LR, 20),
    OURS: DynamicBackup(LR),
}


@dataclass(frozen=True)
class Switched(Rule[None]):
    """One number of gradients until a time, then another: what someone would choose who knew."""

    before: int
    after: int
    at_s: float

    def init(self, num_replicas: int) -> None:
        return None

    def decide(
        self, state: None, arrivals: Sequence[Arrival], present: Sequence[int], begun_s: float, now_s: float
    ) -> Take | Wait:
        return FirstK(self.before if now_s < self.at_s else self.after).decide(None, arrivals, present, begun_s, now_s)


@dataclass
class Run:
    """Attributes:
    seconds: until the target was reached.
    awaited: time of each decision, and how many gradients were in it.
    """

    seconds: float = float("nan")
    awaited: list[tuple[float, int]] = field(default_factory=list)


@dataclass
class Workers:
    """The workers' clocks."""

    row: Row
    seed: int

    def __post_init__(self) -> None:
        self.random = np.random.default_rng([self.seed, 0])

    def seconds(self, worker: int, start_s: float) -> float:
        """The time of a gradient that is begun then."""
        slow = self.row.slow_at_s is not None and start_s >= self.row.slow_at_s and worker < NUM_WORKERS // 2
        return ((1 - self.row.a) + self.row.a * self.random.exponential()) * (5 if slow else 1)


def run(rule: Rule[Any], row: Row, seed: int, max_s: float = 1000.0) -> Run:
    """Train until the target."""
    workers, random = Workers(row, seed), np.random.default_rng([seed, 1])
    w, ended, state = np.ones(DIMENSION), Run(), rule.init(NUM_WORKERS)
    busy = [(workers.seconds(i, 0.0), i, 0) for i in range(NUM_WORKERS)]  # until when, who, on which result
    heapq.heapify(busy)
    came: list[Arrival] = []
    round, begun_s, everyone = 0, 0.0, range(NUM_WORKERS)
    while True:
        now_s, worker, version = heapq.heappop(busy)
        arrival = Arrival(worker, now_s, version, round, 1)
        state = rule.hear(state, arrival)
        if version < round:
            heapq.heappush(busy, (now_s + workers.seconds(worker, now_s), worker, round))
            continue
        came.append(arrival)
        if not isinstance(rule.decide(state, came, everyone, begun_s, now_s), Take):
            continue
        round, k = round + 1, len(came)
        state = rule.observe(state, RoundReport(round, begun_s, now_s, k, NUM_WORKERS))
        ended.awaited.append((now_s, k))
        gradients = CURVATURE * w + random.normal(size=(k, DIMENSION)) * np.sqrt(NOISE / DIMENSION)
        mean, loss = gradients.mean(0), float(CURVATURE @ w**2 / 2)
        losses = loss * (1 + LOSS_NOISE * random.normal(size=k))
        for seen, apart in zip(losses, gradients - mean, strict=True):
            state = rule.learn(state, Measured(round, float(seen), float(mean @ mean), float(apart @ apart)))
        w = w - LR * mean
        if CURVATURE @ w**2 / 2 <= row.target or now_s > max_s:
            ended.seconds = now_s
            return ended
        for arrival in came:
            heapq.heappush(busy, (now_s + workers.seconds(arrival.replica, now_s), arrival.replica, round))
        came, begun_s = [], now_s


def seconds(rule: Rule[Any], row: Row, num_seeds: int) -> float:
    """Mean over seeds."""
    return float(np.mean([run(rule, row, seed).seconds for seed in range(num_seeds)]))


def measure(row: Row, num_seeds: int) -> dict[str, Any]:
    """Everything about a row: seconds by number of gradients, and by name of the dynamic rules."""
    static = {k: seconds(FirstK(k), row, num_seeds) for k in range(2, NUM_WORKERS + 1)}
    found: dict[str, Any] = {"static": static}
    for name, rule in DYNAMIC.items():
        found[name] = seconds(rule, row, num_seeds)
    if row.slow_at_s is not None:
        usual = {k: seconds(FirstK(k), Row(row.a, row.target), num_seeds) for k in static}
        before = min(usual, key=lambda k: usual[k])
        switched = {k: seconds(Switched(before, k, row.slow_at_s), row, num_seeds) for k in static}
        after = min(switched, key=lambda k: switched[k])
        awaited = run(Switched(before, after, row.slow_at_s), row, 0).awaited
        found["best of each regime"] = {"k": [before, after], "seconds": switched[after]}
        found["seconds of 20 rounds"] = 20 * awaited[-1][0] / len(awaited)
    return found


def limits(row: Row, found: dict[str, Any]) -> str:
    """What our dynamic rule is held to."""
    ours, static = found[OURS], found["static"]
    if row.slow_at_s is not None:
        regimes = found["best of each regime"]
        limit = 1.15 * regimes["seconds"] + found["seconds of 20 rounds"]
        return f"{ours:.1f} of {limit:.1f}: 1.15 times k = {regimes['k'][0]}, then {regimes['k'][1]}, and 20 rounds"
    full, best = ours / static[NUM_WORKERS], ours / min(static.values())
    return f"{full:.2f} of full (limit 1.03), {best:.2f} of the best static (limit 1.15)"


def save(given: argparse.Namespace, found: dict[Row, dict[str, Any]]) -> Path:
    """Write the table, the record and the pictures."""
    cells, held = [], []
    for row, seen in found.items():
        static: dict[int, float] = seen["static"]
        best = min(static, key=lambda k: static[k])
        mine = [static[NUM_WORKERS], static[best], *(seen[name] for name in DYNAMIC if name != OURS)]
        earlier = EARLIER.get(row, ())
        columns = [
            f"{x:.1f}" + (f" ({earlier[i]:g}, {x / earlier[i] - 1:+.0%})" if earlier else "")
            for i, x in enumerate(mine)
        ]
        columns[1] = f"k={best}: {columns[1]}"
        cells.append([str(row), *columns, f"{seen[OURS]:.1f}"])
        held.append([str(row), limits(row, seen)])
    columns = ["a, target", "full", "best static", *DYNAMIC]
    about = (
        f"Seconds to the target, means of {given.seeds} seeds; in brackets an earlier table and the difference. "
        "A gradient takes a second on average. Pictures: how many were awaited, of one run."
    )
    folder = write_record(
        given,
        {str(row): seen for row, seen in found.items()},
        "\n\n".join([about, table(columns, cells), table(["a, target", OURS], held)]),
    )
    for name, row in (("usual", Row(0.2, 0.12)), ("slow", Row(0.2, 0.25, 20.0))):
        curves = {which: [(s, float(k)) for s, k in run(rule, row, 0).awaited] for which, rule in DYNAMIC.items()}
        save_picture(folder / f"awaited_{name}.svg", "gradients awaited", [(f"seconds; {row}", False, curves)])
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and record."""
    flags = parser(__doc__, "backup_workers")
    flags.add_argument("--seeds", type=int, default=8)
    given = flags.parse_args(argv)
    print((save(given, {row: measure(row, given.seeds) for row in ROWS}) / "summary.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
