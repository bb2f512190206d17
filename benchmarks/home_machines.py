"""Eight uneven home machines: loss against simulated hours and against bytes, for three methods at three link speeds.

    python -m benchmarks.home_machines

Each method trains once with `lowcomm simulate`, three at a time; all talk in an order that links cannot change, so the
other link speeds are `lowcomm retime` of the same runs. docs/home_machines.md says what is asked and what came out.
Beside the record lie the pictures, report.html, the configs, the clusters, and rank 0's metrics of each run.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.record import ROOT, parser, save_picture, table, write_record
from lowcomm.metrics import of_replicas, read
from lowcomm.models.llama import Llama
from lowcomm.report.gantt import gantt
from lowcomm.report.page import write_report
from lowcomm.report.si import si
from lowcomm.report.timeline import middle_steps, span_of_steps
from lowcomm.sim.record.trace import read_chrome_trace

# of each home: speed of computing, and its links beside the slowest home's
HOMES = ((1.0, 1), (1.0, 2), (0.8, 1), (2 / 3, 2), (0.5, 1), (0.5, 2), (1 / 3, 1), (0.25, 2))
UP_MBIT_PER_S = (1, 10, 100)
TRAINED_AT = 10  # Mbit/s; the others are timed anew
DOWN = 5  # times as fast as up
LATENCY_S = 0.02
# The model that the clusters are made for, see `cluster`, and its step on the fastest home.
STANDS_FOR_PARAMETERS = 1e9
STEP_S = 20.0
BF16 = {"compressor": {"class_path": "Cast", "init_args": {"dtype": "bfloat16"}}}
NESTEROV = {"class_path": "Nesterov", "init_args": {"lr": 1.0, "momentum": 0.5}}
# the better of 1.4e-3 and 3e-3 in runs of 280 steps
LEARNING_RATES = {"data_parallel": 3e-3, "local_sgd": 3e-3, "diloco": 1.4e-3}
METHODS: dict[str, dict[str, Any]] = {
    "data_parallel": {"class_path": "DataParallel", "init_args": {"reducer": BF16}},
    "local_sgd": {"class_path": "LocalSGD", "init_args": {"every": 7, "reducer": BF16}},
    "diloco": {"class_path": "DiLoCo", "init_args": {"every": 28, "outer": NESTEROV, "reducer": BF16}},
}


@dataclass(frozen=True)
class Result:
    """One method at one link speed.

    Attributes:
        hours: of the whole run, virtual.
        points: hours, bytes sent by a home, and validation loss, at each evaluation.
        waiting: the share of the time in which the home that waits longest waited for messages; and the shortest.
    """

    method: str
    up_mbit_per_s: int
    hours: float
    points: list[tuple[float, int, float]]
    waiting: tuple[float, float]

    def hours_to(self, loss: float) -> float:
        """When an evaluation first found at most this loss; infinite when none did."""
        return next((hours for hours, _, found in self.points if found <= loss), math.inf)


def config(given: argparse.Namespace, method: str) -> dict[str, Any]:
    """A run; methods differ in the algorithm and the learning rate alone."""
    return {
        "model": {"class_path": "Llama", "init_args": {"size": given.size}},
        "data": {"source": {"class_path": "StandardLibrary"}, "tokenizer": {"class_path": "Bytes"}, "seq_len": 128},
        "algorithm": METHODS[method],
        "optimizer": {
            "path": "torch.optim.AdamW",
            "args": {"lr": LEARNING_RATES[method], "betas": [0.9, 0.95], "weight_decay": 0.1},
        },
        "schedule": {"class_path": "Cosine", "init_args": {"num_warmup_steps": given.steps // 20, "final": 0.1}},
        "batch": {"size": 4, "per": "replica"},
        "num_steps": given.steps,
        "log": {"every": 28},
        "evaluation": {"every": 28, "num_tokens": 32768, "batch_size": 32},
        "checkpoint": {"every": 0},
    }


def cluster(up_mbit_per_s: float, num_parameters: int) -> dict[str, Any]:
    """The homes, for a model that is smaller than the one it stands for.

    Links are slower by as much as messages are shorter, so that a message takes as long as the big model's would.
    """
    unit = up_mbit_per_s * 1e6 * num_parameters / STANDS_FOR_PARAMETERS
    hosts = [
        {"count": 1, "up_bits_per_s": unit * link, "down_bits_per_s": DOWN * unit * link, "speed": speed}
        for speed, link in HOMES
    ]
    return {
        "class_path": "Custom",
        "init_args": {
            "hosts_and_paths": {"hosts": hosts, "latency_s": [[LATENCY_S]]},
            "compute": {"class_path": "Constant", "init_args": {"mean_s": STEP_S}},
        },
    }


def lowcomm(*words: str) -> None:
    """Run the command, on one thread."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "lowcomm", *words], check=True, cwd=ROOT, env=environ)


