"""Training speed on GPUs: DiLoCo over the same loop without rounds, and data parallel, as `lowcomm train` logs it.

    python -m benchmarks.gpu_throughput --gpus 2 --name gpu_throughput_2

One replica for each GPU (over NCCL when there are two), random text, no evaluation or checkpoint on the way. "no_sync"
is DiLoCo with a round longer than the run. Speed is that of whole rounds between two lines of metrics.jsonl, from the
end of the first round, so that compilation and the end of the run stay outside. Runs alternate.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.launch import train
from benchmarks.record import parser, table, write_record

LOG_EVERY = 10


@dataclass(frozen=True)
class Speed:
    """What one run reached in its steady part.

    Attributes:
        tokens_per_s: of all replicas.
        mfu: share of one device's peak; None where that is not known.
        step_ms: mean time of an inner step, its share of a round included.
        wait: share of the time that rank 0 waited for messages.
        round_bytes: sent by rank 0 for each round of `every` steps.
    """

    method: str
    tokens_per_s: float
    mfu: float | None
    step_ms: float
    wait: float
    round_bytes: float


def config(given: argparse.Namespace, method: str) -> dict[str, Any]:
    """A run of `lowcomm train`."""
    never = num_steps(given) + 1
    algorithm = {
        "diloco": {"class_path": "DiLoCo", "init_args": {"every": given.every}},
        "no_sync": {"class_path": "DiLoCo", "init_args": {"every": never}},
        "data_parallel": {"class_path": "DataParallel"},
    }[method]
    return {
        "model": {"class_path": "Llama", "init_args": {"size": given.size}},
        "data": {
            "source": {
                "class_path": "benchmarks.random_text.RandomText",
                "init_args": {"vocab_size": given.vocab_size},
            },
            "tokenizer": {"class_path": "benchmarks.random_text.Characters", "init_args": {"size": given.vocab_size}},
            "seq_len": given.seq_len,
        },
        "algorithm": algorithm,
        "optimizer": {"path": "torch.optim.AdamW", "args": {"lr": 4e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "schedule": {"class_path": "Cosine", "init_args": {"num_warmup_steps": given.every}},
        "batch": {"size": given.batch, "per": "replica", "num_micro_batches": given.micro_batches},
        # as large as a micro-batch: another size would be compiled anew
        "evaluation": {
            "num_tokens": given.batch // given.micro_batches * given.seq_len,
            "batch_size": given.batch // given.micro_batches,
        },
        "checkpoint": {"every": 0},
        "log": {"every": LOG_EVERY},
        "num_steps": num_steps(given),
        "precision": given.precision,
        "compile": given.compile,
        "device": given.device,
    }


def num_steps(given: argparse.Namespace) -> int:
    """One round to warm up, those that are measured, and a few steps more: the last one ends the run."""
    return int(given.every + given.steps + LOG_EVERY)


def speed(method: str, given: argparse.Namespace, records: list[dict[str, Any]]) -> Speed:
    """From the line after the first round to the one after the last."""
    lines = {record["t"]: record for record in records if record["kind"] == "step"}
    first, last = lines[given.every], lines[given.every + given.steps]
    grown = {key: last[key] - first[key] for key in ("tokens", "time_s", "comm_wait_s", "bytes_sent")}
    tokens_per_s, summary = grown["tokens"] / grown["time_s"], records[-1]
    return Speed(
        method,
        tokens_per_s,
        mfu=None if summary["mfu"] is None else summary["mfu"] / summary["tokens_per_s"] * tokens_per_s,
        step_ms=1e3 * grown["time_s"] / given.steps,
        wait=grown["comm_wait_s"] / grown["time_s"],
        round_bytes=grown["bytes_sent"] * given.every / given.steps,
    )


def main() -> None:
    """Train, print, record; what is done so far is recorded after each run."""
    flags = parser(__doc__, "gpu_throughput")
    flags.add_argument("--gpus", type=int, choices=[1, 2], required=True)
    flags.add_argument("--repeats", type=int, default=2, help="of DiLoCo and of no_sync; data parallel runs once")
    flags.add_argument("--size", default="125m", help="of the Llama")
    flags.add_argument("--vocab_size", type=int, default=32_000)
    flags.add_argument("--batch", type=int, default=32, help="sequences of a replica's step")
    flags.add_argument("--micro_batches", type=int, default=1)
    flags.add_argument("--seq_len", type=int, default=1024)
    flags.add_argument("--every", type=int, default=100, help="steps of a round")
    flags.add_argument("--steps", type=int, default=300, help="that are measured")
    flags.add_argument("--precision", choices=["fp32", "bf16_mixed", "bf16"], default="bf16_mixed")
    flags.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    flags.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cuda")
    given = flags.parse_args()
    if given.repeats < 1 or given.every % LOG_EVERY or given.steps % given.every:
        flags.error(f"--repeats must be at least 1, --every a multiple of {LOG_EVERY} and --steps of --every")

    methods = ["diloco", "no_sync"] * given.repeats + ["data_parallel"] * (given.gpus > 1)
    speeds: list[Speed] = []
    for method in methods:
        with tempfile.TemporaryDirectory() as folder:
            speeds.append(speed(method, given, train(config(given, method), Path(folder, method), given.gpus)))
        summary, results = report(given, speeds)
        record = write_record(given, results, summary)
        print(f"{speeds[-1]}", flush=True)
    print(f"{summary}\nrecord: {record}")


def report(given: argparse.Namespace, speeds: list[Speed]) -> tuple[str, dict[str, Any]]:
    """The summary and the results of the runs so far."""
    medians = {
        method: statistics.median(x.tokens_per_s for x in speeds if x.method == method)
        for method in dict.fromkeys(x.method for x in speeds)
    }
    over = {method: value / medians["no_sync"] for method, value in medians.items()} if "no_sync" in medians else {}
    columns = ("method", "tokens/s", "MFU", "ms a step", "waiting", "bytes a round")
    rows = [
        (
            x.method,
            f"{x.tokens_per_s:,.0f}",
            "–" if x.mfu is None else f"{x.mfu:.1%}",
            f"{x.step_ms:.2f}",
            f"{x.wait:.2%}",
            f"{x.round_bytes:,.0f}",
        )
        for x in speeds
    ]
    ratios = [f"{method} over no_sync: {value:.4f} (medians of tokens/s)  " for method, value in over.items()]
    lines = [
        f"Llama {given.size} with a vocabulary of {given.vocab_size:,}, {given.gpus} replica(s), {given.batch} x "
        f"{given.seq_len} tokens a step and replica, {given.precision}, {'' if given.compile else 'not '}compiled; "
        f"{given.steps} steps, DiLoCo(every={given.every}). A round is {given.every} steps.",
        "",
        table(columns, rows),
        "",
        *[line for line in ratios if not line.startswith("no_sync")],
    ]
    return "\n".join(lines), {"runs": [asdict(x) for x in speeds], "median_tokens_per_s": medians, "over_no_sync": over}


if __name__ == "__main__":
    main()
