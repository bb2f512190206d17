"""How fast codes are on this GPU, beside a copy of the same values.

    python -m benchmarks.codec_speed_gpu

Rates are bytes read plus bytes written over time: of encoding and of decoding those of the float32 values and of the
payload, of a copy twice those of the values. By the host's clock, from an idle GPU to an idle GPU, eight calls in a row
as a loop would queue them, and one call alone, which also waits for Python; medians, of the former with the quartiles.
The first calls of a code, mostly compiling, stand beside it. Payloads must decode to the same bits on the CPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.record import parser, table, write_record
from lowcomm.codecs.absmax import Absmax
from lowcomm.codecs.base import Codec
from lowcomm.codecs.bins import Bins
from lowcomm.codecs.e3m0 import E3M0
from lowcomm.codecs.fp4 import FP4
from lowcomm.codecs.fp8 import FP8
from lowcomm.codecs.half import Half
from lowcomm.codecs.nf4 import NF4
from lowcomm.codecs.qsgd import QSGD
from lowcomm.codecs.sign import Sign
from lowcomm.codecs.sign_magnitude import SignMagnitude
from lowcomm.tensors import rng

CODECS: dict[str, Codec] = {
    "int8": Absmax(),
    "int8, stochastic": Absmax(stochastic=True),
    "fp8 e4m3": FP8(),
    "fp8 e5m2": FP8("e5m2"),
    "int4": Absmax(4),
    "nf4": NF4(),
    "fp4 e2m1": FP4(),
    "e3m0": E3M0(),
    "2-bit bins": Bins(),
    "2-bit signs and magnitudes": SignMagnitude(),
    "QSGD of 127 levels": QSGD(),
    "sign": Sign(),
    "bfloat16": Half(),
}
IN_A_ROW = 8
CHECKED = 2**22 + 17  # values whose payload is decoded on the CPU too


@dataclass(frozen=True)
class Row:
    """What was measured of one code; rates in TB/s, quartiles and, of calls alone, medians.

    Attributes:
        same_on_cpu: whether a payload decodes to the same bits there.
        first_s: seconds of the first encoding and the first decoding together.
    """

    name: str
    codec: str
    encode: list[float]
    decode: list[float]
    encode_alone: float
    decode_alone: float
    same_on_cpu: bool
    first_s: float


def rate(call: Callable[[], object], num_bytes: int, repetitions: int, calls: int = IN_A_ROW) -> list[float]:
    """Quartiles of TB/s, after one repetition that does not count."""
    rates: list[float] = []
    for _ in range(repetitions + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        rates.append(calls * num_bytes / (time.perf_counter() - start) / 1e12)
    return statistics.quantiles(rates[1:], n=4)


def measure(name: str, codec: Codec, x: Tensor, repetitions: int) -> Row:
    """One code."""
    random = rng(0, "rounding", device=x.device)
    start = time.perf_counter()
    payload = codec.encode(x, random)
    codec.decode(payload, x.shape[1])
    torch.cuda.synchronize()
    first_s = time.perf_counter() - start
    num_bytes = x.numel() * 4 + payload.numel()
    calls = partial(codec.encode, x, random), partial(codec.decode, payload, x.shape[1])
    encode, decode = (rate(call, num_bytes, repetitions) for call in calls)
    encode_alone, decode_alone = (rate(call, num_bytes, repetitions, 1)[1] for call in calls)
    few = codec.encode(x[:, :CHECKED], random)
    num = min(CHECKED, x.shape[1])
    same = torch.equal(codec.decode(few, num).cpu(), codec.decode(few.cpu(), num))
    return Row(name, str(codec), encode, decode, encode_alone, decode_alone, same, first_s)


def main() -> None:
    """Measure, write the record."""
    flags = parser(__doc__, "codec_speed_gpu")
    flags.add_argument("--num", type=int, default=2**28, help="values")
    flags.add_argument("--repetitions", type=int, default=15)
    flags.add_argument("--codes", nargs="*", default=[*CODECS], choices=[*CODECS], help="which")
    given = flags.parse_args()
    x = torch.randn(1, given.num, generator=rng(0, "values", device="cuda"), device="cuda")
    y = torch.empty_like(x)
    copy = rate(partial(y.copy_, x), 8 * given.num, given.repetitions)
    del y
    rows: list[Row] = []
    for name in given.codes:
        rows.append(measure(name, CODECS[name], x, given.repetitions))
        print(rows[-1], flush=True)

    def cell(quartiles: list[float], alone: float) -> str:
        low, median, high = quartiles
        return f"{median:.2f} ({low:.2f} to {high:.2f}), {median / copy[1]:.1%}; {alone:.2f}"

    cells = [
        [
            *(r.name, cell(r.encode, r.encode_alone), cell(r.decode, r.decode_alone)),
            *("yes" if r.same_on_cpu else "NO", f"{r.first_s:.1f}"),
        ]
        for r in rows
    ]
    summary = "\n\n".join(
        [
            f"{given.num:,} normal values, {given.repetitions} repetitions of {IN_A_ROW} calls in a row. TB/s of bytes "
            f"read and written: medians, quartiles, the median's share of the copy's {copy[1]:.2f} TB/s; one alone.",
            table(["code", "encode", "decode", "same bits on the CPU", "first calls, s"], cells),
        ]
    )
    results = {"copy": copy, "rows": [asdict(row) for row in rows]}
    print(write_record(given, results, summary))


if __name__ == "__main__":
    main()
