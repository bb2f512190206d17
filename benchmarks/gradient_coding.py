"""Seconds that gradient codes take among stragglers, in virtual time: in each round, over rounds, and none.

    python -m benchmarks.gradient_coding

256 workers whose slowness comes in bursts, and a master that ends a round at twice the fastest worker's time if the
code bears it, and else waits for everyone. A worker takes a base time and a time in proportion to its load, both times
a factor; the parameters are those of a published run on a cloud, whose own times are not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.record import parser, table, write_record
from lowcomm.coding.sequential import Multiplexed, Progress, Repeated, Schedule
from lowcomm.coding.stragglers import Bursts, end_round

NUM_WORKERS = 256
SCHEDULES: dict[str, Schedule] = {
    "M-SGC, B=1, W=2, lambda=27": Multiplexed(NUM_WORKERS, Bursts(1, 2, 27)),
    "SR-SGC, B=2, W=3, lambda=23": Repeated(NUM_WORKERS, Bursts(2, 3, 23)),
    "gradient code, s=15": Repeated(NUM_WORKERS, Bursts(1, 1, 15)),
    "no code": Repeated(NUM_WORKERS, Bursts(1, 1, 0)),
}
PUBLISHED_S = (916.37, 1019.46, 1095.14, 1321.18)
BASE_S, SECONDS_PER_LOAD = 0.8, 2.2013  # the second is a published fit


def factors(num_rounds: int, share: float, stay: float, seed: int) -> np.ndarray[Any, Any]:
    """How much slower each worker is in each round: usually a little, in bursts twice or more.

    Args:
        share: of workers for whom a burst begins in a round, on average; some rounds are worse than others.
        stay: chance that a burst goes on for another round.
    """
    random = np.random.default_rng(seed)
    slow, found = np.zeros(NUM_WORKERS, bool), []
    for _ in range(num_rounds):
        begins = share * random.gamma(8) / 8
        slow = random.random(NUM_WORKERS) < np.where(slow, stay, begins)
        usual = 1 + random.exponential(0.05, NUM_WORKERS)
        found.append(np.where(slow, usual * (2 + random.exponential(0.3, NUM_WORKERS)), usual))
    return np.array(found)


def run(schedule: Schedule, num_jobs: int, share: float, stay: float, seed: int) -> tuple[float, int]:
    """Seconds of all jobs, and how many rounds were waited out."""
    progress, past, num_waited, total_s = Progress(), [], 0, 0.0
    slower = factors(num_jobs + schedule.delay, share, stay, seed)
    for round in range(1, num_jobs + schedule.delay + 1):
        seconds = (BASE_S + SECONDS_PER_LOAD * schedule.load) * slower[round - 1]
        ended = end_round(seconds.tolist(), schedule.bursts, past)
        past = [*past[-schedule.bursts.window :], ended.stragglers]
        total_s, num_waited = total_s + ended.seconds, num_waited + ended.waited_out
        for worker, parts in enumerate(schedule.parts(round, num_jobs, progress)):
            if worker not in ended.stragglers:
                progress.deliver(worker, parts)
        due = round - schedule.delay
        assert due < 1 or schedule.is_known(due, progress), f"job {due} is not known in time"
        progress.forget(due)
    return total_s, num_waited


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and record."""
    flags = parser(__doc__, "gradient_coding")
    flags.add_argument("--jobs", type=int, default=480)
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--share", type=float, default=0.045, help="of workers that become slow in a round")
    flags.add_argument(
        "--stay", type=float, default=0.03, help="chance that a slow worker is slow in the next round too"
    )
    given = flags.parse_args(argv)
    rows, results, base = [], {}, 0.0
    for (name, schedule), published_s in reversed(list(zip(SCHEDULES.items(), PUBLISHED_S, strict=True))):
        runs = [run(schedule, given.jobs, given.share, given.stay, seed) for seed in range(given.seeds)]
        seconds, waited = np.mean(runs, 0).tolist()
        base = base or seconds
        results[name] = {"load": schedule.load, "seconds": seconds, "waited_out": waited}
        cells = [name, f"{schedule.load:.5f}", f"{seconds:.0f}", f"{waited:.0f}", f"{seconds / base:.2f}"]
        rows.append([*cells, f"{published_s / PUBLISHED_S[-1]:.2f}"])
    columns = ["code", "load", "seconds", "rounds waited out", "against no code", "published"]
    about = (
        f"{given.jobs} jobs, {NUM_WORKERS} workers; means of {given.seeds} seeds. The bursts are drawn, not measured."
    )
    folder = write_record(given, results, f"{about}\n\n{table(columns, rows)}")
    print((folder / "summary.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
