"""What an outer round costs on CPUs, beside the same round written by hand and its all-reduce alone.

    python -m torch.distributed.run --standalone --nproc_per_node 2 -m benchmarks.round_cost

By hand it is ten lines: differences from the anchor in one vector, one all_reduce, torch's SGD with Nesterov momentum,
the anchor into the parameters. Ours is `DiLoCo` through `lowcomm.attach`. Each wire's rounds alternate with rounds by
hand, now the one first, now the other. A barrier aligns the ranks before each; the inner step, which moves the
parameters, is in neither. The first round of each does not count. Milliseconds of rank 0: medians, with the quickest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lowcomm
from benchmarks.record import parser, table, write_record
from lowcomm.codecs.absmax import Absmax
from lowcomm.compress.power_sgd import PowerSGD
from lowcomm.compress.quantized import Quantized
from lowcomm.compress.top_k import TopK
from lowcomm.feedback.ef14 import EF14
from lowcomm.tensors import rng

WIRES: dict[str, lowcomm.Reducer] = {
    "fp32": lowcomm.Reducer(),
    "bf16": lowcomm.Reducer(lowcomm.Cast()),
    "int8": lowcomm.Reducer(Quantized(Absmax(8))),
    "int4": lowcomm.Reducer(Quantized(Absmax(4))),
    "top-k 1/64, EF14": lowcomm.Reducer(TopK(), EF14()),
    "PowerSGD of rank 4, EF14": lowcomm.Reducer(PowerSGD(4), EF14()),
}
BARS = {"fp32": 1.1, "int8": 1.4, "int4": 1.4}  # times the round by hand
SIDE = 512  # of each matrix


@dataclass(frozen=True)
class Row:
    """Milliseconds of rank 0, one for each round."""

    num: int
    wire: str
    ours_ms: list[float]
    by_hand_ms: list[float]

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return statistics.median(self.ours_ms) / statistics.median(self.by_hand_ms)


class ByHand:
    """DiLoCo in ten lines."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params, self.anchor = params, [nn.Parameter(p.clone()) for p in params]
        self.outer = torch.optim.SGD(self.anchor, lr=0.7, momentum=0.9, nesterov=True, foreach=True)

    @torch.no_grad()
    def step(self) -> None:
        moved = torch.cat([(a - p).flatten() for a, p in zip(self.anchor, self.params, strict=True)])
        dist.all_reduce(moved)
        moved /= dist.get_world_size()
        for a, piece in zip(self.anchor, moved.split([p.numel() for p in self.params]), strict=True):
            a.grad = piece.view(a.shape)
        self.outer.step()
        torch._foreach_copy_(self.params, self.anchor)


def timed(step: Callable[[], object], before: Callable[[], object]) -> float:
    """Milliseconds, from a moment at which all ranks are ready."""
    before()
    dist.barrier()
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def measure(num: int, wire: str, comm: lowcomm.Comm, rounds: int) -> Row:
    """One wire on about ``num`` parameters."""
    model = nn.ParameterList([nn.Parameter(torch.randn(SIDE, SIDE)) for _ in range(-(-num // SIDE**2))])
    params = [p.detach() for p in model]
    random = rng(0, "steps", comm.rank)
    steps = [1e-3 * torch.randn(p.shape, generator=random) for p in params]
    by_hand = ByHand(params)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ours = lowcomm.attach(model, optimizer, lowcomm.DiLoCo(every=1, reducer=WIRES[wire]), comm)

    def inner(anchor: list[Tensor]) -> None:
        torch._foreach_copy_(params, anchor)
        torch._foreach_add_(params, steps)

    anchors = [p.clone() for p in params]
    found: tuple[list[float], list[float]] = [], []
    for k in range(rounds + 1):
        for which in (k % 2, 1 - k % 2):  # who comes second finds other caches
            if which:
                found[1].append(timed(ours.step, lambda: inner(anchors)))
                torch._foreach_copy_(anchors, params)
            else:
                found[0].append(timed(by_hand.step, lambda: inner([a.detach() for a in by_hand.anchor])))
    return Row(sum(p.numel() for p in params), wire, found[1][1:], found[0][1:])


def main() -> None:
    """Measure, print, record."""
    flags = parser(__doc__, "round_cost")
    flags.add_argument("--millions", type=float, nargs="+", default=[3.0, 30.0], help="of parameters")
    flags.add_argument("--wires", nargs="+", default=[*WIRES], choices=[*WIRES])
    flags.add_argument("--rounds", type=int, default=61, help="of each that count")
    given = flags.parse_args()
    torch.set_num_threads(1)
    comm = lowcomm.connect("gloo")
    rows: list[Row] = []
    alone: dict[int, list[float]] = {}
    for millions in given.millions:
        for wire in given.wires:
            rows.append(measure(int(millions * 1e6), wire, comm, given.rounds))
        flat = torch.zeros(rows[-1].num)
        alone[len(flat)] = [timed(lambda: dist.all_reduce(flat), flat.zero_) for _ in range(given.rounds + 1)][1:]  # noqa: B023
    if comm.rank == 0:

        def cell(ms: list[float]) -> str:
            return f"{statistics.median(ms):.1f} ({min(ms):.1f})"

        cells = [
            [f"{r.num:,}", r.wire, cell(r.ours_ms), cell(r.by_hand_ms), f"{r.ratio:.2f}", f"{BARS.get(r.wire, '')}"]
            for r in rows
        ]
        columns = ["parameters", "wire", "ours, ms", "by hand, ms", "ratio", "bar"]
        reduced = ", ".join(f"{cell(ms)} ms for {num:,}" for num, ms in alone.items())
        about = (
            f"A round of {len(comm.members)} gloo ranks of one thread on one machine: medians of {given.rounds} rounds "
            f"(and the quickest). By hand is exact in float32. The all_reduce alone takes {reduced}."
        )
        results = {"rows": [asdict(row) for row in rows], "all_reduce_ms": alone}
        record = write_record(given, results, f"{about}\n\n{table(columns, cells)}")
        print((record / "summary.md").read_text(encoding="utf-8"))
    lowcomm.disconnect()


if __name__ == "__main__":
    main()
