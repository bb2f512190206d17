"""Seconds per round on a real slow network and in the simulator, for two methods, two wires and several rates.

    python -m benchmarks.slow_network_rounds

Each case is a `lowcomm train` on rate-limited hosts of this machine (launch/slow_network, which needs root and
iproute2), logged at every step. A round's seconds are the growth of rank 0's time_s from one round's line to the next,
and its wait that of comm_wait_s; the first round, which opens the connections, does not count. Then the same run goes
through `lowcomm simulate` with the measured time of a step outside of messages. Rates are of Ethernet frames; of a
full frame TCP leaves 95.6 % for what lowcomm sends.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from benchmarks.record import ROOT, parser, table, write_record
from lowcomm.metrics import read

METHODS = ("data_parallel", "diloco")
WIRES: dict[str, dict[str, Any]] = {
    "fp32": {"class_path": "Identity"},
    "bf16": {"class_path": "Cast", "init_args": {"dtype": "bfloat16"}},
}
VOCAB_SIZE = 256
TIME_LIMIT_S = 300
PAYLOAD_SHARE = 1448 / 1514  # of an Ethernet frame
LATENCY_S = 1e-4  # between two namespaces of one machine


@dataclass(frozen=True)
class Case:
    """One run: a method and what it sends, on links of one rate."""

    rate_mbit_per_s: float
    method: str
    wire: str


@dataclass(frozen=True)
class Row:
    """What one run took; medians over its rounds but the first.

    Attributes:
        round_s, wait_s: a round, and its part in which rank 0 waited for messages.
        shortest_s, longest_s: rounds.
        round_bytes: sent by rank 0 in a round, as lowcomm counts.
        simulated_s: a round in the simulator, given the measured time of a step outside of messages.
    """

    case: Case
    num_rounds: int
    round_s: float
    shortest_s: float
    longest_s: float
    wait_s: float
    round_bytes: float
    simulated_s: float


def config(given: argparse.Namespace, case: Case) -> dict[str, Any]:
    """A run of `lowcomm train`; only its speed matters, so its text is random and the model small."""
    every = given.every if case.method == "diloco" else 1
    reducer = {"compressor": WIRES[case.wire]}
    text, tokenizer = (f"benchmarks.random_text.{name}" for name in ("RandomText", "Characters"))
    source = {"vocab_size": VOCAB_SIZE, "num_documents": 20, "document_tokens": 5_000}
    return {
        "model": {"class_path": "Llama", "init_args": {"size": given.size}},
        "data": {
            "source": {"class_path": text, "init_args": source},
            "tokenizer": {"class_path": tokenizer, "init_args": {"size": VOCAB_SIZE}},
            "seq_len": given.seq_len,
            "validation_fraction": 0.1,
        },
        "algorithm": (
            {"class_path": "DiLoCo", "init_args": {"every": every, "reducer": reducer}}
            if case.method == "diloco"
            else {"class_path": "DataParallel", "init_args": {"reducer": reducer}}
        ),
        "schedule": {"class_path": "Cosine", "init_args": {"num_warmup_steps": 1}},
        "batch": {"size": given.batch, "per": "replica"},
        "evaluation": {"num_tokens": given.batch * given.seq_len, "batch_size": given.batch},
        "checkpoint": {"every": 0},
        "log": {"every": 1},
        "num_steps": every * (given.rounds + 1),
        "device": "cpu",
        "backend": "gloo",
    }


def train_slowly(config: dict[str, Any], out: Path, num_hosts: int, rate_mbit_per_s: float) -> list[dict[str, Any]]:
    """Train on a network of such links, in the new directory ``out``; rank 0's metrics.

    Raises:
        subprocess.CalledProcessError: when the run fails; its output says why.
    """
    path = out.with_name(f"{out.name}.yaml")
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    network = ["--hosts", str(num_hosts), "--rate", str(rate_mbit_per_s), "--time_limit_s", str(TIME_LIMIT_S)]
    command = [sys.executable, "-m", "lowcomm", "train", "--config", str(path), "--out", str(out)]
    subprocess.run([str(ROOT / "launch" / "slow_network"), *network, "--", *command], check=True, cwd=ROOT)
    return read(out / "metrics.jsonl")


def simulated_seconds(
    config: dict[str, Any], out: Path, num_hosts: int, rate_mbit_per_s: float, step_s: float
) -> float:
    """Seconds of a round of the same run under `lowcomm simulate`, on as many hosts with such links; median.

    Args:
        out: a new directory.
        step_s: of a step outside of messages, as measured: the hosts here share the machine's processors.
    """
    cluster = {
        "class_path": "Uniform",
        "init_args": {
            "num_hosts": num_hosts,
            "bits_per_s": rate_mbit_per_s * 1e6,
            "latency_s": LATENCY_S,
            "compute": {"class_path": "Constant", "init_args": {"mean_s": step_s}},
            "transport": {"bandwidth_factor": PAYLOAD_SHARE},
        },
    }
    paths = [out.with_name(f"{out.name}.{what}.yaml") for what in ("run", "cluster")]
    for path, what in zip(paths, (config, cluster), strict=True):
        path.write_text(yaml.safe_dump(what, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "lowcomm", "simulate", "--config", str(paths[0]), "--cluster", str(paths[1])]
    subprocess.run([*command, "--out", str(out)], check=True, cwd=ROOT)
    return statistics.median(grown(read(out / "metrics.jsonl"), "time_s"))


def grown(records: list[dict[str, Any]], key: str) -> list[float]:
    """How much a running total grew from each round to the next."""
    rounds = [record[key] for record in records if record["kind"] == "round"]
    return [after - before for before, after in pairwise(rounds)]


def measure(given: argparse.Namespace, case: Case, out: Path) -> Row:
    """Run one case."""
    run = config(given, case)
    records = train_slowly(run, out, given.hosts, case.rate_mbit_per_s)
    seconds = grown(records, "time_s")
    assert len(seconds) == given.rounds, "every round writes a line when every step does"
    round_s, wait_s = statistics.median(seconds), statistics.median(grown(records, "comm_wait_s"))
    num_steps = given.every if case.method == "diloco" else 1
    beside = out.with_name(f"{out.name}.simulated")
    simulated_s = simulated_seconds(run, beside, given.hosts, case.rate_mbit_per_s, (round_s - wait_s) / num_steps)
    sent_bytes = statistics.median(grown(records, "bytes_sent"))
    return Row(case, len(seconds), round_s, min(seconds), max(seconds), wait_s, sent_bytes, simulated_s)


def save(given: argparse.Namespace, rows: list[Row]) -> Path:
    """Write the record of the cases measured so far."""
    seconds = ["s / round", "shortest", "longest", "waiting", "MB sent / round", "simulated s"]
    columns = ["Mbit/s", "method", "wire", *seconds, "error"]
    cells = [
        [f"{row.case.rate_mbit_per_s:g}", row.case.method, row.case.wire]
        + [f"{x:.3f}" for x in (row.round_s, row.shortest_s, row.longest_s, row.wait_s, row.round_bytes / 1e6)]
        + [f"{row.simulated_s:.3f}", f"{row.simulated_s / row.round_s - 1:+.1%}"]
        for row in rows
    ]
    about = (
        f"Seconds of a round, measured among {given.hosts} gloo ranks on rate-limited hosts of one machine "
        f"(launch/slow_network): median, shortest and longest of {given.rounds} rounds after the first; waiting is the "
        f"part that rank 0 waited for messages. Llama {given.size}, {given.batch} x {given.seq_len} tokens a step and "
        f"replica, DiLoCo with {given.every} steps a round."
    )
    return write_record(given, [asdict(row) for row in rows], f"{about}\n\n{table(columns, cells)}")


def main() -> None:
    """Measure, print, record; what is done so far is recorded after each case."""
    flags = parser(__doc__, "slow_network_rounds")
    flags.add_argument("--rates", type=float, nargs="+", default=[10.0, 100.0, 1000.0], help="Mbit/s of each host")
    flags.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    flags.add_argument("--wires", nargs="+", choices=list(WIRES), default=list(WIRES))
    flags.add_argument("--hosts", type=int, default=4)
    flags.add_argument("--rounds", type=int, default=8, help="that count")
    flags.add_argument("--every", type=int, default=5, help="DiLoCo's steps of a round")
    flags.add_argument("--size", default="500k", help="of the Llama")
    flags.add_argument("--batch", type=int, default=2, help="sequences of a replica's step")
    flags.add_argument("--seq_len", type=int, default=64)
    given = flags.parse_args()
    if given.rounds < 1:
        flags.error(f"--rounds is {given.rounds}; it must be at least 1")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for rate in given.rates:
            for method in given.methods:
                for wire in given.wires:
                    case = Case(rate, method, wire)
                    rows.append(measure(given, case, Path(folder, f"{method}_{wire}_{rate:g}")))
                    record = save(given, rows)
    print((record / "summary.md").read_text(encoding="utf-8"))
    print(f"record: {record}")


if __name__ == "__main__":
    main()
