"""Eager DiLoCo at each length of its rounds and each outer step, beside DiLoCo with such rounds: what the delay costs.

    python -m benchmarks.eager_rounds --train english_train.txt.xz --validation english_val.txt.xz

for a small one, --size 500k --tokens 1200k --seq_len 128 --batch 4 --eval_tokens 100k --precision fp32 --device cpu.

Each run is a `lowcomm simulate` of its own; the replicas share a device and the batch, so steps and tokens are equal.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from pathlib import Path

from benchmarks.comparison import loss_of
from benchmarks.methods import OPTIMIZERS
from benchmarks.record import Runs, kept_runs, origins, parser, table, write_record
from benchmarks.simulations import Job, Parts, add_run_flags, add_runs, language_run, part

# DiLoCo's outer step is its own, as in `benchmarks.methods`
DILOCO_OUTER = (0.7, 0.6)
FREE = ("rounds", "outers", "jobs")
KEPT = ("num_parameters", "t", "round", "tokens", "loss", "val_loss", "wall_s")


def settings(given: argparse.Namespace) -> list[Parts]:
    """What tells one run from another: its method, steps of a round, outer learning rate and momentum."""
    outers = [tuple(float(x) for x in outer.split("/")) for outer in given.outers]
    kinds = [("DiLoCo", DILOCO_OUTER), *(("EagerDiLoCo", outer) for outer in outers)]
    return [
        {"method": method, "every": every, "outer_lr": outer[0], "momentum": outer[1]}
        for every, (method, outer) in itertools.product(given.rounds, kinds)
    ]


def job_of(given: argparse.Namespace, setting: Parts) -> Job:
    """One run."""
    outer = part("Nesterov", lr=setting["outer_lr"], momentum=setting["momentum"])
    algorithm = part(setting["method"], every=setting["every"], outer=outer)
    num_steps = -(-given.tokens // (given.batch * given.seq_len))
    run = language_run(given, algorithm, OPTIMIZERS["adamw"](given.lr, ()), num_steps, "run", 0)
    return Job(" | ".join(f"{key} {value}" for key, value in setting.items()), run, given.replicas, setting=setting)


def save(given: argparse.Namespace, ended: Runs) -> Path:
    """Write the record: a row for each run, beside DiLoCo with rounds as long."""
    dense = {run["every"]: loss_of(run) for run in ended.values() if run["method"] == "DiLoCo"}
    rows = []
    for run in sorted(ended.values(), key=lambda run: (run["every"], run["method"], run["outer_lr"], run["momentum"])):
        other = dense.get(run["every"])
        outer = f"{run['outer_lr']:g} with {run['momentum']:g}"
        gap = "–" if other is None else f"{loss_of(run) / other - 1:+.2%}"
        rows.append([str(run["every"]), run["method"], outer, f"{loss_of(run):.4f}", gap])
    first = next(iter(ended.values()))
    about = (
        f"Llama {given.size} ({first['num_parameters']:,} parameters), {given.replicas} replicas simulated on one "
        f"device, {given.batch} x {given.seq_len} tokens a step shared among them, {first['tokens']:,} byte tokens in "
        f"all, {first['t']:,} steps, AdamW at {given.lr:g}, {given.precision}, one seed."
    )
    columns = ["steps of a round", "method", "outer lr, momentum", "val loss (nats)", "against DiLoCo"]
    return write_record(given, ended, "\n".join([about, "", table(columns, rows), "", origins(ended)]))


def main() -> None:
    """Simulate, print, record; a later call goes on with what is there."""
    flags = parser(__doc__, "eager_rounds")
    add_run_flags(flags, "all replicas together")
    flags.add_argument("--replicas", type=int, default=4)
    flags.add_argument("--lr", type=float, default=2e-3, help="the inner learning rate")
    flags.add_argument("--rounds", type=int, nargs="+", default=[5, 15], help="steps of a round")
    flags.add_argument(
        "--outers", nargs="+", default=["0.4/0", "0.7/0", "0.7/0.3"], help="learning rates and momenta of eager DiLoCo"
    )
    given = flags.parse_args()
    jobs = [job_of(given, setting) for setting in settings(given)]
    add_runs(given, kept_runs(given, FREE), jobs, KEPT, partial(save, given))


if __name__ == "__main__":
    main()
