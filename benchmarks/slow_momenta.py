"""MT-DAO and data parallel, both with QHADOPT, at each momentum and learning rate: how far apart they are.

    python -m benchmarks.slow_momenta --train english_train.txt.xz --validation english_val.txt.xz

for a small one, --size 500k --tokens 1200k --seq_len 128 --batch 4 --eval_tokens 100k --precision fp32 --device cpu.

MT-DAO's claim is that a momentum which outlives a round keeps the replicas together. Each run is a `lowcomm simulate`
of its own; the replicas share a device and the batch, so steps and tokens are equal.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

from benchmarks.convergence import Case, Tuned, config, loss_of
from benchmarks.record import parser, table, write_record
from benchmarks.simulations import Job, Parts, add_run_flags, simulate_all

METHODS = ("data parallel, QHADOPT", "MT-DAO")
SECOND_BETA, OMEGA = 0.99, 0.9
KEPT = ("num_parameters", "t", "round", "tokens", "loss", "val_loss", "wall_s")


def case_of(given: argparse.Namespace, method: str, beta: float, lr: float) -> Case:
    """One run, in the terms of `benchmarks.convergence`."""
    return Case(method, given.replicas, Tuned(lr, (beta, SECOND_BETA, OMEGA)), 0)


def save(given: argparse.Namespace, ended: dict[str, Parts]) -> Path:
    """Write the record: a row for each momentum and learning rate of which both methods have ended."""
    dense, local = METHODS
    rows = []
    best: dict[float, list[float]] = {}
    for beta, lr in itertools.product(given.betas, given.lrs):
        keys = [case_of(given, method, beta, lr).key for method in METHODS]
        if not all(key in ended for key in keys):
            continue
        losses = [loss_of(ended[key]) for key in keys]
        rows.append([f"{beta:g}", f"{lr:g}", *_cells(losses)])
        best[beta] = [min(pair) for pair in zip(best.get(beta, losses), losses, strict=True)]
    first = next(iter(ended.values()))
    about = (
        f"Llama {given.size} ({first['num_parameters']:,} parameters), {given.replicas} replicas simulated on one "
        f"device, {given.batch} x {given.seq_len} tokens a step shared among them, {first['tokens']:,} byte tokens in "
        f"all, {first['t']:,} steps, {given.every} steps a round, {given.precision}, one seed. QHADOPT with omega "
        f"{OMEGA} and {SECOND_BETA} for its second moment."
    )
    columns = ["beta", "lr", dense, local, "MT-DAO against data parallel"]
    lines = [about, "", table(columns, rows), "", "The best rate of each for its momentum:", ""]
    lines += [table([columns[0], *columns[2:]], [[f"{beta:g}", *_cells(losses)] for beta, losses in best.items()])]
    return write_record(given, ended, "\n".join(lines))


def _cells(losses: list[float]) -> list[str]:
    dense, local = losses
    return [f"{dense:.4f}", f"{local:.4f}", f"{local / dense - 1:+.2%}"]


def main() -> None:
    """Simulate, print, record; what is done so far is recorded as runs end."""
    flags = parser(__doc__, "slow_momenta")
    add_run_flags(flags, "all replicas together")
    flags.add_argument("--replicas", type=int, default=4)
    flags.add_argument("--every", type=int, default=15, help="steps of a round")
    flags.add_argument("--betas", type=float, nargs="+", default=[0.95, 0.98, 0.99])
    flags.add_argument("--lrs", type=float, nargs="+", default=[0.67e-3, 1.33e-3, 2.67e-3, 5.33e-3])
    flags.add_argument("--compile", action="store_true", help="torch.compile the model")
    flags.add_argument("--stacked", action="store_true", help="compute the gradients of all replicas of a run at once")
    given = flags.parse_args()
    cases = [
        case_of(given, method, beta, lr) for beta, lr, method in itertools.product(given.betas, given.lrs, METHODS)
    ]
    jobs = [Job(case.key, config(given, case), case.num_replicas, given.stacked) for case in cases]
    ended: dict[str, Parts] = {}
    failed = 0
    for run in simulate_all(jobs, num_gpus=0, jobs_per_gpu=given.jobs):
        if run.summary is None:
            failed += 1
            print(f"{run.job.name} failed: {run.error}", file=sys.stderr, flush=True)
            continue
        ended[run.job.name] = {key: run.summary.get(key) for key in KEPT}
        print(f"{run.job.name}: {run.summary['val_loss']:.4f}", flush=True)
        record = save(given, ended)
    if ended:
        print((record / "summary.md").read_text(encoding="utf-8"))
    if failed:
        sys.exit(f"{failed} of {len(jobs)} runs failed")


if __name__ == "__main__":
    main()
