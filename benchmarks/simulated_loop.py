"""The part `loop` of `benchmarks.simulator_speed`: the real training loop of more and more ranks, in timing alone.

python -m benchmarks.simulated_loop 1000 fp32     # one point, as a line of JSON
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import ROOT, table
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.compress.base import Compressor
from lowcomm.compress.cast import Cast
from lowcomm.compress.identity import Identity
from lowcomm.config import Checkpointing, Run
from lowcomm.models.llama import Llama
from lowcomm.reduce import Reducer
from lowcomm.sim.cluster.presets import Home
from lowcomm.sim.memory import peak_bytes
from lowcomm.sim.simulate import simulate

COMPRESSORS: dict[str, Compressor[Any]] = {"fp32": Identity(), "bf16": Cast()}


def point(num_ranks: int, precision: str) -> dict[str, Any]:
    """One step and one round of each rank in this process: seconds of the simulation, files included, and peak memory.

    Two ranks go before, so that what is imported and looked up once does not count.
    """
    algorithm = DiLoCo(every=1, reducer=Reducer(COMPRESSORS[precision]))
    run = Run(model=Llama("1m"), algorithm=algorithm, checkpoint=Checkpointing(every=0), num_steps=1)
    with tempfile.TemporaryDirectory() as folder:
        simulate(run, Home(num_hosts=2), Path(folder) / "first", timing_only=True)
        cpu, wall = time.process_time(), time.perf_counter()
        simulate(run, Home(num_hosts=num_ranks), Path(folder) / "out", timing_only=True)
        seconds = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
        peak = peak_bytes(torch.device("cpu"))
    return {"ranks": num_ranks, "precision": precision, **seconds, "peak_bytes": peak}


def loop(given: argparse.Namespace) -> tuple[Any, str]:
    """All points, each in a process of its own, and the exponents of the cost as (n log n)^a."""
    sizes = [100, 1000] if given.quick else [n for n in (1000, 10_000, 100_000) if n <= given.most_ranks]
    points = [measured(n, precision) for n in sizes for precision in COMPRESSORS]
    exponents = {}
    for precision in COMPRESSORS:
        own = [x for x in points if x["precision"] == precision]
        scale = [math.log(x["ranks"] * math.log2(x["ranks"])) for x in own]
        for clock in ("cpu", "wall"):
            seconds = [math.log(x[f"{clock}_s"]) for x in own]
            exponents[f"{precision}, {clock}"] = statistics.linear_regression(scale, seconds).slope
    columns = ("ranks", "average in", "CPU s", "wall s", "ms a rank", "peak GB")
    rows = [
        (
            *(f"{x['ranks']:,}", x["precision"], f"{x['cpu_s']:.1f}", f"{x['wall_s']:.1f}"),
            *(f"{1e3 * x['cpu_s'] / x['ranks']:.2f}", f"{x['peak_bytes'] / 1e9:.2f}"),
        )
        for x in points
    ]
    text = (
        "The real training loop in timing alone (`lowcomm simulate --timing_only true`): Llama 1m, DiLoCo, one step "
        "and one round, cluster Home, with metrics of every rank and trace. Cost as (n log n)^a: a = "
        + ", ".join(f"{a:.3f} ({name})" for name, a in exponents.items())
        + " (target: at most 1.1; 10,000 ranks in 30 s and 1.5 GB, 100,000 in 480 s and 12 GB).\n\n"
        + table(columns, rows)
    )
    return {"points": points, "exponents": exponents}, text


def measured(num_ranks: int, precision: str) -> dict[str, Any]:
    """A point in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.simulated_loop", str(num_ranks), precision]
    printed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    print(found, flush=True)
    return found


if __name__ == "__main__":
    print(json.dumps(point(int(sys.argv[1]), sys.argv[2])))
