"""How fast codes are on this CPU, beside bitsandbytes and torchao where these have the same format.

    python -m benchmarks.codec_speed

In every repetition each code takes its turn, so that all see the same machine. Rates are bytes of float32 values over
time, medians with the quartiles. Needs bitsandbytes and torchao: pip install 'lowcomm[bench]'.
Libraries share their work among threads and so slow down on busy cores: leave the machine alone meanwhile. The record
says how far that was so (on Linux).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import parser, table, write_record
from lowcomm.codecs.absmax import Absmax
from lowcomm.codecs.base import Codec
from lowcomm.codecs.bins import Bins
from lowcomm.codecs.e3m0 import E3M0
from lowcomm.codecs.float32 import Float32
from lowcomm.codecs.fp4 import FP4
from lowcomm.codecs.fp8 import FP8
from lowcomm.codecs.half import Half
from lowcomm.codecs.nf4 import NF4
from lowcomm.codecs.qsgd import QSGD
from lowcomm.codecs.sign import Sign
from lowcomm.codecs.sign_magnitude import SignMagnitude
from lowcomm.optional import require
from lowcomm.tensors import rng

ENOUGH = 1 / 3  # of the fastest library's rate


@dataclass(frozen=True)
class Coder:
    """One code of somebody's.

    Attributes:
        format: codes of one format are compared.
        name: who made it.
        encode: of float32 values.
        decode: of what that returned, to float32 values.
    """

    format: str
    name: str
    encode: Callable[[Tensor], Any]
    decode: Callable[[Any], Tensor]


@dataclass(frozen=True)
class Row:
    """What was measured of one code; rates in bytes of float32 values.

    Attributes:
        relative_error: |decoded - x| / |x| for normal values: shows that formats are alike.
        encode_gb_per_s: quartiles, the median in the middle.
        decode_gb_per_s: likewise.
    """

    format: str
    name: str
    relative_error: float
    encode_gb_per_s: list[float]
    decode_gb_per_s: list[float]


def ours(num: int) -> Iterator[Coder]:
    """The codes of lowcomm."""
    named: list[tuple[str, Codec]] = [
        ("int8, blocks of 256", Absmax()),
        ("int8, blocks of 256, stochastic", Absmax(stochastic=True)),
        ("int4, blocks of 64", Absmax(4, 64, "bfloat16")),
        ("nf4, blocks of 64", NF4()),
        ("fp4 e2m1, blocks of 64", FP4(64, "bfloat16")),
        ("e3m0, blocks of 64", E3M0()),
        ("fp8 e4m3, blocks of 256", FP8("e4m3")),
        ("fp8 e5m2, blocks of 256", FP8("e5m2")),
        ("2-bit bins, blocks of 4096", Bins()),
        ("2-bit signs and magnitudes, blocks of 256", SignMagnitude()),
        ("QSGD of 127 levels, blocks of 512", QSGD()),
        ("sign, blocks of 4096", Sign()),
        ("bfloat16", Half()),
        ("float16", Half("float16")),
        ("float32", Float32()),
    ]
    for form, codec in named:
        yield _ours(form, codec, num)


def theirs() -> Iterator[Coder]:
    """The same formats in other libraries, with the nearest that each has; torchao does not pack 4 bits."""
    bnb = require("bitsandbytes.functional", "lowcomm[bench]")
    ao = require("torchao.quantization.quant_primitives", "lowcomm[bench]")
    yield Coder(
        "int8, blocks of 256",
        "bitsandbytes quantize_blockwise (dynamic)",
        lambda x: bnb.quantize_blockwise(x, blocksize=256),
        lambda coded: bnb.dequantize_blockwise(*coded),
    )
    for form, kind in (("nf4, blocks of 64", "nf4"), ("fp4 e2m1, blocks of 64", "fp4")):
        yield _bnb_4bit(bnb, form, kind)
    for form, block, limit in (("int8, blocks of 256", 256, 127), ("int4, blocks of 64", 64, 7)):
        yield _ao_integers(ao, form, block, limit)
    for form, dtype in (
        ("fp8 e4m3, blocks of 256", torch.float8_e4m3fn),
        ("fp8 e5m2, blocks of 256", torch.float8_e5m2),
    ):
        yield _ao_floats(ao, form, dtype)


def _ours(form: str, codec: Codec, num: int) -> Coder:
    random = rng(0, "rounding")
    return Coder(
        form, "lowcomm", lambda x: codec.encode(x[None], random), lambda payload: codec.decode(payload, num)[0]
    )


def _bnb_4bit(bnb: Any, form: str, kind: str) -> Coder:
    return Coder(
        form,
        f"bitsandbytes quantize_4bit ({kind})",
        lambda x: bnb.quantize_4bit(x, quant_type=kind, blocksize=64),
        lambda coded: bnb.dequantize_4bit(*coded, quant_type=kind),
    )


def _ao_integers(ao: Any, form: str, block: int, limit: int) -> Coder:
    size = (1, block)

    def encode(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cut = x.view(-1, block)
        scale, zero = ao.choose_qparams_affine(cut, ao.MappingType.SYMMETRIC, size, torch.int8, -limit, limit)
        return ao.quantize_affine(cut, size, scale, zero, torch.int8, -limit, limit), scale, zero

    def decode(coded: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        codes, scale, zero = coded
        return ao.dequantize_affine(codes, size, scale, zero, torch.int8, -limit, limit).view(-1)

    return Coder(form, "torchao quantize_affine", encode, decode)


def _ao_floats(ao: Any, form: str, dtype: torch.dtype) -> Coder:
    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        cut = x.view(-1, 256)
        scale = ao._choose_scale_float8(cut, [1, 256], dtype)
        return ao._quantize_affine_float8(cut, scale, dtype), scale

    return Coder(
        form,
        "torchao quantize_affine_float8",
        encode,
        lambda coded: ao._dequantize_affine_float8(*coded, torch.float32).view(-1),
    )


def measure(coders: list[Coder], x: Tensor, repetitions: int) -> list[Row]:
    """All coders by turns. In each turn the first of two passes does not count: memory is as the second needs it."""
    num_bytes = 4 * x.numel()
    encode: list[list[float]] = [[] for _ in coders]
    decode: list[list[float]] = [[] for _ in coders]
    errors = [float((coder.decode(coder.encode(x)) - x).norm() / x.norm()) for coder in coders]
    for _ in range(repetitions):
        for i, coder in enumerate(coders):
            _passed(coder, x)
            encode_s, decode_s = _passed(coder, x)
            encode[i].append(num_bytes / encode_s / 1e9)
            decode[i].append(num_bytes / decode_s / 1e9)
    return [
        Row(coder.format, coder.name, error, statistics.quantiles(e, n=4), statistics.quantiles(d, n=4))
        for coder, error, e, d in zip(coders, errors, encode, decode, strict=True)
    ]


def _passed(coder: Coder, x: Tensor) -> tuple[float, float]:
    """Seconds to encode and to decode; nothing of it stays in memory."""
    start = time.perf_counter()
    coded = coder.encode(x)
    middle = time.perf_counter()
    coder.decode(coded)
    return middle - start, time.perf_counter() - middle


def busy_s() -> float:
    """Seconds that all cores together have worked since the machine started."""
    user, nice, system = Path("/proc/stat").read_text(encoding="utf-8").split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def ratios(rows: list[Row]) -> dict[str, dict[str, float]]:
    """By format that a library has too: our median rate over the best of theirs, encoding and decoding."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        rivals = [other for other in rows if other.format == row.format and other.name != row.name]
        if row.name == "lowcomm" and rivals:
            found[row.format] = {
                "encode": row.encode_gb_per_s[1] / max(rival.encode_gb_per_s[1] for rival in rivals),
                "decode": row.decode_gb_per_s[1] / max(rival.decode_gb_per_s[1] for rival in rivals),
            }
    return found


