"""What an outer round costs on a GPU, but for the wire: milliseconds and memory.

    python -m benchmarks.sync_cost

`DiLoCo` through `lowcomm.attach` in a world of two that answers at once with what this rank said: deltas, codes, means,
the outer step and the new parameters. The inner step, which moves the parameters, is not in it. Times are of CUDA
events, medians with the quickest and slowest; the first rounds, which compile, do not count. Extra memory is the peak
of a round over what lasts from round to round, in multiples of the float32 parameters.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import lowcomm
from benchmarks.record import parser, table, write_record
from lowcomm.codecs.absmax import Absmax
from lowcomm.codecs.bins import Bins
from lowcomm.codecs.e3m0 import E3M0
from lowcomm.codecs.nf4 import NF4
from lowcomm.codecs.sign_magnitude import SignMagnitude
from lowcomm.comm.echo import EchoComm
from lowcomm.compress.gathered import Gathered
from lowcomm.compress.power_sgd import PowerSGD
from lowcomm.compress.quantized import Quantized
from lowcomm.compress.top_k import TopK
from lowcomm.feedback.ef14 import EF14
from lowcomm.outer.nesterov import Nesterov

WIRES: dict[str, lowcomm.Reducer] = {
    "fp32": lowcomm.Reducer(),
    "bf16": lowcomm.Reducer(lowcomm.Cast()),
    "int8": lowcomm.Reducer(Quantized(Absmax(8))),
    "int4": lowcomm.Reducer(Quantized(Absmax(4))),
    "nf4": lowcomm.Reducer(Quantized(NF4())),
    "2-bit bins": lowcomm.Reducer(Quantized(Bins())),
    "e3m0, gathered": lowcomm.Reducer(Gathered(E3M0())),
    "bf16, EF14": lowcomm.Reducer(lowcomm.Cast(), EF14()),
    "int4, EF14": lowcomm.Reducer(Quantized(Absmax(4)), EF14()),
    "top-k 64 of 4096, 2 bits, EF14": lowcomm.Reducer(TopK(num=64, chunk=4096, values=SignMagnitude()), EF14()),
    "PowerSGD of rank 4, EF14": lowcomm.Reducer(PowerSGD(rank=4), EF14()),
}
# of 2^30 parameters on an H200
BARS_MS = {"fp32": 20, "int8": 25, "int4": 30, "top-k 64 of 4096, 2 bits, EF14": 120, "PowerSGD of rank 4, EF14": 45}
MOST_EXTRA = {False: 1.25, True: 2.25}  # without and with a memory of what was not sent
SIDE = 4096  # of each matrix
NUM_WARM = 2


@dataclass(frozen=True)
class Row:
    """One wire.

    Attributes:
        ms: of each round.
        extra: peak memory of a round over what lasts, in multiples of the float32 parameters.
        most_extra: what that may be.
    """

    wire: str
    ms: list[float]
    extra: float
    most_extra: float
    bar_ms: float | None


def timed(step: Callable[[], object]) -> float:
    """Milliseconds on the GPU, from an idle one to an idle one."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measure(wire: str, num: int, rounds: int, profiled: bool) -> Row:
    """One wire on ``num`` parameters."""
    device, reducer = torch.device("cuda"), WIRES[wire]
    model = nn.ParameterList([nn.Parameter(torch.randn(SIDE, SIDE, device=device)) for _ in range(num // SIDE**2)])
    params = [p.detach() for p in model]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sync = lowcomm.attach(model, optimizer, lowcomm.DiLoCo(every=1, reducer=reducer), EchoComm(2))
    step = 1e-3 * torch.randn(SIDE, SIDE, device=device)
    found: list[float] = []
    extra = 0
    for _ in range(NUM_WARM + rounds):
        torch._foreach_add_(params, [step] * len(params))
        lasting = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found.append(timed(sync.step))
        extra = torch.cuda.max_memory_allocated() - lasting
    if profiled:
        torch._foreach_add_(params, [step] * len(params))
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            timed(sync.step)
        print(wire, seen.key_averages().table(sort_by="self_device_time_total", row_limit=14, max_name_column_width=60))
    sync.finish()
    most = MOST_EXTRA[isinstance(reducer.feedback, EF14)]
    return Row(wire, found[NUM_WARM:], extra / (4 * num), most, BARS_MS.get(wire))


def outer_ms(num: int, rounds: int) -> tuple[float, float]:
    """The outer step alone, and with the parameters written; medians."""
    anchor, params, mean = ([torch.randn(SIDE, SIDE, device="cuda") for _ in range(num // SIDE**2)] for _ in range(3))
    outer = Nesterov()
    state = outer.init(anchor)

    def both() -> None:
        outer.apply(anchor, mean, state)
        torch._foreach_copy_(params, anchor)

    alone, copies = (
        statistics.median([timed(call) for _ in range(NUM_WARM + rounds)][NUM_WARM:])
        for call in (lambda: outer.apply(anchor, mean, state), both)
    )
    return alone, copies


def copy_tb_per_s(num: int, rounds: int) -> float:
    """Bytes read and written by a copy."""
    x: Tensor = torch.randn(num, device="cuda")
    y = torch.empty_like(x)
    return 8 * num / min(timed(lambda: y.copy_(x)) for _ in range(rounds)) / 1e9


def main() -> None:
    """Measure, print, record."""
    flags = parser(__doc__, "sync_cost")
    flags.add_argument("--num", type=int, default=2**30, help=f"parameters; a multiple of {SIDE**2}")
    flags.add_argument("--wires", nargs="+", default=[*WIRES], choices=[*WIRES])
    flags.add_argument("--rounds", type=int, default=9, help="of each that count")
    flags.add_argument("--profile", action="store_true", help="print the kernels of one more round of each")
    given = flags.parse_args()
    copy, (outer, written) = copy_tb_per_s(given.num, given.rounds), outer_ms(given.num, given.rounds)
    print(f"copy {copy:.2f} TB/s, outer step {outer:.2f} ms, with parameters {written:.2f} ms", flush=True)
    rows: list[Row] = []
    for wire in given.wires:
        gc.collect()  # what the last one left
        torch.cuda.empty_cache()
        rows.append(measure(wire, given.num, given.rounds, given.profile))
        print(rows[-1], flush=True)
    cells = [
        [
            *(r.wire, f"{statistics.median(r.ms):.1f} ({min(r.ms):.1f} to {max(r.ms):.1f})"),
            *("" if r.bar_ms is None else f"{r.bar_ms}", f"{r.extra:.2f}", f"{r.most_extra}"),
        ]
        for r in rows
    ]
    about = (
        f"{given.num:,} float32 parameters, {given.rounds} rounds. A copy moves {copy:.2f} TB/s; the outer step alone "
        f"takes {outer:.1f} ms, with the parameters written {written:.1f} ms."
    )
    results = {"copy_tb_per_s": copy, "outer_ms": outer, "outer_and_copy_ms": written, "rows": [*map(asdict, rows)]}
    columns = ["wire", "round, ms", "bar, ms", "extra memory", "at most"]
    record = write_record(given, results, f"{about}\n\n{table(columns, cells)}")
    print((record / "summary.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
