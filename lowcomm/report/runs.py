"""Run directories as the report sees them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowcomm import metrics


@dataclass(frozen=True)
class Run:
    """What a run directory holds.

    Attributes:
        name: the directory's name; its whole path where two directories have one name.
        records: lines of metrics.jsonl, of the lowest rank that wrote some.
        config: the text of config.yaml; None without one.
        environment: environment.json; None without one.
        trace: where its trace.json lies; None without one, as only simulations write it.
    """

    name: str
    records: list[dict[str, Any]]
    config: str | None
    environment: dict[str, Any] | None
    trace: Path | None

    def summary(self) -> dict[str, Any]:
        """The last known value of each key, with the run's name: of a run that ended, its summary line."""
        latest = {key: value for record in self.records for key, value in record.items() if value is not None}
        return latest | {"run": self.name if self.ended else f"{self.name} (until step {latest['t']:,})"}

    @property
    def ended(self) -> bool:
        """Whether the run wrote its summary."""
        return bool(self.records[-1]["kind"] == "summary")

    def points(self, kind: str, x: str, y: str) -> list[tuple[float, float]]:
        """The pairs of two keys in lines of a kind, where both are known."""
        pairs = ((record.get(x), record.get(y)) for record in self.records if record["kind"] == kind)
        return [(a, b) for a, b in pairs if a is not None and b is not None]


def load_runs(dirs: Sequence[Path]) -> list[Run]:
    """The runs in some directories, each directory once, in the given order.

    Raises:
        ValueError: when there is no directory, or one without metrics; names it.
    """
    if not dirs:
        raise ValueError("a report needs at least one run directory")
    unique = list({path.resolve(): path for path in dirs}.values())
    short = [path.resolve().name for path in unique]
    names = short if len(set(short)) == len(short) else [str(path) for path in unique]
    return [_load_run(path, name) for path, name in zip(unique, names, strict=True)]


def _load_run(path: Path, name: str) -> Run:
    if not (path / "metrics.jsonl").exists():
        raise ValueError(
            f"{path} holds no metrics.jsonl, so it is no run directory (or its run has not logged yet); give the "
            "--out directory of lowcomm train"
        )
    records = metrics.read(path / "metrics.jsonl")
    if not records:
        raise ValueError(f"{path / 'metrics.jsonl'} has no line yet; wait for the run's first one or leave it out")
    rank = min(record.get("rank", 0) for record in records)
    config, environment, trace = path / "config.yaml", path / "environment.json", path / "trace.json"
    return Run(
        name,
        [record for record in records if record.get("rank", 0) == rank],
        config.read_text(encoding="utf-8", errors="replace") if config.exists() else None,
        _environment(environment) if environment.exists() else None,
        trace if trace.exists() else None,
    )


def _environment(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not whole ({error}); delete it to see the run without") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no object of JSON; delete it to see the run without")
    return found
