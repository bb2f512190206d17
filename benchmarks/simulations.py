"""Many `lowcomm simulate` at a time, shared out among the GPUs of one machine."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

import yaml

from benchmarks.language_model import number, text
from benchmarks.record import ROOT, Runs, origin
from lowcomm.metrics import read

Parts = dict[str, Any]


def part(name: str, **options: Any) -> Parts:
    """A class of a config and its options."""
    return {"class_path": name, "init_args": options} if options else {"class_path": name}


def add_run_flags(flags: argparse.ArgumentParser, batch_of: str) -> None:
    """The flags of a `language_run`, and how many run at a time.

    Args:
        batch_of: what the batch is of, for the help.
    """
    flags.add_argument("--train", type=Path, required=True, help=".txt, .jsonl (both also .gz, .xz) or .parquet")
    flags.add_argument("--validation", type=Path, required=True)
    flags.add_argument("--separator", default="\0", help="between documents of a text file; a zero byte by default")
    flags.add_argument("--size", default="10m", help="of the Llama")
    flags.add_argument("--tokens", type=number, default="20M", help="of all replicas, rounded up to whole steps")
    flags.add_argument("--seq_len", type=int, default=512)
    flags.add_argument("--batch", type=int, default=8, help=f"sequences of a step of {batch_of}")
    flags.add_argument("--eval_tokens", type=number, default="1M")
    flags.add_argument("--precision", choices=["fp32", "bf16_mixed", "bf16"], default="bf16_mixed")
    flags.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    flags.add_argument("--jobs", type=int, default=1, help="runs at a time, on each GPU")


def language_run(
    given: argparse.Namespace, algorithm: Parts, optimizer: Parts, num_steps: int, per: str, seed: int
) -> Parts:
    """A config: a Llama on bytes of ``given``'s files, evaluated at its end, 5 % of the steps warming up.

    Args:
        given: size, train, validation, separator, seq_len, batch, eval_tokens, precision and device.
        per: what the batch is of, "replica" or "run".
    """
    return {
        "model": part("Llama", size=given.size),
        "data": {
            "source": text(given.train, given.separator),
            "validation": text(given.validation, given.separator),
            "tokenizer": part("Bytes"),
            "seq_len": given.seq_len,
        },
        "algorithm": algorithm,
        "optimizer": optimizer,
        "schedule": part("Cosine", num_warmup_steps=warmup_of(num_steps), final=0.1),
        "batch": {"size": given.batch, "per": per},
        "evaluation": {"every": 0, "num_tokens": given.eval_tokens, "batch_size": 32},
        "checkpoint": {"every": 0},
        "log": {"every": 10},
        "num_steps": num_steps,
        "precision": given.precision,
        "device": given.device,
        "seed": seed,
    }


def warmup_of(num_steps: int) -> int:
    """Steps of warm-up in `language_run`."""
    return round(0.05 * num_steps)


@dataclass(frozen=True)
class Job:
    """One simulated run.

    Attributes:
        name: tells it from the others.
        config: of `lowcomm simulate`.
        num_replicas: on equal hosts.
        stacked: compute the gradients of all replicas at once.
        setting: what a record says of it beside what came out.
    """

    name: str
    config: Parts
    num_replicas: int
    stacked: bool = False
    setting: Parts = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """What came of a job.

    Attributes:
        summary: the last line of its metrics, with `wire_bytes`, the bytes that rank 0 sent but for evaluation, and
            `wall_s`; None if it failed.
        error: the end of its output then.
    """

    job: Job
    summary: dict[str, Any] | None
    error: str


def simulate_all(
    jobs: Sequence[Job], num_gpus: int, jobs_per_gpu: int, limit_s: float | None = None
) -> Iterator[Ended]:
    """Run them in order, as many at once as there are places; each is handed out as it ends.

    Args:
        num_gpus: the first of those that CUDA_VISIBLE_DEVICES names, or of all; 0 leaves the choice to each run.
        limit_s: from now on; what has not ended by then is stopped and counts as failed. None: as long as it takes.
    """
    until = None if limit_s is None else time.monotonic() + limit_s
    places: Queue[int] = Queue()
    for place in range(max(1, num_gpus) * jobs_per_gpu):
        places.put(place % max(1, num_gpus))

    def run(job: Job, folder: Path) -> Ended:
        gpu = places.get()
        try:
            return _simulate(job, folder, gpu if num_gpus else None, until)
        finally:
            places.put(gpu)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(places.qsize()) as pool:
        futures = [pool.submit(run, job, Path(folder, str(i))) for i, job in enumerate(jobs)]
        for future in as_completed(futures):
            yield future.result()


def add_runs(
    given: argparse.Namespace,
    ended: Runs,
    jobs: Sequence[Job],
    kept: Sequence[str],
    save: Callable[[Runs], Path],
    num_gpus: int = 0,
    limit_s: float | None = None,
) -> None:
    """Simulate those that have not ended yet, print and record each as it ends, and print the record.

    Args:
        given: jobs, of a GPU at a time, and commit.
        ended: by name; what ends is added.
        kept: of a run's summary, for the record.
        save: writes the record of what has ended, and returns its folder.
        num_gpus, limit_s: see `simulate_all`.

    Raises:
        SystemExit: when some failed, once all others have ended.
    """
    todo = [job for job in jobs if job.name not in ended]
    failed: list[str] = []
    for run in simulate_all(todo, num_gpus, given.jobs, limit_s):
        if run.summary is None:
            failed.append(run.job.name)
            print(f"{run.job.name} failed: {run.error}", file=sys.stderr, flush=True)
            continue
        ended[run.job.name] = run.job.setting | {key: run.summary.get(key) for key in kept} | origin(given)
        print(f"{run.job.name}: {run.summary['val_loss']} nats, {run.summary['wall_s']:.0f} s", flush=True)
        save(ended)
    if ended:
        record = save(ended)
        print((record / "summary.md").read_text(encoding="utf-8"))
        print(f"record: {record}")
    if failed:
        sys.exit(f"{len(failed)} of {len(todo)} runs failed: {failed}")


def _simulate(job: Job, out: Path, gpu: int | None, until: float | None) -> Ended:
    start = time.monotonic()
    if until is not None and start >= until:
        return Ended(job, None, "not started: the time was over")
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(job.config, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "lowcomm", "simulate", "--config", str(path), "--out", str(out)]
    cluster = ["--cluster", "Uniform", "--cluster.num_hosts", str(job.num_replicas)]
    cluster += ["--stacked", str(job.stacked).lower()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    name = visible.split(",")[gpu] if visible and gpu is not None else str(gpu)
    env = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": name})
    try:
        left_s = None if until is None else until - start
        done = subprocess.run([*command, *cluster], cwd=ROOT, env=env, capture_output=True, text=True, timeout=left_s)
    except subprocess.TimeoutExpired:
        return Ended(job, None, "stopped: the time was over")
    if done.returncode:
        return Ended(job, None, f"{done.stdout[-500:]} {done.stderr[-2000:]}")
    summary: dict[str, Any] = read(out / "metrics.jsonl")[-1]
    evaluation = summary["traffic"].get("evaluation", {"bytes_sent": 0})["bytes_sent"]
    return Ended(
        job,
        summary | {"wire_bytes": summary["bytes_sent"] - evaluation, "wall_s": time.monotonic() - start},
        "",
    )
