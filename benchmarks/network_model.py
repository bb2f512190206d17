"""Exchanges and rounds on real links with delay beside what the simulator says of them.

    python -m benchmarks.network_model

Each case is a network of hosts of this machine (launch/slow_network, which needs root, iproute2 and TUN devices), on
which `benchmarks.timed_calls` times every exchange of `Comm` and whole rounds of methods over gloo. The same program
then runs in the simulator on links of the same rate and latency. What was measured is kept beside the record, and
another call goes on with it; ``--again`` measures anew.

Judged are cells in which latencies and bytes over rate, by the simulator's own count, make at least 80 % of the real
time, and in which the delay line took less than half of a processor. What codes and copies compute is measured apart,
over a wire that answers at once, and added to the simulated seconds. The bandwidth factor and the window were chosen
with every other of these cells in sight; the rest are judged.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations, product
from pathlib import Path

import torch

from benchmarks.record import ROOT, parser, table, write_record
from benchmarks.timed_calls import KINDS, cells, margin, measure
from lowcomm.comm.base import Comm
from lowcomm.sim.wire.clock import Clock
from lowcomm.sim.wire.comm import World
from lowcomm.sim.wire.links import Links, Transport
from lowcomm.sim.wire.network import Network

TIME_LIMIT_S = 900
MIN_SHARE, MAX_RELAY = 0.8, 0.5
# One way, what plain sockets take beyond the latency that was asked for: half of a ping-pong between two of 2 and of 6
# hosts, medians of 40, took 0.37 to 0.49 ms more than 5, 20 and 50 ms, and 0.23 ms where none was asked for.
HOSTS_S, HOSTS_ALONE_S = 0.43e-3, 0.23e-3


@dataclass(frozen=True)
class Case:
    """A network.

    Attributes:
        latency_ms: one way.
    """

    num_hosts: int
    rate_mbit_per_s: float
    latency_ms: float


@dataclass(frozen=True)
class Row:
    """One cell of a case.

    Attributes:
        name: of the cell.
        real_s: median.
        computing_s: of it, what ranks compute, where that was measured.
        relay: the processors that the delay line took.
        simulated_s: without computing.
    """

    case: Case
    name: str
    real_s: float
    computing_s: float
    relay: float
    simulated_s: float

    @property
    def predicted_s(self) -> float:
        """What the simulator would say of hosts that compute so long."""
        return self.simulated_s + self.computing_s

    @property
    def error(self) -> float:
        """Relative to the real time."""
        return self.predicted_s / self.real_s - 1

    def kind(self) -> str:
        """An exchange, or a method and what it sends."""
        return self.name.rpartition(" ")[0]

    def size(self) -> str:
        """Bytes of an exchange, or parameters of a model: "400000", "1M"."""
        return self.name.rpartition(" ")[2]

    def is_round(self) -> bool:
        """Whether it is a method's."""
        return self.kind() not in KINDS

    def cells(self) -> list[str]:
        """A line of the record's table."""
        case = [f"{x:g}" for x in (self.case.num_hosts, self.case.latency_ms, self.case.rate_mbit_per_s)]
        seconds = [f"{self.real_s:.4f}", f"{self.predicted_s:.4f}", f"{self.error:+.1%}"]
        return [*case, self.name, *seconds, f"{self.relay:.2f}"]

    def is_judged(self) -> bool:
        """Whether the wire makes nearly all of it, and the machine was up to it."""
        return self.simulated_s >= MIN_SHARE * self.real_s and self.relay < MAX_RELAY


class Simulated:
    """A rank of a simulation, on shapes without values."""

    device = "meta"

    def __init__(self, world: World, rank: int, num_ranks: int, said: dict[int, list[list[float]]]) -> None:
        self.comm: Comm = world.comm(rank, range(num_ranks))
        self._clock, self._said, self._num_said = world.clock, said, 0

    def now(self) -> float:
        """Virtual seconds."""
        return self._clock.now

    def until(self, time_s: float) -> None:
        """Let virtual time pass."""
        self._clock.sleep(max(0.0, time_s - self._clock.now))

    def largest(self, values: list[float]) -> list[float]:
        """What is exchanged takes its time; the values go another way, as shapes have none."""
        said = self._said.setdefault(self._num_said, [])
        self._num_said += 1
        said.append(values)
        self.comm.all_gather(torch.empty(len(values), dtype=torch.float64, device="meta")).wait()
        return [max(column) for column in zip(*said, strict=True)]


def simulate(case: Case, transport: Transport, names: Sequence[str]) -> dict[str, float]:
    """Median seconds of the cells of these names."""
    rates = [case.rate_mbit_per_s * 1e6] * case.num_hosts
    latency_s = case.latency_ms / 1e3 + (HOSTS_S if case.latency_ms else HOSTS_ALONE_S)
    links = Links(rates, rates, lambda a, b: latency_s, transport=transport)
    clock, said = Clock(isolate_torch=False), dict[int, list[list[float]]]()
    world = World(clock, Network(clock, links))
    found: dict[str, float] = {}

    def program(rank: int) -> None:
        place = Simulated(world, rank, case.num_hosts, said)
        for cell in cells(case.num_hosts, case.rate_mbit_per_s * 1e6):
            if cell.name in names:
                seconds = measure(place, cell, margin(case.num_hosts, case.latency_ms / 1e3))
                found[cell.name] = statistics.median(seconds)

    for rank in range(case.num_hosts):
        clock.spawn(rank, partial(program, rank))
    clock.run()
    return found


