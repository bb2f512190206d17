"""How fast links must be for two replicas to spend most of their time computing, beside a published table.

    python -m benchmarks.compute_utilisation

The table is the data-parallel and DiLoCo rows of table 4 of Streaming DiLoCo (Douillard et al. 2025, arXiv:2501.18512):
Gbit/s at which compute utilisation, the time of computing over all time, reaches 50 to 99 %. The paper evaluates a
graph of forward, backward and reduce of every layer on `np.logspace(-1, 3, 50)` Gbit/s, and a reproduction is right
when it lands on the same or an adjacent point of that grid. Here the methods of lowcomm run themselves, in the training
loop, on tensors without values in the simulator.

Not said in the paper, so chosen here: two replicas; equal layers and no embedding; links without latency; a ring, in
which each of two replicas sends as many bytes as it has; forward a third of a step, backward the rest.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from benchmarks.record import parser, table, write_record
from lowcomm.algorithms.base import Algorithm
from lowcomm.algorithms.data_parallel import DataParallel
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.checkpoint import Checkpoints
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.compress.cast import Cast
from lowcomm.config import Checkpointing, Log, Optimizer, Run
from lowcomm.models.base import ModelConfig
from lowcomm.reduce import Reducer
from lowcomm.sim.clock import Clock
from lowcomm.sim.comm import World
from lowcomm.sim.compute import Constant
from lowcomm.sim.engine import SimEngine
from lowcomm.sim.network import Links, Network
from lowcomm.sim.pace import Pace
from lowcomm.sim.timing import assemble_shapes, shapes_of
from lowcomm.sim.trace import Trace
from lowcomm.train import train

GRID_GBIT_PER_S = np.logspace(-1, 3, 50).tolist()
TARGETS = (0.50, 0.80, 0.90, 0.95, 0.99)
EVERY = 100


@dataclass(frozen=True)
class Column:
    """A model of the table.

    Attributes:
        step_s: seconds of computing in an inner step.
        data_parallel, diloco: the paper's Gbit/s, one for each target.
    """

    num_parameters: int
    num_layers: int
    step_s: float
    data_parallel: tuple[float, ...]
    diloco: tuple[float, ...]


COLUMNS = {
    "1B": Column(10**9, 24, 0.1, (86.8, 152.6, 184.2, 222.3, 569.0), (1.4, 6.2, 13.3, 23.3, 86.8)),
    "10B": Column(10**10, 48, 0.8, (104.8, 222.3, 222.3, 268.3, 471.5), (1.7, 7.5, 16.0, 33.9, 104.8)),
}


@dataclass(frozen=True)
class Blocks(ModelConfig):
    """Equal layers of one tensor each: all that a network sees of a model."""

    num_parameters: int
    num_layers: int

    def construct(self, vocab_size: int) -> nn.Module:
        """Never called forward."""
        size = self.num_parameters // self.num_layers
        return nn.ParameterList([nn.Parameter(torch.empty(size)) for _ in range(self.num_layers)])


@dataclass(frozen=True)
class Variant:
    """One reading of a row of the table.

    Attributes:
        row: "data_parallel" or "diloco".
        num_steps: simulated; whole rounds.
        wire: what a parameter is on the wire.
        precision: of the parameters.
    """

    row: str
    name: str
    algorithm: Algorithm
    num_steps: int
    wire: str
    precision: Literal["bf16", "fp32"]


_CAST = Reducer(Cast("bfloat16"))  # deltas are fp32 whatever the parameters are
VARIANTS = [
    Variant("data_parallel", "overlapped", DataParallel(overlap=True), 2, "bf16", "bf16"),
    Variant("data_parallel", "overlapped", DataParallel(overlap=True), 2, "fp32", "fp32"),
    Variant("data_parallel", "after backward", DataParallel(), 2, "bf16", "bf16"),
    Variant("diloco", "overlapped", DiLoCo(EVERY, reducer=_CAST, overlap=True), EVERY, "bf16", "bf16"),
    Variant("diloco", "overlapped", DiLoCo(EVERY, overlap=True), EVERY, "fp32", "bf16"),
    Variant("diloco", "after the update", DiLoCo(EVERY, reducer=_CAST), EVERY, "bf16", "bf16"),
    Variant("diloco", "after the update", DiLoCo(EVERY), EVERY, "fp32", "bf16"),
]
MATCHING = [x for x in VARIANTS if x.name == "overlapped" and x.wire == "bf16"]


@cache
def utilisation(column: Column, variant: Variant, gbit_per_s: float) -> float:
    """Compute time over all time of two replicas joined by links of this rate."""
    model = Blocks(column.num_parameters, column.num_layers)
    run = Run(
        model=model,
        algorithm=variant.algorithm,
        optimizer=Optimizer("torch.optim.SGD", {"lr": 1.0}),
        num_steps=variant.num_steps,
        precision=variant.precision,
        clip_norm=None,  # as DiLoCo's overlap needs; an update takes no time
        checkpoint=Checkpointing(every=0),
        log=Log(every=variant.num_steps),
    )
    shapes = shapes_of(run, num_replicas=2)
    rates = [gbit_per_s * 1e9] * 2
    clock, trace = Clock(isolate_torch=False), Trace()
    links = Links(rates, rates, latency_s=lambda source, to: 0.0, latency_factor=1.0, bandwidth_factor=1.0)
    world = World(clock, Network(clock, links))

    def program(rank: int) -> None:
        pace = Pace(clock, Constant(column.step_s), trace, rank, None)
        comm = MeteredComm(world.comm(rank, (0, 1)), Meter())
        assembled = assemble_shapes(run, shapes, comm, lambda line: None, lambda engine: SimEngine(engine, pace))
        train(assembled.replica, assembled.plan, Checkpoints(Path("none is saved"), rank, 2, ""))

    for rank in (0, 1):
        clock.spawn(rank, partial(program, rank))
    clock.run()
    return variant.num_steps * column.step_s / clock.now


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

    @property
    def is_met(self) -> bool:
        """Whether it is on the same or an adjacent point."""
        return self.points_off is not None and abs(self.points_off) <= 1


def cell(column_name: str, variant: Variant, target: float, size: float = 1.0) -> Cell:
    """Simulate one value; ``size`` scales the number of parameters."""
    column = COLUMNS[column_name]
    column = replace(column, num_parameters=round(column.num_parameters * size))
    published = column.data_parallel if variant.row == "data_parallel" else column.diloco
    paper = published[TARGETS.index(target)]
    place = first_reaching(target, column, variant)
    rate = None if place is None else GRID_GBIT_PER_S[place]
    off = None if place is None else place - place_of(paper)
    return Cell(variant.row, variant.name, variant.wire, column_name, target, paper, rate, off)


def summary_of(cells: list[Cell], num_same: int) -> str:
    """What matches and what does not, in words and a table; ``num_same`` of twenty with `_NEARER`."""
    rows = []
    for key, group in groupby(cells, key=lambda c: (c.row, c.name, c.wire, c.column)):
        row, name, wire, column = key
        values = list(group)
        rows.append(
            [
                *(row, column, f"{name}, {wire}"),
                *(f"{'never' if c.gbit_per_s is None else f'{c.gbit_per_s:.1f}'} ({_off(c)})" for c in values),
                f"{sum(c.is_met for c in values)}/{len(values)}",
            ]
        )
    for row in ("data_parallel", "diloco"):
        for name, column in COLUMNS.items():
            published = column.data_parallel if row == "data_parallel" else column.diloco
            rows.append([row, name, "the paper", *(f"{x:.1f}" for x in published), ""])
    rows.sort(key=lambda cells: (cells[0], cells[1] != "1B", cells[2] != "the paper"))
    columns = ("row", "model", "reading", *(f"{target:.0%}" for target in TARGETS), "met")
    same = (
        f"With {_NEARER} of the parameters, {num_same} of the 20 values of that reading are on the paper's very point."
    )
    return "\n\n".join([_WORDS.strip() + "\n" + same, table(columns, rows)])


def _off(cell: Cell) -> str:
    return "off the grid" if cell.points_off is None else f"{cell.points_off:+d}" if cell.points_off else "same"


_WORDS = """
Gbit/s at which two replicas spend a part of their time computing: the first point of the grid that reaches it, and how
many points (of a factor 1.207) it is above the paper's. Met: same or adjacent.

