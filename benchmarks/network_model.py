"""Exchanges and rounds on real links with delay beside what the simulator says of them.

    python -m benchmarks.network_model

Each case is a network of hosts of this machine (launch/slow_network, which needs root, iproute2 and TUN devices), on
which `benchmarks.timed_calls` times every exchange of `Comm` and whole rounds of methods over gloo. The same program
then runs in the simulator on links of the same rate and latency. What was measured is kept beside the record, and
another call goes on with it; ``--again`` measures anew.

Judged are cells in which latencies and bytes over rate, by the simulator's own count, make at least 80 % of the real
time, and in which the delay line took less than half of a processor. What codes and copies compute is measured apart,
over a wire that answers at once, and added to the simulated seconds. The bandwidth factor was chosen on every other
cell (`FITTED`); the rest are judged.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.record import ROOT
from benchmarks.timed_calls import cells, margin, measure
from lowcomm.sim.clock import Clock
from lowcomm.sim.comm import World
from lowcomm.sim.links import Links, Transport
from lowcomm.sim.network import Network

TIME_LIMIT_S = 900
MIN_SHARE, MAX_RELAY = 0.8, 0.5


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

    def is_judged(self) -> bool:
        """Whether the wire makes nearly all of it, and the machine was up to it."""
        return self.simulated_s >= MIN_SHARE * self.real_s and self.relay < MAX_RELAY


class Simulated:
    """A rank of a simulation, on shapes without values."""

    device = "meta"

    def __init__(self, world: World, rank: int, num_ranks: int, said: dict[int, list[list[float]]]) -> None:
        self.comm = world.comm(rank, range(num_ranks))
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
    links = Links(rates, rates, lambda a, b: case.latency_ms / 1e3, transport=transport)
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


def time_cells(case: Case, path: Path) -> None:
    """Measure a case on real hosts and keep its lines."""
    network = ["--hosts", str(case.num_hosts), "--rate", f"{case.rate_mbit_per_s:g}"]
    network += ["--latency_ms", f"{case.latency_ms:g}", "--time_limit_s", str(TIME_LIMIT_S)]
    program = [sys.executable, "-m", "benchmarks.timed_calls", f"{case.rate_mbit_per_s:g}", f"{case.latency_ms:g}"]
    command = [str(ROOT / "launch" / "slow_network"), *network, "--", *program]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = [line.removeprefix("[0] ") for line in done.stdout.splitlines() if line.startswith("[0] {")]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
