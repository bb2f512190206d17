"""The record of a benchmark: what was asked for, what came out, on what hardware, at which commit.

    <out>/<name>/record.json    commit, environment, arguments, results
    <out>/<name>/summary.md     the same for readers: a table

Beside them a script puts its pictures and what its runs wrote.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowcomm.environment import environment

ROOT = Path(__file__).resolve().parents[1]


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks share; ``doc`` is the script's docstring."""
    flags = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--name", default=name, help="of the record")
    flags.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where <name>/ is written")
    flags.add_argument("--commit", default=None, help="of this code, where git cannot tell (a copy without .git)")
    return flags


def write_record(given: argparse.Namespace, results: Any, summary: str) -> Path:
    """Write both files and return their folder; a record of the same name is replaced.

    Args:
        given: the parsed flags of `parser`.
        results: plain data.
        summary: Markdown; the hardware and versions are added.
    """
    seen = environment()
    commit = given.commit or seen["git_commit"]
    arguments = {
        key: value.name if isinstance(value, Path) else value  # the name alone: folders are the machine's own
        for key, value in vars(given).items()
        if key not in ("out", "commit")
    }
    record = {"commit": commit, "environment": seen, "arguments": arguments, "results": results}
    folder: Path = given.out / given.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    state = " with changes that are not committed" if seen["git_dirty"] and not given.commit else ""
    hardware = ", ".join(seen["gpus"]) or f"{seen['num_cpus']} cores of {seen['cpu'] or seen['system']}"
    foot = f"{seen['date_utc']}, commit {commit}{state}, {hardware}, torch {seen['torch']}, Python {seen['python']}."
    (folder / "summary.md").write_text(f"# {given.name}\n\n{summary.strip()}\n\n{foot}\n", encoding="utf-8")
    return folder


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned so that it reads on a terminal too."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(columns))]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)] for cells in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


Curves = Mapping[str, Sequence[tuple[float, float]]]


def save_picture(path: Path, y_title: str, panels: Sequence[tuple[str, bool, Curves]]) -> None:
    """One picture of panels side by side that share their vertical axis.

    Args:
        path: .png or .svg.
        panels: for each the title of its horizontal axis, whether that is logarithmic, and points by curve.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (title, logarithmic, curves) in zip(axes, panels, strict=True):
        for name, points in curves.items():
            ax.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.5, label=name)
        ax.set_xscale("log" if logarithmic else "linear")
        ax.set_xlabel(title)
        ax.grid(linewidth=0.4)
    axes[0].set_ylabel(y_title)
    axes[0].legend()
    figure.savefig(path, dpi=110)