One reading meets every value of both rows: 16 bits a parameter, two replicas, equal layers, and every layer's exchange
overlapping the backward of the layers below it, `overlap=True` of both methods. (Of the two messages in which DiLoCo's
`Cast` averages, only the first does; the second follows backward. The row holds all the same.)

Data parallel without overlap, or with 32 bits, meets no value of its row.

DiLoCo without overlap sends after the update of its round's last step, when nothing is left to hide behind. It meets
the row but for three values: 1B at 95 % and both models at 99 %, where the time that the last backward can hide is most
of what the target leaves for the exchange. No other wire size mends that: at 1B, 99 % would take at most 10.6 bits a
parameter and 80 % at least 10.7. So the paper's graph lets a layer's reduce begin with that layer's backward also in
DiLoCo.

Where a value of the reading that meets all is not the same, it is one point above: the paper's graph seems to send
about a sixth less than 16 bits for each parameter in the model's name.
"""
_NEARER = 0.84


def main() -> None:
    """Simulate, print, record."""
    given = parser(__doc__, "compute_utilisation").parse_args()
    found = [cell(column, variant, target) for variant in VARIANTS for column in COLUMNS for target in TARGETS]
    nearer = [
        cell(column, variant, target, _NEARER) for variant in MATCHING for column in COLUMNS for target in TARGETS
    ]
    summary = summary_of(found, sum(x.points_off == 0 for x in nearer))
    print(summary)
    print(f"record: {write_record(given, [asdict(x) for x in found], summary)}")


if __name__ == "__main__":
    main()
