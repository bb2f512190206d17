"""MT-DAO and data parallel, both with QHADOPT, at each momentum and learning rate: how far apart they are.

    python -m benchmarks.slow_momenta --train english_train.txt.xz --validation english_val.txt.xz

for a small one, --size 500k --tokens 1200k --seq_len 128 --batch 4 --eval_tokens 100k --precision fp32 --device cpu.

MT-DAO's claim is that a momentum which outlives a round keeps the replicas together. Three more methods begin with
40 % of the steps in data parallel, two of them with outer Nesterov. Each run is a `lowcomm simulate` of its own; the
replicas share a device and the batch, so steps and tokens are equal.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.comparison import loss_of
from benchmarks.convergence import Case, Tuned, config
from benchmarks.record import Runs, kept_runs, origins, parser, table, write_record
from benchmarks.simulations import Job, add_run_flags, add_runs

# the first is what the others are set beside
METHODS = (
    "data parallel, QHADOPT",
    "MT-DAO",
    "MT-DAO, from data parallel",
    "MT-DAO-Nesterov, from data parallel",
    "MT-DAO-Nesterov 0.8, from data parallel",
)
# what runs of one record may differ in: a later call goes on with what is there
FREE = ("betas", "lrs", "methods", "jobs", "stacked")
SECOND_BETA, OMEGA = 0.99, 0.9
KEPT = ("num_parameters", "t", "round", "tokens", "loss", "val_loss", "wall_s")


def case_of(given: argparse.Namespace, method: str, beta: float, lr: float) -> Case:
    """One run, in the terms of `benchmarks.convergence`."""
    return Case(method, given.replicas, Tuned(lr, (beta, SECOND_BETA, OMEGA)), 0)


def save(given: argparse.Namespace, ended: Runs) -> Path:
    """Write the record: a row for each momentum and learning rate, and one for each momentum with the best rates."""
    losses = {(run["beta"], run["lr"], run["method"]): loss_of(run) for run in ended.values()}
    methods = [x for x in METHODS if any(method == x for _, _, method in losses)]
    pairs = sorted({(beta, lr) for beta, lr, _ in losses})
    rows = [[f"{beta:g}", f"{lr:g}", *_cells([losses.get((beta, lr, x)) for x in methods])] for beta, lr in pairs]
    best = []
    for beta in sorted({beta for beta, _ in pairs}):
        found = [min((y for (b, _, z), y in losses.items() if (b, z) == (beta, x)), default=None) for x in methods]
        best.append([f"{beta:g}", *_cells(found)])
    first = next(iter(ended.values()))
    about = (
        f"Llama {given.size} ({first['num_parameters']:,} parameters), {given.replicas} replicas simulated on one "
        f"device, {given.batch} x {given.seq_len} tokens a step shared among them, {first['tokens']:,} byte tokens in "
        f"all, {first['t']:,} steps, {given.every} steps a round, {given.precision}, one seed. QHADOPT with omega "
        f"{OMEGA} and {SECOND_BETA} for its second moment."
    )
    columns = ["beta", "lr", *methods, *(f"{x} against data parallel" for x in methods[1:])]
    lines = [about, "", table(columns, rows), "", "The best rate of each for its momentum:", ""]
    lines += [table([columns[0], *columns[2:]], best)]
    return write_record(given, ended, "\n".join([*lines, "", origins(ended)]))


def _cells(losses: Sequence[float | None]) -> list[str]:
    """The losses, then by how much each but the first is above the first."""
    dense, *others = losses
    gaps = ["–" if dense is None or loss is None else f"{loss / dense - 1:+.2%}" for loss in others]
    return [*("–" if loss is None else f"{loss:.4f}" for loss in losses), *gaps]


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
    flags.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS[:2])
    given = flags.parse_args()
    jobs = []
    for beta, lr, method in itertools.product(given.betas, given.lrs, given.methods):
        case, setting = case_of(given, method, beta, lr), {"method": method, "beta": beta, "lr": lr}
        jobs.append(Job(case.key, config(given, case), case.num_replicas, given.stacked, setting))
    add_runs(given, kept_runs(given, FREE), jobs, KEPT, partial(save, given))


if __name__ == "__main__":
    main()