def time_cells(case: Case, path: Path, names: Sequence[str] = ()) -> None:
    """Measure the cells of a case, or some of them, on real hosts and keep its lines."""
    network = ["--hosts", str(case.num_hosts), "--rate", f"{case.rate_mbit_per_s:g}"]
    network += ["--latency_ms", f"{case.latency_ms:g}", "--time_limit_s", str(TIME_LIMIT_S)]
    program = [sys.executable, "-m", "benchmarks.timed_calls", f"{case.rate_mbit_per_s:g}", f"{case.latency_ms:g}"]
    program += ["--cells", *names] if names else []
    command = [str(ROOT / "launch" / "slow_network"), *network, "--", *program]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = [line.removeprefix("[0] ") for line in done.stdout.splitlines() if line.startswith("[0] {")]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def rows_of(case: Case, path: Path, transport: Transport) -> list[Row]:
    """What was measured of a case, and what the simulator says of it."""
    measured = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    simulated = simulate(case, transport, [x["cell"] for x in measured])
    return [
        Row(case, x["cell"], statistics.median(x["seconds"]), x["computing_s"], x["relay"], simulated[x["cell"]])
        for x in measured
    ]


def wrong_orders(rows: Sequence[Row]) -> list[str]:
    """Pairs of judged methods of one model that differ by more than a tenth, and that the simulator swaps."""
    found = []
    for a, b in combinations([row for row in rows if row.is_judged() and row.is_round()], 2):
        if (a.case, a.size()) != (b.case, b.size()):
            continue
        slow, fast = (a, b) if a.real_s > b.real_s else (b, a)
        if slow.real_s > 1.1 * fast.real_s and slow.predicted_s < fast.predicted_s:
            found.append(f"{slow.case}: {slow.name} and {fast.name}")
    return found


def spread(rows: Sequence[Row]) -> list[str]:
    """Of the absolute errors: how many, the median, the 95th percentile, the largest."""
    errors = sorted(abs(row.error) for row in rows)
    at = [errors[min(len(errors) - 1, math.ceil(share * len(errors)) - 1)] for share in (0.5, 0.95, 1.0)]
    return [str(len(errors)), *[f"{error:.1%}" for error in at]]


def summary(rows: Sequence[Row]) -> str:
    """The record for readers."""
    judged = [row for row in rows if row.is_judged()]
    fitted, rest = judged[::2], judged[1::2]
    kinds = sorted({row.kind() for row in rest}, key=lambda kind: (kind not in KINDS, kind))
    lines = [["all of the half that is judged", *spread(rest)], ["the half that was in sight", *spread(fitted)]]
    lines += [[kind, *spread([row for row in rest if row.kind() == kind])] for kind in kinds]
    left_out = [row for row in rows if not row.is_judged()]
    columns = ["hosts", "ms", "Mbit/s", "cell", "real s", "simulated s", "error", "delay line"]
    parts = [
        "Seconds over gloo on hosts of one machine, behind real rates and delays, and in the simulator; errors:",
        table(["", "cells", "median", "95 %", "largest"], lines),
        f"Methods in the wrong order though they differ by more than 10 %: {', '.join(wrong_orders(rows)) or 'none'}.",
        f"Not judged: {len(left_out)} cells of which the wire makes less than {MIN_SHARE:.0%}, or in which the delay "
        f"line took more than {MAX_RELAY:g} of a processor. Left out: calls whose bytes alone take more than 6 s, and "
        "those of 16 MB but for all_sum, all_to_all and exchange.",
        "Judged cells:",
        table(columns, [row.cells() for row in judged]),
        "Others:",
        table(columns, [row.cells() for row in left_out]),
    ]
    return "\n\n".join(parts)


def main() -> None:
    """Measure what is missing, simulate, record."""
    flags = parser(__doc__, "network_model")
    flags.add_argument("--hosts", type=int, nargs="+", default=[2, 4, 6])
    flags.add_argument("--latencies_ms", type=float, nargs="+", default=[0.0, 5.0, 20.0, 50.0])
    flags.add_argument("--rates", type=float, nargs="+", default=[20.0, 100.0, 500.0], help="Mbit/s")
    flags.add_argument("--again", action="store_true", help="measure anew what was measured")
    given = flags.parse_args()
    folder = given.out / given.name / "measured"
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for num_hosts, latency_ms, rate in product(given.hosts, given.latencies_ms, given.rates):
        case = Case(num_hosts, rate, latency_ms)
        path = folder / f"{num_hosts}-{rate:g}-{latency_ms:g}.jsonl"
        if given.again or not path.exists():
            time_cells(case, path)
        rows += rows_of(case, path, Transport())
    record = write_record(given, [asdict(row) for row in rows], summary(rows))
    print((record / "summary.md").read_text(encoding="utf-8").partition("Judged cells:")[0])
    print(f"record: {record}")


if __name__ == "__main__":
    main()
