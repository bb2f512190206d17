"""A language model by every synchronous method at equal tokens: validation loss and bytes, learning rates tuned.

    python -m benchmarks.convergence grid --train english_train.txt.xz --validation english_val.txt.xz
    python -m benchmarks.convergence rest --train english_train.txt.xz --validation english_val.txt.xz

`grid` trains every method at each choice of its grid, with the first of --replicas and the first seed. `rest`
goes on with the record that `grid` wrote: the best choice of each method with the other seeds and numbers of replicas.
Between them `extend` adds rates to those methods of --extended whose best one is the last that was tried, --most times;
see extend_grids.sh. With --choose_on, choices are made by the loss on that text, and --validation is for the report.
Each run is a `lowcomm simulate` of its own; the replicas share a device and the batch, so steps and tokens are equal.
Bytes are those that a replica hands to the wire, evaluation left out. Beside the record lies pareto.png.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.comparison import Row, held, loss_of, rounding
from benchmarks.methods import CLAIMS, METHODS, OPTIMIZERS, Others, Setting
from benchmarks.record import Runs, kept_runs, origins, parser, table, write_record
from benchmarks.simulations import Job, Parts, add_run_flags, add_runs, language_run, warmup_of
from lowcomm.report.si import si

KEPT = ("num_parameters", "members", "t", "round", "tokens", "loss", "val_loss", "val_bits_per_byte", "wire_bytes")
# what two stages of one record may differ in
FREE = ("stage", "only", "among", "seeds", "gpus", "jobs", "limit_s", "stacked", "extended", "most", "plan")
# of an H200 for each replica of 1,221 steps of the 10m model
GPU_S, GPU_STEPS = 5.5, 1221
# the first of these is what the others are set beside
BASELINE = "data parallel"


@dataclass(frozen=True)
class Tuned:
    """What is chosen for a method: the inner learning rate and what goes with it."""

    lr: float
    others: Others

    def __str__(self) -> str:
        return f"{self.lr:g}" + (f" with {'/'.join(f'{x:g}' for x in self.others)}" if self.others else "")


@dataclass(frozen=True)
class Case:
    """One run."""

    method: str
    num_replicas: int
    tuned: Tuned
    seed: int
    is_choosing: bool = False

    @property
    def key(self) -> str:
        """What the record calls it."""
        seed = f"seed {self.seed}{', choosing' if self.is_choosing else ''}"
        return f"{self.method} | {self.num_replicas} replicas | lr {self.tuned} | {seed}"


def parsed(tuned: str) -> Tuned:
    """The inverse of a choice as text."""
    lr, _, others = tuned.partition(" with ")
    return Tuned(float(lr), tuple(float(x) for x in others.split("/")) if others else ())


def choosing(given: argparse.Namespace, name: str, tuned: Tuned) -> Case:
    """A run that a choice is made by: on a text of its own, if there is one."""
    return Case(name, given.replicas[0], tuned, 0, given.choose_on is not None)


def choices(given: argparse.Namespace, name: str) -> list[Tuned]:
    """The grid of a method."""
    method = METHODS[METHODS[name].tuned_as or name]
    rates = [float(f"{method.lr * factor:.4g}") for factor in given.grid]
    first, *more = method.others[: 1 if given.rates_only else None]
    middle = float(f"{rates[len(rates) // 2] * method.others_factor:.4g}")
    return [Tuned(lr, first) for lr in rates] + [Tuned(middle, others) for others in more]


def config(given: argparse.Namespace, case: Case) -> Parts:
    """A run of `lowcomm simulate`."""
    method = METHODS[case.method]
    num_steps = -(-given.tokens // (given.batch * given.seq_len))
    setting = Setting(given.every, case.tuned.lr, warmup_of(num_steps), case.tuned.others)
    optimizer = OPTIMIZERS[method.optimizer](case.tuned.lr, case.tuned.others)
    texts = argparse.Namespace(**vars(given) | ({"validation": given.choose_on} if case.is_choosing else {}))
    run = language_run(texts, method.algorithm(setting), optimizer, num_steps, "run", case.seed)
    return run | {"compile": given.compile}


def grid(given: argparse.Namespace, names: list[str], ended: Runs) -> list[Case]:
    """Every method at every rate of its grid."""
    del ended
    return [choosing(given, name, tuned) for name in names for tuned in choices(given, name)]


def rest(given: argparse.Namespace, names: list[str], ended: Runs) -> list[Case]:
    """The best rates with more replicas and more seeds; the longest runs first."""
    best = {}
    for name in names:
        try:
            best[name] = best_of(given, name, ended)
        except ValueError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return [
        Case(name, num_replicas, best[name], seed)
        for num_replicas in sorted(given.among or given.replicas, reverse=True)
        for seed in range(given.seeds)
        for name in best
        if seed == 0 or METHODS[name].is_seeded
    ]


def best_of(given: argparse.Namespace, name: str, ended: Runs) -> Tuned:
    """The choice of the lowest loss, of its grid; of all that were tried, if it is one of ``given.extended``.

    Raises:
        ValueError: when a run of its grid is missing.
    """
    tuned_as = METHODS[name].tuned_as or name
    candidates = choices(given, name)
    missing = [key for tuned in candidates if (key := choosing(given, tuned_as, tuned).key) not in ended]
    if missing:
        raise ValueError(f"these are not in the record yet: {missing}; run the stage grid first")
    found = dict(tried(given, tuned_as, ended))
    if tuned_as in given.extended:
        candidates = [parsed(tuned) for tuned in found]
    return min(candidates, key=lambda tuned: found[str(tuned)])


def edge_of(given: argparse.Namespace, name: str, best: Tuned, results: Runs) -> str:
    """On which side no rate was tried, or none that was worse: "lowest", "highest", "only"; "" if on neither."""
    found = [(parsed(tuned).lr, loss) for tuned, loss in tried(given, METHODS[name].tuned_as or name, results)]
    own = dict(tried(given, METHODS[name].tuned_as or name, results))[str(best)]
    is_lowest = not any(lr < best.lr and loss > own for lr, loss in found)
    is_highest = not any(lr > best.lr and loss > own for lr, loss in found)
    return ("only" if is_highest else "lowest") if is_lowest else "highest" if is_highest else ""


def extend(given: argparse.Namespace, names: list[str], ended: Runs) -> list[Case]:
    """One rate more, twice or half, for those of ``given.extended`` whose best one is the last that was tried."""
    cases = []
    for name in names:
        if name in given.extended:
            best = best_of(given, name, ended)
            factor = {"lowest": 0.5, "highest": 2.0}.get(edge_of(given, name, best, ended))
            if factor is not None:
                cases.append(choosing(given, name, replace(best, lr=float(f"{factor * best.lr:.4g}"))))
    return cases


STAGES: dict[str, Callable[[argparse.Namespace, list[str], Runs], list[Case]]] = {
    "grid": grid,
    "extend": extend,
    "rest": rest,
}


def tried(given: argparse.Namespace, name: str, results: Runs) -> list[tuple[str, float]]:
    """What a method was tried with at the first number of replicas and seed, in the grid or beyond it; its losses on
    the text that choices are made by.
    """
    found = {}
    for key, run in results.items():
        method, _, tuned, _ = key.split(" | ")
        tuned = tuned.removeprefix("lr ")
        if method == name and key == choosing(given, name, parsed(tuned)).key:
            found[tuned] = loss_of(run)
    return sorted(found.items(), key=lambda choice: float(choice[0].split()[0]))


def rows_of(given: argparse.Namespace, results: Runs) -> list[Row]:
    """What there is to compare so far."""
    rows = []
    for num_replicas in given.replicas:
        for name in METHODS:
            try:
                tuned = best_of(given, name, results)
            except ValueError:
                continue
            keys = {seed: Case(name, num_replicas, tuned, seed).key for seed in range(given.seeds)}
            found = {seed: results[key] for seed, key in keys.items() if key in results}
            if 0 in found:
                losses = {seed: loss_of(run) for seed, run in found.items()}
                edge = edge_of(given, name, tuned, results)
                rows.append(Row(name, num_replicas, tuned, losses, found[0]["wire_bytes"], edge))
    return rows


def summary(given: argparse.Namespace, results: Runs) -> str:
    """The tables of the runs that have ended."""
    rows, noise = rows_of(given, results), rounding(results)
    by_key = {(row.name, row.num_replicas): row for row in rows}
    cells = []
    for row in rows:
        beside = [_gap(row, by_key.get((name, row.num_replicas))) for name in (METHODS[row.name].beside, "DiLoCo")]
        dense = by_key.get((BASELINE, row.num_replicas))
        fewer = "–" if dense is None or not row.wire_bytes else f"{dense.wire_bytes / row.wire_bytes:,.1f}"
        losses = row.losses.values()
        spread = f"{min(losses):.4f} to {max(losses):.4f} ({len(losses)})" if len(losses) > 1 else "one seed"
        cells.append(
            [
                *(f"{row.num_replicas}", row.name, str(row.tuned), row.edge, f"{row.loss:.4f}", spread),
                *(f"{row.loss / math.log(2):.4f}", *beside, si(row.wire_bytes, "B"), fewer),
            ]
        )
    columns = ["replicas", "method", "lr", "edge of those tried", "val loss (nats)", "seeds", "bits/byte"]
    columns += ["against data parallel", "against DiLoCo", "sent per replica", "times fewer"]
    first = next(iter(results.values()))
    text = "the text that losses are of" if given.choose_on is None else "another text than losses are of"
    about = (
        f"Llama {given.size} ({first['num_parameters']:,} parameters), replicas simulated on one device, "
        f"{given.batch} x {given.seq_len} tokens a step shared among them, {first['tokens']:,} byte tokens in all, "
        f"{first['t']:,} steps, {given.every} steps a round, {given.precision}. Learning rates are the best of "
        f"{' / '.join(f'{x:g}' for x in given.grid)} times each optimizer's own, and what goes with them of a "
        f"few, at {given.replicas[0]} replicas and one seed, by {text}: see below. A rate at the edge "
        "of those tried may not be the best. Data parallel, in the column that names it, is with the same "
        "optimizer. Methods are set beside each other by the seeds that both have."
    )
    apart = (
        "No runs of this record differ in rounding alone, so of one seed it cannot say how sure a gap is."
        if noise is None
        else f"Runs of data parallel that differ in rounding alone are up to {noise:.2%} apart."
    )
    held_by = (
        f"{apart} ± is that over the root of the number of seeds, or half of the gap's range over them if that is "
        "more; a tie lies within it."
    )
    grids = [
        [name, tuned, f"{loss:.4f}", "yes" if tuned in {str(choice) for choice in choices(given, name)} else "no"]
        for name in METHODS
        if METHODS[name].tuned_as is None
        for tuned, loss in tried(given, name, results)
    ]
    claims = [
        [claim.text, claim.source, f"{n}", str(gap), verdict] for claim, n, gap, verdict in held(rows, CLAIMS, noise)
    ]
    lines = [
        about,
        "",
        table(columns, cells),
        "",
        "![loss against bytes](pareto.png)",
        "",
        f"What was expected. {held_by}",
    ]
    lines += ["", table(["expected", "by", "replicas", "measured", "holds"], claims)]
    lines += ["", "Loss at each choice:", "", table(["method", "lr", "val loss (nats)", "in the grid"], grids)]
    return "\n".join([*lines, "", origins(results)])


def save(given: argparse.Namespace, results: Runs) -> Path:
    """Write the record and the picture of the runs that have ended."""
    record = write_record(given, results, summary(given, results))
    draw(rows_of(given, results), record / "pareto.png")
    return record


def _gap(row: Row, other: Row | None) -> str:
    return "–" if other is None else f"{row.behind(other).value:+.2%}"


def draw(rows: list[Row], path: Path) -> None:
    """Loss against bytes, a panel for each number of replicas; the line joins those that no other beats in both."""
    from matplotlib.figure import Figure

    numbers = sorted({row.num_replicas for row in rows}) or [0]
    figure = Figure(figsize=(7 * len(numbers), 5), layout="constrained")
    axes = figure.subplots(1, len(numbers), sharey=True, squeeze=False)[0]
    for ax, num_replicas in zip(axes, numbers, strict=True):
        # one replica sends nothing, which has no place on a scale of powers
        shown = [row for row in rows if row.num_replicas == num_replicas and row.wire_bytes and math.isfinite(row.loss)]
        best: list[tuple[float, float]] = []
        for point in sorted((row.wire_bytes, row.loss) for row in shown):
            if not best or point[1] < best[-1][1]:
                best.append(point)
        if best:
            ax.plot(*zip(*best, strict=True), color="#999999", linewidth=1, zorder=0)
        for row in shown:
            ax.scatter([row.wire_bytes], [row.loss], s=22, color="#4878a8")
            ax.annotate(row.name, (row.wire_bytes, row.loss), textcoords="offset points", xytext=(4, 3), fontsize=7)
        ax.set_xscale("log")
        ax.set_xlabel(f"bytes sent by each of {num_replicas} replicas")
        ax.grid(linewidth=0.4)
    axes[0].set_ylabel("validation loss (nats a byte)")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Simulate, print, record; what is done so far is recorded as runs end."""
    flags = parser(__doc__, "convergence")
    add_run_flags(flags, "all replicas together")
    flags.add_argument("stage", choices=list(STAGES))
    flags.add_argument("--only", nargs="+", default=None, help="names of methods; all by default")
    flags.add_argument("--replicas", type=int, nargs="+", default=[4, 8])
    flags.add_argument("--among", type=int, nargs="+", default=None, help="of those, what `rest` runs; all by default")
    flags.add_argument("--grid", type=float, nargs="+", default=[0.5, 1.0], help="times each optimizer's own rate")
    flags.add_argument(
        "--rates_only", action="store_true", help="only each method's first choice beside the learning rate"
    )
    flags.add_argument("--seeds", type=int, default=3, help="of the methods that get several")
    flags.add_argument("--every", type=int, default=15, help="steps of a round")
    flags.add_argument("--compile", action="store_true", help="torch.compile the model")
    flags.add_argument("--stacked", action="store_true", help="compute the gradients of all replicas of a run at once")
    flags.add_argument("--gpus", type=int, default=0, help="that share out the runs; 0: each run chooses")
    flags.add_argument("--limit_s", type=float, default=None, help="what has not ended by then is left out")
    flags.add_argument("--extended", nargs="+", default=[], help="methods that may choose beyond their grid")
    flags.add_argument("--most", type=int, default=2, help="rates that `extend` adds to a method")
    flags.add_argument("--choose_on", type=Path, default=None, help="a text to choose by; --validation by default")
    flags.add_argument("--plan", action="store_true", help="only print what is left to run, and about its GPU-seconds")
    given = flags.parse_args()
    if unknown := {*(given.only or []), *given.extended} - set(METHODS):
        flags.error(f"--only or --extended {sorted(unknown)} are unknown; there are {list(METHODS)}")
    ended, until = kept_runs(given, FREE), None if given.limit_s is None else time.monotonic() + given.limit_s
    if given.choose_on is not None and ended and not any(key.endswith("choosing") for key in ended):
        flags.error("the choices of this record were made by --validation; give another --name to make them anew")
    tuned = [name for name in METHODS if given.stage == "rest" or METHODS[name].tuned_as is None]
    names = [name for name in tuned if given.only is None or name in given.only]
    for _ in range(given.most if given.stage == "extend" else 1):
        cases = [case for case in STAGES[given.stage](given, names, ended) if case.key not in ended]
        if given.plan or not cases:
            print(plan(given, cases))
            return
        jobs = [Job(case.key, config(given, case), case.num_replicas, given.stacked) for case in cases]
        left_s = None if until is None else until - time.monotonic()
        add_runs(given, ended, jobs, (*KEPT, "wall_s"), partial(save, given), given.gpus, left_s)


def plan(given: argparse.Namespace, cases: list[Case]) -> str:
    """The runs that are left, and about what they take of an H200 where the model is the 10m one."""
    num_steps = -(-given.tokens // (given.batch * given.seq_len))
    seconds = sum(GPU_S * num_steps / GPU_STEPS * case.num_replicas for case in cases)
    return "\n".join([*(case.key for case in cases), f"{len(cases)} runs, about {seconds:,.0f} GPU-seconds"])


if __name__ == "__main__":
    main()
