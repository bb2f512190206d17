"""How fast links must be for two replicas to spend most of their time computing, beside a published table.

    python -m benchmarks.compute_utilisation

The table is table 4 of Streaming DiLoCo (Douillard et al. 2025, arXiv:2501.18512): Gbit/s at which compute utilisation,
the time of computing over all time, reaches 50 to 99 %. The paper evaluates a graph of forward, backward and reduce of
every layer on `np.logspace(-1, 3, 50)` Gbit/s, and a reproduction is right when it lands on the same or an adjacent
point of that grid. Here the methods of lowcomm run themselves, in the training loop, on tensors without values in the
simulator.

Not said in the paper, so chosen here: two replicas, each of which sends as many bytes as it has; equal layers and no
embedding; links without latency; forward a third of a step, backward the rest; the second round of a run, when every
round is like it.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from benchmarks.record import parser, table, write_record
from lowcomm import places
from lowcomm.algorithms.base import Algorithm
from lowcomm.algorithms.data_parallel import DataParallel
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.streaming_diloco import StreamingDiLoCo
from lowcomm.checkpoint import Checkpoints
from lowcomm.codecs.e3m0 import E3M0
from lowcomm.codecs.half import Half
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.compress.gathered import Gathered
from lowcomm.config import Checkpointing, Log, Optimizer, Run
from lowcomm.models.base import ModelConfig
from lowcomm.reduce import Reducer
from lowcomm.sim.cluster.compute import Constant
from lowcomm.sim.engine import SimEngine
from lowcomm.sim.pace import Pace
from lowcomm.sim.record.timing import assemble_shapes, shapes_of
from lowcomm.sim.record.trace import Trace
from lowcomm.sim.wire.clock import Clock
from lowcomm.sim.wire.comm import World
from lowcomm.sim.wire.links import BARE, Links
from lowcomm.sim.wire.network import Network
from lowcomm.train import train

GRID_GBIT_PER_S = np.logspace(-1, 3, 50).tolist()
TARGETS = (0.50, 0.80, 0.90, 0.95, 0.99)
EVERY = 100


# Table 4: the paper's Gbit/s by row and model, one for each target. Its "overlap" is our `delay`.
PUBLISHED = {
    "data parallel": {
        "1B": (86.8, 152.6, 184.2, 222.3, 569.0),
        "10B": (104.8, 222.3, 222.3, 268.3, 471.5),
    },
    "DiLoCo": {
        "1B": (1.4, 6.2, 13.3, 23.3, 86.8),
        "10B": (1.7, 7.5, 16.0, 33.9, 104.8),
    },
    "streaming": {
        "1B": (1.4, 5.2, 9.1, 16.0, 28.1),
        "10B": (1.7, 5.2, 9.1, 13.3, 19.3),
    },
    "and delay": {
        "1B": (1.4, 4.3, 6.2, 9.1, 11.0),
        "10B": (1.7, 3.6, 5.2, 6.2, 7.5),
    },
    "and 4 bits": {
        "1B": (0.4, 0.9, 1.7, 2.0, 3.0),
        "10B": (0.4, 0.9, 1.4, 1.4, 1.7),
    },
}


@dataclass(frozen=True)
class Column:
    """A model of the table; ``step_s`` are seconds of computing in an inner step."""

    num_parameters: int
    num_layers: int
    step_s: float


COLUMNS = {"1B": Column(10**9, 24, 0.1), "10B": Column(10**10, 48, 0.8)}


@dataclass(frozen=True)
class Blocks(ModelConfig):
    """Equal layers of one tensor each: all that a network sees of a model."""

    num_parameters: int
    num_layers: int

    def construct(self, vocab_size: int) -> nn.Module:
        """Computes nothing of use."""
        return _Chain(self.num_parameters // self.num_layers, self.num_layers, vocab_size)


class _Chain(nn.Module):
    """Layers one after the other."""

    def __init__(self, size: int, num_layers: int, vocab_size: int) -> None:
        super().__init__()
        self.layers = nn.ParameterList([nn.Parameter(torch.empty(size)) for _ in range(num_layers)])
        self.vocab_size = vocab_size

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = torch.zeros(*tokens.shape, self.vocab_size, device=tokens.device)
        for layer in self.layers:
            x = torch.sin(x + layer[0])
        return x


@dataclass(frozen=True)
class Variant:
    """One reading of a row of the table.

    Attributes:
        row: of `PUBLISHED`.
        name: when an average sets out.
        num_steps: of a round.
        wire: what a parameter is on the wire.
        precision: of the parameters.
    """

    row: str
    name: str
    algorithm: Algorithm
    num_steps: int
    wire: str
    precision: Literal["bf16", "fp32"] = "bf16"


WITHIN, AFTER = "within backward", "after the update"
# Deltas are in 32 bits whatever the parameters are. Each of these sends one message.
_16_BITS = Reducer(Gathered(Half()))
_4_BITS = Reducer(Gathered(E3M0(block=4096)))  # the scales are next to nothing
_SCALED_4_BITS = Reducer(Gathered(E3M0(block=64)))


def _streaming(row: str, delay: int, reducer: Reducer, wire: str, name: str = WITHIN) -> Variant:
    return Variant(row, name, StreamingDiLoCo(EVERY, delay, reducer=reducer, overlap=name == WITHIN), EVERY, wire)


VARIANTS = [
    Variant("data parallel", WITHIN, DataParallel(overlap=True), 1, "16 bits"),
    Variant("data parallel", WITHIN, DataParallel(overlap=True), 1, "32 bits", "fp32"),
    Variant("data parallel", "after backward", DataParallel(), 1, "16 bits"),
    Variant("DiLoCo", WITHIN, DiLoCo(EVERY, reducer=_16_BITS, overlap=True), EVERY, "16 bits"),
    Variant("DiLoCo", WITHIN, DiLoCo(EVERY, overlap=True), EVERY, "32 bits"),
    Variant("DiLoCo", AFTER, DiLoCo(EVERY, reducer=_16_BITS), EVERY, "16 bits"),
    Variant("DiLoCo", AFTER, DiLoCo(EVERY), EVERY, "32 bits"),
    _streaming("streaming", 0, _16_BITS, "16 bits"),
    _streaming("streaming", 0, _16_BITS, "16 bits", AFTER),
    _streaming("and delay", 1, _16_BITS, "16 bits"),
    _streaming("and delay", 1, _16_BITS, "16 bits", AFTER),
    _streaming("and 4 bits", 1, _4_BITS, "4 bits"),
    _streaming("and 4 bits", 1, _SCALED_4_BITS, "4.125 bits"),
    _streaming("and 4 bits", 1, _4_BITS, "4 bits", AFTER),
]
MATCHING = [x for x in VARIANTS if x.name == WITHIN and x.wire == ("4 bits" if x.row == "and 4 bits" else "16 bits")]


@cache
def utilisation(column: Column, variant: Variant, gbit_per_s: float) -> float:
    """Compute time over all time in the second round of two replicas joined by links of this rate.

    A third one has just begun when the run ends, since what is left to sync at the end of a run is no part of it.
    """
    model = Blocks(column.num_parameters, column.num_layers)
    run = Run(
        model=model,
        algorithm=variant.algorithm,
        optimizer=Optimizer("torch.optim.SGD", {"lr": 1.0}),
        num_steps=2 * variant.num_steps + 1,
        precision=variant.precision,
        clip_norm=None,  # as updates within backward need; an update takes no time
        checkpoint=Checkpointing(every=0),
        log=Log(every=variant.num_steps),
    )
    shapes = shapes_of(run, num_replicas=2)
    rates = [gbit_per_s * 1e9] * 2
    clock, trace = Clock(isolate_torch=False), Trace()
    links = Links(rates, rates, latency_s=lambda source, to: 0.0, transport=BARE)
    world = World(clock, Network(clock, links))
    ends_s: dict[int, float] = {}

    def program(rank: int) -> None:
        def write(line: dict[str, Any]) -> None:
            ends_s[line["t"]] = line["time_s"]  # the same on both ranks

        pace = Pace(clock, Constant(column.step_s), trace, rank)
        comm = MeteredComm(world.comm(rank, (0, 1)), Meter())
        assembled = assemble_shapes(run, shapes, comm, write, lambda engine: SimEngine(engine, pace))
        train(assembled.replica, assembled.plan, Checkpoints(Path("none is saved"), places.place_of(comm, 1), ""))

    for rank in (0, 1):
        clock.spawn(rank, partial(program, rank))
    clock.run()
    return variant.num_steps * column.step_s / (ends_s[2 * variant.num_steps] - ends_s[variant.num_steps])


def first_reaching(target: float, column: Column, variant: Variant) -> int | None:
    """The place in the grid of the slowest links that reach a utilisation, which grows with their rate."""
    place = bisect_left(GRID_GBIT_PER_S, target, key=lambda rate: utilisation(column, variant, rate))
    return place if place < len(GRID_GBIT_PER_S) else None


def place_of(gbit_per_s: float) -> int:
    """The grid point that the paper prints with one decimal."""
    return min(range(len(GRID_GBIT_PER_S)), key=lambda i: abs(GRID_GBIT_PER_S[i] - gbit_per_s))


@dataclass(frozen=True)
class Cell:
    """One value.

    Attributes:
        gbit_per_s: simulated; None where the grid ends before the target.
        points_off: from the paper's grid point, above it when positive; likewise.
    """

    row: str
    name: str
    wire: str
    column: str
    target: float
    paper_gbit_per_s: float
    gbit_per_s: float | None
    points_off: int | None

    def is_met(self, shift: int = 0) -> bool:
        """Whether it, or the point so many above it, is the same or an adjacent point."""
        return self.points_off is not None and abs(self.points_off + shift) <= 1


def cell(column_name: str, variant: Variant, target: float, size: float = 1.0) -> Cell:
    """Simulate one value; ``size`` scales the number of parameters."""
    column = COLUMNS[column_name]
    column = replace(column, num_parameters=round(column.num_parameters * size))
    paper = PUBLISHED[variant.row][column_name][TARGETS.index(target)]
    place = first_reaching(target, column, variant)
    rate = None if place is None else GRID_GBIT_PER_S[place]
    off = None if place is None else place - place_of(paper)
    return Cell(variant.row, variant.name, variant.wire, column_name, target, paper, rate, off)


def summary_of(cells: list[Cell], nearer: list[Cell]) -> str:
    """What matches and what does not, in words and a table; ``nearer`` are the cells of `MATCHING` with `_NEARER`."""
    rows = []
    for key, group in groupby(cells, key=lambda c: (c.row, c.name, c.wire, c.column)):
        row, name, wire, column = key
        values = list(group)
        rows.append(
            [
                *(row, column, f"{name}, {wire}"),
                *(f"{'never' if c.gbit_per_s is None else f'{c.gbit_per_s:.1f}'} ({_off(c)})" for c in values),
                f"{sum(c.is_met() for c in values)}/{len(values)}",
            ]
        )
    for row, published in PUBLISHED.items():
        rows += [[row, name, "the paper", *(f"{x:.1f}" for x in published[name]), ""] for name in COLUMNS]
    order = list(PUBLISHED)
    rows.sort(key=lambda cells: (order.index(cells[0]), cells[1] != "1B", cells[2] != "the paper"))
    columns = ("row", "model", "reading", *(f"{target:.0%}" for target in TARGETS), "met")
    matching = [c for c in cells if any((c.row, c.name, c.wire) == (x.row, x.name, x.wire) for x in MATCHING)]
    counts = [
        f"As it stands: {_count(matching)}.",
        f"With {_NEARER} of the parameters: {_count(nearer)}.",
        f"With the last point below a target in place of the first that reaches it: {_count(matching, -1)}.",
    ]
    return "\n\n".join([_WORDS.strip(), "\n".join(f"- {x}" for x in counts), table(columns, rows)])


def _count(cells: list[Cell], shift: int = 0) -> str:
    num_same = sum(c.points_off is not None and c.points_off + shift == 0 for c in cells)
    num_met = sum(c.is_met(shift) for c in cells)
    return f"{num_met} of {len(cells)} values are met, {num_same} on the paper's very point"


def _off(cell: Cell) -> str:
    return "off the grid" if cell.points_off is None else f"{cell.points_off:+d}" if cell.points_off else "same"


_WORDS = """
Gbit/s at which two replicas spend a part of their time computing: the first point of the grid that reaches it, and how
many points (of a factor 1.207) it is above the paper's. Met: same or adjacent. In fragments of three layers, strided;
what the paper calls overlap is a delay of one inner step.