def summary(rows: list[Row], given: argparse.Namespace, others: float) -> str:
    """Both tables, and what they say about the bar."""
    formats = list(dict.fromkeys(row.format for row in rows))
    ordered = sorted(rows, key=lambda row: (formats.index(row.format), row.name != "lowcomm"))

    def rate(quartiles: list[float]) -> str:
        low, median, high = quartiles
        return f"{median:.2f} ({low:.2f} to {high:.2f})"

    cells = [
        [r.format, r.name, f"{r.relative_error:.4f}", rate(r.encode_gb_per_s), rate(r.decode_gb_per_s)] for r in ordered
    ]
    compared = ratios(rows)
    least = min(min(ratio.values()) for ratio in compared.values())
    verdict = "none is" if least >= ENOUGH else "NOT all are within the bar: at least one is"
    return "\n\n".join(
        [
            f"{given.num:,} normal values, {given.repetitions} repetitions by turns, threads: "
            f"{torch.get_num_threads()} (lowcomm's codes with blocks use one). "
            f"Rates in GB/s of float32 values, medians with the quartiles. Other processes took {others:.0%} of the "
            f"cores' time.",
            table(["format", "code", "error", "encode", "decode"], cells),
            "Our median rate over the best library's:",
            table(
                ["format", "encode", "decode"],
                [[form, f"{r['encode']:.2f}", f"{r['decode']:.2f}"] for form, r in compared.items()],
            ),
            f"The bar is 1/3 of the best library in the same format: {verdict} slower than that; the least is "
            f"{least:.2f}.",
        ]
    )


def main() -> None:
    """Measure, write the record."""
    flags = parser(__doc__, "codec_speed")
    flags.add_argument("--num", type=int, default=2**22, help="values, a multiple of 256")
    flags.add_argument("--repetitions", type=int, default=11)
    flags.add_argument("--threads", type=int, default=None, help="for torch and the libraries; by default all cores")
    given = flags.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    x = torch.randn(given.num, generator=rng(0, "values"))
    coders = [*ours(given.num), *theirs()]
    start, all_before, own_before = time.perf_counter(), busy_s(), time.process_time()
    rows = measure(coders, x, given.repetitions)
    work_s = (time.perf_counter() - start) * (os.cpu_count() or 1)
    others = max(0.0, busy_s() - all_before - (time.process_time() - own_before)) / work_s
    results = {"rows": [asdict(row) for row in rows], "ratios": ratios(rows), "share_of_others": others}
    print(write_record(given, results, summary(rows, given, others)))


if __name__ == "__main__":
    main()
