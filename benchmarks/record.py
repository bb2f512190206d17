"""The record of a benchmark: what was asked for, what came out, on what hardware, at which commit.

    <out>/<name>/record.json    commit, environment, arguments, results
    <out>/<name>/summary.md     the same for readers: a table

Beside them a script puts its pictures and what its runs wrote.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowcomm.environment import environment

ROOT = Path(__file__).resolve().parents[1]
Runs = dict[str, dict[str, Any]]


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks share; ``doc`` is the script's docstring."""
    flags = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    seen = environment()  # of the start: others may commit, and records change files, while it runs
    commit = None if seen["git_dirty"] else seen["git_commit"]
    flags.add_argument("--name", default=name, help="of the record")
    flags.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where <name>/ is written")
    flags.add_argument("--commit", default=commit, help="of this code, where git cannot tell (a copy without .git)")
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
    arguments = {key: value for key, value in _arguments(given).items() if key not in ("out", "commit")}
    record = {"commit": commit, "environment": seen, "arguments": arguments, "results": results}
    folder: Path = given.out / given.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    state = " with changes that are not committed" if seen["git_dirty"] and not given.commit else ""
    versions = f"torch {seen['torch']}, Python {seen['python']}"
    foot = f"{seen['date_utc']}, commit {commit}{state}, {_hardware(seen)}, {versions}."
    (folder / "summary.md").write_text(f"# {given.name}\n\n{summary.strip()}\n\n{foot}\n", encoding="utf-8")
    return folder


def kept_runs(given: argparse.Namespace, free: Collection[str]) -> Runs:
    """The runs of the record of this name, if there is one, to go on with.

    Args:
        free: the flags in which it may have been made otherwise.

    Raises:
        ValueError: when it was made with other arguments.
    """
    path = given.out / given.name / "record.json"
    if not path.exists():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    now = _arguments(given)
    other = [key for key, value in record["arguments"].items() if key not in free and now.get(key) != value]
    if other:
        raise ValueError(f"{path} was made with other {other}; give the same, or another --name")
    origin = {"commit": record["commit"], "hardware": _hardware(record["environment"])}
    return {name: run if "commit" in run else run | origin for name, run in record["results"].items()}


def origin(given: argparse.Namespace) -> dict[str, str]:
    """What to keep with a run of now, in a record whose runs are of several commits or machines."""
    seen = environment()
    return {"commit": given.commit or seen["git_commit"], "hardware": _hardware(seen)}


def origins(runs: Runs) -> str:
    """How many of the runs were made where."""
    found = [(run["commit"] or "unknown", run.get("hardware")) for run in runs.values()]
    places = Counter(f"{commit[:7]} on {where}" if where else commit[:7] for commit, where in found)
    return f"Runs: {'; '.join(f'{num} at {place}' for place, num in places.items())}."


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


def _arguments(given: argparse.Namespace) -> dict[str, Any]:
    """The flags; of paths the name alone, since folders are the machine's own."""
    return {key: value.name if isinstance(value, Path) else value for key, value in vars(given).items()}


def _hardware(seen: Mapping[str, Any]) -> str:
    gpus = ", ".join(f"{num} {name}" for name, num in Counter(seen["gpus"]).items())
    return gpus or f"{seen['num_cpus']} cores of {seen['cpu'] or seen['system']}"