One reading meets all values but one: 16 bits a parameter, 4 in the last row, two replicas, equal layers, and every
layer's exchange overlapping the backward of the layers below it, which is `overlap=True` of all three methods. The one
is streaming at 10B and 99 % without delay, two points above the paper's: at 23.3 the 16 syncs of a round wait 0.99 s,
and the target leaves 0.81 s. If forward waited for each layer where it uses it, they would wait 0.69 s, and it was met
when they did; that cost more than it was worth.

Most values are one point above the paper's. Two guesses at it each bring most onto the point: that its graph sends a
sixth less than 16 bits for each parameter in the model's name, or that it prints the last point of the grid below a
target. Nothing in the paper tells which.

Data parallel without overlap, or with 32 bits, meets no value of its row.

DiLoCo without overlap sends after the update of its round's last step, when nothing is left to hide behind. It meets
the row but for three values: 1B at 95 % and both models at 99 %, where the time that the last backward can hide is most
of what the target leaves for the exchange. No other wire size mends that: at 1B, 99 % would take at most 10.6 bits a
parameter and 80 % at least 10.7. So the paper's graph lets a layer's reduce begin with that layer's backward also in
DiLoCo. Most of what streaming gains without delay is that: it has as many backwards to hide behind as fragments.

With one byte for each 64 values of 4 bits, as `E3M0` has by itself, all values of its row are met but one, 10B at 95 %.
"""
_NEARER = 0.84


def main() -> None:
    """Simulate, print, record."""
    given = parser(__doc__, "compute_utilisation").parse_args()
    found = [cell(column, variant, target) for variant in VARIANTS for column in COLUMNS for target in TARGETS]
    nearer = [
        cell(column, variant, target, _NEARER) for variant in MATCHING for column in COLUMNS for target in TARGETS
    ]
    summary = summary_of(found, nearer)
    print(summary)
    results = {"cells": [asdict(x) for x in found], "with_fewer_parameters": [asdict(x) for x in nearer]}
    print(f"record: {write_record(given, results, summary)}")


if __name__ == "__main__":
    main()
