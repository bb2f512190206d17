"""What `benchmarks.network_model` times: every exchange of `Comm`, and whole rounds of methods, real or simulated.

    launch/slow_network --hosts 4 --rate 100 --latency_ms 20 -- python -m benchmarks.timed_calls 100 20

All ranks start a call at one moment that they agreed on, and it takes until the last of them has ended. Hosts of one
machine share its clock. In the simulator the same program runs on shapes without values, and computing takes no time;
how long it takes for real is measured beside each round, over a wire that answers at once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

import lowcomm
from lowcomm.codecs.absmax import Absmax
from lowcomm.comm.base import Comm
from lowcomm.comm.echo import EchoComm
from lowcomm.compress.base import Compressor
from lowcomm.compress.power_sgd import PowerSGD
from lowcomm.compress.quantized import Quantized
from lowcomm.compress.top_k import TopK

KINDS = ("all_sum", "all_gather", "all_to_all", "broadcast", "send", "exchange")
SIZES = (4, 4_000, 400_000, 4_000_000, 16_000_000)
NUM_TENSORS = 16
PARAMETERS = {"1M": 256, "10M": 790}  # each tensor is a square of this width
STREAMING_EVERY, STREAMING_DELAY, NUM_PERIODS = 4, 2, 3
STEP_S = 0.1  # of the steps within a round of Streaming DiLoCo, whose exchanges they hide


class Place(Protocol):
    """A rank of some world, and its clock."""

    comm: Comm
    device: str

    def now(self) -> float:
        """Seconds, of one clock for all ranks."""

    def until(self, time_s: float) -> None:
        """Let time pass."""

    def largest(self, values: list[float]) -> list[float]:
        """Of all ranks', place by place."""


class Real:
    """A rank among processes."""

    device = "cpu"

    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    def now(self) -> float:
        return time.monotonic()

    def until(self, time_s: float) -> None:
        time.sleep(max(0.0, time_s - time.monotonic()))

    def largest(self, values: list[float]) -> list[float]:
        largest: list[float] = self.comm.all_gather(torch.tensor(values, dtype=torch.float64)).wait().amax(0).tolist()
        return largest


Call = Callable[[], object]
Make = Callable[[Place, Comm], Call]


@dataclass(frozen=True)
class Cell:
    """One thing to time.

    Attributes:
        name: such as "all_sum 4000" or "diloco int8 1M".
        wire_s: about what its bytes take on the wire.
        make: makes what to time, anew for each world.
        num_steps: of a method's round; 0 for an exchange.
    """

    name: str
    wire_s: float
    make: Make
    num_steps: int = 0


