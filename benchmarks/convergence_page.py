"""The tables of docs/convergence.md, from the records.

    python -m benchmarks.convergence_page

prints them; a test holds the page against them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.comparison import Row, held, loss_of, rounding
from benchmarks.convergence import BASELINE, parsed, rows_of
from benchmarks.methods import CLAIMS, METHODS
from benchmarks.record import ROOT, Runs
from lowcomm.report.si import si

RESULTS = ROOT / "benchmarks" / "results"
# what the page calls a method, in its order
NAMES = {
    "data parallel": "data parallel",
    "Local SGD": "Local SGD",
    "DiLoCo": "DiLoCo",
    "Streaming int4": "Streaming DiLoCo, 4 bits",
    "eager": "eager DiLoCo",
    "NoLoCo": "NoLoCo",
    "GASLoC": "GASLoC",
    "QSR": "QSR",
    "SparseLoCo": "SparseLoCo",
    "data parallel, Muon": "data parallel with Muon",
    "MuLoCo": "MuLoCo",
    "data parallel, ADOPT": "data parallel with ADOPT",
    "Local ADOPT": "Local ADOPT",
    "DES-LOC": "DES-LOC on ADOPT",
    "DES-LOC-Nesterov 0.8, from data parallel": "DES-LOC, from data parallel, outer Nesterov",
    "data parallel, QHADOPT": "data parallel with QHADOPT",
    "MT-DAO": "MT-DAO",
    "MT-DAO-Nesterov 0.8, from data parallel": "MT-DAO, from data parallel, outer Nesterov",
}


def record(name: str) -> tuple[argparse.Namespace, Runs]:
    """Arguments and runs; those of older records as they would be called now."""
    kept = json.loads((RESULTS / name / "record.json").read_text(encoding="utf-8"))
    given = argparse.Namespace(**{"rates_only": False, "extended": [], "choose_on": None} | kept["arguments"])
    return given, {key.replace(", outer ", " with "): run for key, run in kept["results"].items()}


def best_rows(of: str) -> list[Row]:
    """Every method of a record at the choice that was best with the first number of replicas and seed."""
    given, runs = record(of)
    losses: dict[tuple[str, int, str], dict[int, float]] = {}
    for key, run in runs.items():
        method, members, tuned, seed = key.split(" | ")
        place = (method, int(members.split()[0]), tuned.removeprefix("lr "))
        losses.setdefault(place, {})[int(seed.split()[1])] = loss_of(run)
    best: dict[str, str] = {}
    for (name, num, choice), found in losses.items():
        is_first = num == given.replicas[0]
        if is_first and (name not in best or found[0] < losses[name, num, best[name]][0]):
            best[name] = choice
    return [
        Row(name, num, parsed(choice), found, runs[f"{name} | {num} replicas | lr {choice} | seed 0"]["wire_bytes"])
        for (name, num, choice), found in losses.items()
        if choice == best.get(name, choice)
    ]


def methods_table(rows: Sequence[Row], noise: float) -> list[str]:
    """A line for each method: losses with 4 and 8 replicas, beside data parallel, and bytes of 4."""
    by_key = {(row.name, row.num_replicas): row for row in rows}
    columns = [
        "method",
        "4 replicas",
        "against data parallel",
        "8 replicas",
        "against data parallel",
        "sent, of 4",
        "rate",
    ]
    lines = [columns, ["---"] * len(columns)]
    for name, called in NAMES.items():
        if (name, 4) not in by_key:
            continue
        cells = [called]
        for n in (4, 8):
            row = by_key.get((name, n))
            cells.append("" if row is None else _loss(row))
            cells.append("" if row is None or name == BASELINE else _gap(row, by_key[BASELINE, n], noise))
        first = by_key[name, 4]
        lines.append([*cells, si(first.wire_bytes, "B"), first.edge])
    return [_line(cells) for cells in lines]


def claims_table(records: Sequence[Sequence[Row]], noise: float) -> list[str]:
    """A line for each claim: by how much a method is behind, in each record, and whether it holds."""
    found = {
        (claim.text, k, n): f"{100 * gap.value:+.1f} ± {100 * (gap.error or 0):.1f} %, {verdict}"
        for k, rows in enumerate(records)
        for claim, n, gap, verdict in held(rows, CLAIMS, noise)
    }
    columns = ["expected", "by", "8 x 512, 4 replicas", "8 replicas", "32 x 512, 4 replicas", "8 replicas"]
    lines = [columns, ["---"] * len(columns)]
    for claim in CLAIMS:
        cells = [found.get((claim.text, k, n), "") for k in range(len(records)) for n in (4, 8)]
        if any(cells):
            lines.append([claim.text, claim.source, *cells])
    return [_line(cells) for cells in lines]


def tables() -> dict[str, list[str]]:
    """All tables by what they are of."""
    given, runs = record("convergence")
    noise = rounding(runs)
    assert noise is not None, "data parallel ran with 4 and with 8 replicas"
    small, large = rows_of(given, runs), best_rows("convergence_large_batch")
    # Muon with 8 replicas stands in a record of its own
    large += [row for row in best_rows("convergence_large_batch_muon") if "Mu" in row.name]
    large = [row for row in large if METHODS[row.name].optimizer != "qhadopt"]
    return {
        "8 x 512": methods_table(small, noise),
        "32 x 512": methods_table([replace(row, edge="") for row in large], noise),
        "expected": claims_table([small, large], noise),
    }


def _loss(row: Row) -> str:
    several = f" ± {row.spread:.4f} ({len(row.losses)})" if len(row.losses) > 1 else ""
    return f"{row.loss:.4f}{several}"


def _gap(row: Row, other: Row, noise: float) -> str:
    gap = row.behind(other, noise)
    return f"{100 * gap.value:+.1f} ± {100 * (gap.error or 0):.1f} %"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


if __name__ == "__main__":
    for title, lines in tables().items():
        print(f"{title}\n\n" + "\n".join(lines) + "\n")