def write_yaml(path: Path, value: Mapping[str, Any]) -> str:
    """Write a file, and return its name for a command line."""
    path.write_text(yaml.safe_dump(dict(value), sort_keys=False), encoding="utf-8")
    return str(path)


def run_dir(folder: Path, method: str, up_mbit_per_s: int) -> Path:
    """Where a run lies, or will."""
    return folder / f"{method}_{up_mbit_per_s}"


def train(folder: Path, given: argparse.Namespace, method: str) -> None:
    """Simulate a method on the middle links."""
    run = write_yaml(folder / f"{method}.yaml", config(given, method))
    out = str(run_dir(folder, method, TRAINED_AT))
    lowcomm("simulate", "--config", run, "--cluster", str(folder / f"homes_{TRAINED_AT}.yaml"), "--out", out)


def retime(folder: Path, method: str, up_mbit_per_s: int) -> None:
    """Give a method's run the times of other links."""
    trained, out = (str(run_dir(folder, method, rate)) for rate in (TRAINED_AT, up_mbit_per_s))
    lowcomm("retime", trained, "--cluster", str(folder / f"homes_{up_mbit_per_s}.yaml"), "--out", out)


def result(folder: Path, method: str, up_mbit_per_s: int) -> Result:
    """What a run wrote."""
    dir = run_dir(folder, method, up_mbit_per_s)
    records = read(dir / "metrics.jsonl")
    lines = [x for x in records if x["kind"] == "eval"]
    shares = [x["comm_wait_s"] / x["time_s"] for x in of_replicas(dir)]
    points = [(x["time_s"] / 3600, x["bytes_sent"], x["val_loss"]) for x in lines]
    return Result(method, up_mbit_per_s, records[-1]["time_s"] / 3600, points, (max(shares), min(shares)))


def goals(results: Iterable[Result]) -> list[float]:
    """A loss that all methods come to, rounded up to a twentieth, and one that is easier by a quarter."""
    hardest = math.ceil(20 * max(min(loss for *_, loss in x.points) for x in results)) / 20
    return [hardest + 0.25, hardest]


def summary(
    given: argparse.Namespace, results: Sequence[Result], num_parameters: int, took: Mapping[str, float]
) -> str:
    """The tables."""
    losses, larger = goals(results), STANDS_FOR_PARAMETERS / num_parameters
    columns = ["up-link", "method", "hours in all", *(f"hours to {loss:.2f}" for loss in losses), "last loss"]
    columns += ["sent by a home", "of 1B", "waiting: most", "least"]
    rows = []
    for x in results:
        _, sent, loss = x.points[-1]
        hours = [f"{hours:,.1f}" for hours in (x.hours, *map(x.hours_to, losses))]
        traffic = [si(sent, "B"), si(sent * larger, "B")]
        rows.append(
            [f"{x.up_mbit_per_s} Mbit/s", x.method, *hours, f"{loss:.3f}", *traffic, *map("{:.0%}".format, x.waiting)]
        )
    return "\n".join(
        [
            f"Llama {given.size} ({num_parameters:,} parameters) on {len(HOMES)} homes, {given.steps} steps of 4 x 128 "
            f"bytes each, validation loss in nats a byte, virtual hours. Links are slower by {larger:,.0f}, so that "
            f"hours are those of 1B parameters and {STEP_S:g} s a step on the fastest home; so are the bytes of 1B.",
            "",
            table(columns, rows),
            "",
            f"The command took {took['wall_s'] / 60:.1f} minutes and {took['cpu_s'] / 60:.1f} minutes of CPU time.",
            "",
            "![loss against hours](hours.png)",
            "",
            "![loss against bytes](bytes.png)",
        ]
    )