def exchange(kind: str, num_bytes: int) -> Make:
    """A call of `Comm`; ``num_bytes`` is what a rank puts in, or what it has for all others in an all_to_all."""

    def make(place: Place, comm: Comm) -> Call:
        n, rank = len(comm.members), comm.rank
        x = torch.zeros(num_bytes // 4, device=place.device)
        if kind == "all_sum":
            return lambda: comm.all_sum(x).wait()
        if kind == "all_gather":
            return lambda: comm.all_gather(x).wait()
        if kind == "broadcast":
            return lambda: comm.broadcast(x, 0).wait()
        if kind == "all_to_all":
            rows = x.new_zeros(n, max(1, num_bytes // 4 // n))
            return lambda: comm.all_to_all(rows).wait()
        if kind == "exchange":
            peer = rank ^ 1 if rank ^ 1 < n else rank
            return lambda: comm.exchange(x, peer).wait()
        assert kind == "send"
        if rank == 0:
            return lambda: comm.send(x, 1).wait()
        return lambda: comm.recv(x, 0).wait() if rank == 1 else None

    return make


def rounds(algorithm: lowcomm.Algorithm[Any], width: int, num_steps: int) -> Make:
    """Steps of a method around a model of nothing but parameters, until nothing is under way.

    Of more than one, each takes at least `STEP_S`.
    """

    def make(place: Place, comm: Comm) -> Call:
        xs = [torch.randn(width, width, device=place.device) for _ in range(NUM_TENSORS)]
        model = nn.ParameterList(xs)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, foreach=True)
        gradients = [torch.full_like(x, 1e-3) for x in xs]
        engine = lowcomm.TorchEngine(model, optimizer, loss=lambda model, batch: batch, clip_norm=None)
        state, steps = algorithm.init(engine, comm), itertools.count(1)

        def call() -> None:
            for t in itertools.islice(steps, num_steps):
                start_s = place.now()
                for p, gradient in zip(model, gradients, strict=True):
                    p.grad = gradient.clone()
                algorithm.before_update(t, engine, state, comm)
                engine.update()
                if num_steps > 1:
                    place.until(start_s + STEP_S)
                algorithm.after_update(t, engine, state, comm)
            algorithm.settle(state)

        return call

    return make


def methods() -> dict[str, tuple[lowcomm.Algorithm[Any], int, float]]:
    """By name: the method, its steps a round, and about the bytes that a parameter puts on the wire of n ranks / 2."""

    def diloco(compressor: Compressor[Any]) -> lowcomm.DiLoCo:
        return lowcomm.DiLoCo(every=1, reducer=lowcomm.Reducer(compressor))

    streaming = lowcomm.StreamingDiLoCo(STREAMING_EVERY, STREAMING_DELAY, blocks_per_fragment=None)
    return {
        "data_parallel": (lowcomm.DataParallel(), 1, 4.0),
        "diloco fp32": (diloco(lowcomm.Identity()), 1, 4.0),
        "diloco bf16": (diloco(lowcomm.Cast()), 1, 2.0),
        "diloco int8": (diloco(Quantized(Absmax(8))), 1, 1.0),
        "diloco top_k": (diloco(TopK()), 1, 0.6),
        "diloco power_sgd": (diloco(PowerSGD(rank=4)), 1, 0.1),
        "streaming fp32": (streaming, NUM_PERIODS * STREAMING_EVERY, 4.0),
        "noloco": (lowcomm.NoLoCo(every=1), 1, 8.0),
    }


def cells(num_ranks: int, bits_per_s: float) -> Iterator[Cell]:
    """All that can be timed among so many ranks, quick ones first."""
    share = {"all_sum": 2 * (num_ranks - 1) / num_ranks, "all_gather": num_ranks - 1.0, "all_to_all": 1.0}
    share |= {"broadcast": float(math.ceil(math.log2(num_ranks))), "send": 1.0, "exchange": 1.0}
    for num_bytes in SIZES:
        for kind in KINDS if num_bytes < SIZES[-1] else ("all_sum", "all_to_all", "exchange"):
            wire_s = share[kind] * num_bytes * 8 / bits_per_s
            yield Cell(f"{kind} {num_bytes}", wire_s, exchange(kind, num_bytes))
    for size, width in PARAMETERS.items():
        for name, (algorithm, num_steps, parameter_bytes) in methods().items():
            wire_bytes = NUM_TENSORS * width**2 * parameter_bytes
            wire_s = share["all_sum"] * wire_bytes * 8 / bits_per_s
            yield Cell(f"{name} {size}", wire_s, rounds(algorithm, width, num_steps), num_steps)


def timed(place: Place, call: Callable[[], object], num: int, margin_s: float) -> list[float]:
    """Seconds of ``num`` calls."""
    own = []
    for _ in range(num):
        start_s = place.largest([place.now()])[0] + margin_s
        place.until(start_s)
        call()
        own.append(place.now() - start_s)
    return place.largest(own)


def measure(place: Place, cell: Cell, margin_s: float) -> list[float]:
    """Seconds of a cell's calls in one world; the first does not count where there are several, as always of rounds."""
    num = 3 if cell.wire_s < 0.5 else 2 if cell.wire_s < 2 or cell.num_steps else 1
    return timed(place, cell.make(place, place.comm), num, margin_s)[num > 1 :]


def computing(place: Place, cell: Cell, margin_s: float) -> float:
    """Seconds that all ranks take for a round over a wire that answers at once, but for the steps that hide exchanges.

    The best of two, as the first warms up.
    """
    comm = EchoComm(len(place.comm.members), place.comm.rank)
    hidden_s = cell.num_steps * STEP_S if cell.num_steps > 1 else 0.0
    return max(0.0, min(timed(place, cell.make(place, comm), 2, margin_s)) - hidden_s)


def processor_s(pid: str) -> float:
    """Seconds of processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def margin(num_ranks: int, latency_s: float) -> float:
    """Seconds from when the last rank is ready until all have heard of it: a ring's, and some for their processors."""
    return 2 * (num_ranks - 1) * latency_s + 0.02


def main() -> None:
    """Time all cells among the ranks that the environment describes; rank 0 prints a line of JSON for each."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("rate", type=float, help="Mbit/s of each host")
    flags.add_argument("latency_ms", type=float)
    flags.add_argument("--limit_s", type=float, default=6.0, help="calls whose bytes take longer are left out")
    flags.add_argument("--cells", nargs="+", help='only these, such as "all_sum 4000"')
    given = flags.parse_args()
    torch.set_num_threads(1)
    place = Real(lowcomm.connect("gloo", timeout_s=120))
    line = os.environ.get("SLOW_NETWORK_DELAY_LINE")
    margin_s = margin(len(place.comm.members), given.latency_ms / 1e3)
    for cell in cells(len(place.comm.members), given.rate * 1e6):
        if cell.wire_s > given.limit_s or (given.cells and cell.name not in given.cells):
            continue
        before = (time.monotonic(), processor_s(line) if line else 0.0)
        seconds = measure(place, cell, margin_s)
        after = (time.monotonic(), processor_s(line) if line else 0.0)
        computing_s = computing(place, cell, margin_s) if cell.num_steps else 0.0
        relay = (after[1] - before[1]) / (after[0] - before[0])
        if place.comm.rank == 0:
            row = {"cell": cell.name, "seconds": seconds, "computing_s": computing_s, "relay": relay}
            print(json.dumps(row), flush=True)
    lowcomm.disconnect()


if __name__ == "__main__":
    main()
