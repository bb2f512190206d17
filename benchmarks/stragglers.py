"""Rules of who takes part, in virtual time: when does each reach a loss, and which loss does it end with?

    python -m benchmarks.stragglers --train english_train.txt.xz --validation english_val.txt.xz --stacked

for a small one: --size 500k --seq_len 32 --batch 2 --workers 4 --every 5 --rounds 4 --eval_tokens 10k --seeds 1
--first 2 --precision fp32 --device cpu.

DiLoCo on hosts of a fast network. Each worker draws one factor for each of its rounds, as draws of single steps would
average out within a round; "steps" says what those do. The target is the loss at which waiting for all ends, and 1 %.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.record import Runs, kept_runs, origin, origins, parser, table, write_record
from benchmarks.simulations import add_run_flags, language_run, part
from lowcomm.cli import parse_run
from lowcomm.metrics import read
from lowcomm.participation.base import Rule
from lowcomm.participation.options import Participation
from lowcomm.participation.rules import All, Deadline, FirstK, Quorum
from lowcomm.sim.cluster.compute import Around, ComputeModel, Product
from lowcomm.sim.cluster.drawn import Pareto, ShiftedExponential
from lowcomm.sim.cluster.presets import DataCentre
from lowcomm.sim.simulate import simulate

FREE = ("seeds", "first", "jobs", "stacked")


@dataclass(frozen=True)
class PerRound(Around):
    """One draw of a model for all steps of a worker's round.

    Attributes:
        every: steps of a round.
    """

    every: int = 1

    def seconds(self, rank: int, t: int, start: float) -> float:
        return self.model.seconds(rank, (t - 1) // self.every + 1, start)


def times(seed: int) -> dict[str, ComputeModel]:
    """Seconds of a step, a mean of 1."""
    drawn = {f"shifted exponential, a = {a:g}": ShiftedExponential(a=a, seed=seed) for a in (0.2, 1.0)}
    return {**drawn, "Pareto, alpha = 2": Pareto(alpha=2.0, seed=seed)}


def rules(given: argparse.Namespace) -> dict[str, Participation]:
    """By name. Deadline and grace are in seconds of a round's mean."""
    num, round_s = given.workers, float(given.every)
    named: dict[str, tuple[Rule[Any], str]] = {"all": (All(), "carry")}
    for k in given.first or [num // 4, num // 2, 3 * num // 4]:
        named[f"first {k}, late dropped"] = (FirstK(k), "drop")
        named[f"first {k}, late carried (STSyn)"] = (FirstK(k), "carry")
    named["deadline of 1 round"] = (Deadline(round_s, at_least=num // 4), "carry")
    named["half, and 0.2 rounds"] = (Quorum(0.5, 0.2 * round_s), "carry")
    return {name: Participation(rule, "drop" if late == "drop" else "carry") for name, (rule, late) in named.items()}


def trained(given: argparse.Namespace, options: Participation, compute: ComputeModel, seed: int) -> dict[str, Any]:
    """Seconds and loss at the end of each round."""
    described = language_run(
        given, part("DiLoCo", every=given.every), part_of_adamw(given.lr), given.every * given.rounds, "replica", seed
    )
    described["evaluation"]["every"] = given.every
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "run.yaml")
        config.write_text(yaml.safe_dump(described), encoding="utf-8")
        run = replace(parse_run(["--config", str(config)])[0], participation=options)
        out = Path(folder, "out")
        simulate(run, DataCentre(num_hosts=given.workers, compute=Product([compute])), out, stacked=given.stacked)
        lines = read(out / "metrics.jsonl")
    evaluations = [line for line in lines if line["kind"] == "eval"]
    return {"time_s": [x["time_s"] for x in evaluations], "val_loss": [x["val_loss"] for x in evaluations]}


def part_of_adamw(lr: float) -> dict[str, Any]:
    """The inner optimizer."""
    return {"path": "torch.optim.AdamW", "args": {"lr": lr, "betas": [0.9, 0.95], "weight_decay": 0.1}}


def reached_s(run: dict[str, Any], target: float) -> float | None:
    """When a loss was first met."""
    return next((s for s, loss in zip(run["time_s"], run["val_loss"], strict=True) if loss <= target), None)


def save(given: argparse.Namespace, ended: Runs) -> Path:
    """Write the record: a row for each rule and kind of times, means over seeds."""
    rows = []
    for kind in dict.fromkeys(run["times"] for run in ended.values()):
        of_kind = [run for run in ended.values() if run["times"] == kind]
        ends = {run["seed"]: run for run in of_kind if run["rule"] == "all"}
        for rule in dict.fromkeys(run["rule"] for run in of_kind):
            runs = [run for run in of_kind if run["rule"] == rule and run["seed"] in ends]
            found = [reached_s(run, 1.01 * ends[run["seed"]]["val_loss"][-1]) for run in runs]
            alls = [reached_s(ends[run["seed"]], 1.01 * ends[run["seed"]]["val_loss"][-1]) for run in runs]
            if not runs:
                continue
            times_s = [s for s in found if s is not None]
            speeds = [whole / s for s, whole in zip(found, alls, strict=True) if s is not None and whole is not None]
            losses = [run["val_loss"][-1] / ends[run["seed"]]["val_loss"][-1] - 1 for run in runs]
            speed = f"{statistics.mean(speeds):.2f} ({min(speeds):.2f} to {max(speeds):.2f})" if speeds else "–"
            reached = f"{statistics.mean(times_s):,.0f} ({len(times_s)} of {len(runs)})" if times_s else "never"
            worst = f"{statistics.mean(losses):+.2%} ({min(losses):+.2%} to {max(losses):+.2%})"
            rows.append([kind, rule, reached, speed, worst])
    about = (
        f"Llama {given.size}, {given.workers} workers, DiLoCo every {given.every}, {given.rounds} rounds, "
        f"{given.batch} x {given.seq_len} tokens a step of each, AdamW at {given.lr:g}, {given.precision}."
    )
    columns = ["seconds of a step", "rule", "to the target, s", "times faster", "final loss beside all's"]
    return write_record(given, ended, f"{about}\n\n{table(columns, rows)}\n\n{origins(ended)}")


def main() -> None:
    """Simulate, print, record; a later call goes on with what is there."""
    flags = parser(__doc__, "stragglers")
    add_run_flags(flags, "each worker")
    flags.add_argument("--workers", type=int, default=16)
    flags.add_argument("--every", type=int, default=30, help="steps of a round")
    flags.add_argument("--rounds", type=int, default=20)
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--first", type=int, nargs="*", default=[], help="how many static rules wait for")
    flags.add_argument("--lr", type=float, default=2e-3, help="the inner learning rate")
    flags.add_argument("--stacked", action="store_true", help="compute gradients of many replicas at once")
    given = flags.parse_args()
    ended = kept_runs(given, FREE)
    for seed in range(given.seeds):
        for kind, model in times(seed).items():
            for which, compute in ((kind, PerRound(model, given.every)), (f"{kind}, of steps", model)):
                for rule, options in rules(given).items():
                    name = f"{which} | {rule} | {seed}"
                    if name not in ended:
                        setting = {"times": which, "rule": rule, "seed": seed}
                        ended[name] = setting | trained(given, options, compute, seed) | origin(given)
                        print(f"{name}: {ended[name]['val_loss'][-1]:.4f} nats", flush=True)
                        save(given, ended)
    print((save(given, ended) / "summary.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