def save_timeline(path: Path, run: Path) -> None:
    """A picture of three rounds in the middle of a run."""
    spans, last = read_chrome_trace(run / "trace.json"), read(run / "metrics.jsonl")[-1]
    window_s = span_of_steps(spans, *middle_steps(last["t"], last["round"]))
    assert window_s is not None, "the run has steps"
    path.write_text(gantt(spans, id=path.stem, start_s=window_s[0], end_s=window_s[1]) + "\n", encoding="utf-8")


def main() -> None:
    """Train, time anew, record."""
    flags = parser(__doc__, "home_machines")
    flags.add_argument("--size", default="500k", help="of the Llama")
    flags.add_argument("--steps", type=int, default=840, help="inner steps of each replica; a multiple of 28")
    given = flags.parse_args()
    begun_s = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_parameters = count(given)
        for rate in UP_MBIT_PER_S:
            write_yaml(folder / f"homes_{rate}.yaml", cluster(rate, num_parameters))
        with ThreadPoolExecutor(len(METHODS)) as pool:
            list(pool.map(lambda method: train(folder, given, method), METHODS))
            others = [(method, rate) for method in METHODS for rate in UP_MBIT_PER_S if rate != TRAINED_AT]
            list(pool.map(lambda other: retime(folder, *other), others))
        results = [result(folder, method, rate) for rate in UP_MBIT_PER_S for method in METHODS]
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        took = {"wall_s": time.monotonic() - begun_s, "cpu_s": used.ru_utime + used.ru_stime}
        measured = {"num_parameters": num_parameters, **took, "runs": [vars(x) for x in results]}
        record = write_record(given, measured, summary(given, results, num_parameters, took))
        save(record, folder, results)
    print((record / "summary.md").read_text(encoding="utf-8"))
    print(f"record: {record}")


def count(given: argparse.Namespace) -> int:
    """Parameters of the model, whose messages the links are scaled for."""
    return sum(x.numel() for x in Llama(given.size).build(256, 0).parameters())


def save(record: Path, folder: Path, results: Sequence[Result]) -> None:
    """Put the pictures and what the runs wrote beside the record."""
    panels = []
    for rate in UP_MBIT_PER_S:
        curves = {x.method: [(hours, loss) for hours, _, loss in x.points] for x in results if x.up_mbit_per_s == rate}
        panels.append((f"hours, {rate} Mbit/s up", True, curves))
    save_picture(record / "hours.png", "validation loss (nats a byte)", panels)
    sent = {x.method: [(sent, loss) for _, sent, loss in x.points] for x in results if x.up_mbit_per_s == TRAINED_AT}
    save_picture(record / "bytes.png", "validation loss (nats a byte)", [("bytes sent by a home", True, sent)])
    for method in METHODS:
        shutil.copyfile(folder / f"{method}.yaml", record / f"{method}.yaml")
        save_timeline(record / f"timeline_{method}.svg", run_dir(folder, method, TRAINED_AT))
        for rate in UP_MBIT_PER_S:
            dir = run_dir(folder, method, rate)
            shutil.copyfile(dir / "metrics.jsonl", record / f"{dir.name}.metrics.jsonl")
    for rate in UP_MBIT_PER_S:
        shutil.copyfile(folder / f"homes_{rate}.yaml", record / f"homes_{rate}.yaml")
    write_report([run_dir(folder, method, TRAINED_AT) for method in METHODS], record / "report.html")


if __name__ == "__main__":
    main()
