"""Writes metrics.jsonl, one JSON object per line, and passes lines to other sinks.

Keys mean the same in every file. A line has those that apply; a value that is not known or not finite is null.

    kind             step, round, eval, fault or summary; the summary is the last line of a run that ended
    t, round, rank   inner steps and rounds so far; who wrote the line
    time_s           seconds of the run so far, virtual in the simulator
    tokens           trained on so far by all replicas together
    loss, val_loss   nats a token: mean of training since the last step line; of validation
    val_bits_per_byte     val_loss in bits a byte of text
    bytes_sent, bytes_received   by this rank so far
    comm_wait_s, compute_s       of this rank so far, in training: neither before it begins nor in its pauses
    members          replicas that took part
    lr, tokens_per_s, mfu        learning rate; speed of all replicas; share of the device's peak arithmetic
    algorithm, num_parameters, traffic    in the summary; traffic is bytes by purpose
"""

from __future__ import annotations

import functools
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowcomm.optional import require
from lowcomm.report.si import si

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

KINDS = ("step", "round", "eval", "fault", "summary")
Record = Mapping[str, Any]


class Sink(ABC):
    """Another destination for lines."""

    @abstractmethod
    def write(self, record: Record) -> None:
        """Write a line."""

    @abstractmethod
    def close(self) -> None:
        """Finish; nothing is written afterwards."""


class Metrics:
    """Appends lines to a file, flushed before `write` returns, and passes them on.

    The file is open only during writes, as a simulation has one for each of very many ranks.
    """

    def __init__(self, path: Path, sinks: Sequence[Sink] = ()) -> None:
        self._path, self._sinks = path, tuple(sinks)
        self._has_begun = False

    def write(self, record: Record) -> None:
        """Write one line; it has at least ``kind`` and ``t``."""
        assert record["kind"] in KINDS, record
        assert isinstance(record["t"], int), record
        clean = _finite(record)
        line = json.dumps(clean, allow_nan=False) + "\n"
        if not self._has_begun:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._has_begun = True
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line)
        for sink in self._sinks:
            sink.write(clean)

    def close(self) -> None:
        """Close all sinks."""
        for sink in self._sinks:
            sink.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All lines of a file, except an incomplete last one.

    Raises:
        ValueError: when the file is missing, or another line is no JSON object.
    """
    return [record for _, record in _lines(path)]


def truncate_after(path: Path, t: int) -> None:
    """Drop lines of steps after ``t``, summaries and an incomplete last line, which a run resumed from ``t`` writes
    again.

    The replacement is atomic; a missing file is fine. Call it before the first `Metrics.write`.

    Raises:
        ValueError: when a line that is not the last is no JSON object.
    """
    if not path.exists():
        return
    kept = [line for line, record in _lines(path) if record["t"] <= t and record["kind"] != "summary"]
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each whole line as it stands and as it reads."""
    if not path.exists():
        raise ValueError(f"there is no {path}; a run directory holds one from its first logged step on")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not {"kind", "t"} <= record.keys():
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number} is no line of metrics: {line[:80]!r}; delete it if you know why")
        parsed.append((line, record))
    return parsed


def _finite(value: Any) -> Any:
    """``value`` with null for every float that is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- sinks ----------------------------------------------------------------------------------------------------------


class ProgressSink(Sink):
    """Progress: a live bar on a terminal, otherwise a line now and then."""

    def __init__(self, num_steps: int, every_s: float = 10.0, console: Console | None = None) -> None:
        """Print on the standard output, or on ``console``.

        Args:
            num_steps: of the whole run.
            every_s: seconds between lines of steps, where there is no terminal.
        """
        from rich.console import Console

        self._num_steps, self._every_s = num_steps, every_s
        self._console = console or Console(soft_wrap=True)
        self._latest: dict[str, Any] = {}
        self._first: tuple[int, float] | None = None  # step and time of the first line: a resumed run starts late
        self._printed_s = -math.inf
        self._bar: Progress | None = None

    def write(self, record: Record) -> None:
        now = time.monotonic()
        self._latest |= {key: value for key, value in record.items() if value is not None}
        self._first = self._first or (record["t"], now)
        if record["kind"] == "fault":
            self._print(f"fault at step {record['t']}: {record.get('message', 'a replica was lost')}")
        elif self._console.is_terminal and record["kind"] != "summary":
            self._show(self._line(now))
        elif record["kind"] in ("eval", "summary") or now - self._printed_s >= self._every_s:
            self.close()
            self._print(self._line(now))
            self._printed_s = now

    def close(self) -> None:
        """Leave the last state of the bar on the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _show(self, line: str) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        if self._bar is None:
            columns = (BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, console=self._console)
            self._bar.add_task("", total=self._num_steps)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=self._latest["t"], description=line)

    def _line(self, now: float) -> str:
        assert self._first is not None
        latest, (first_t, first_s) = self._latest, self._first
        t = latest["t"]
        parts = [f"step {t:,}/{self._num_steps:,}"]
        parts += [f"loss {latest['loss']:.4f}"] if "loss" in latest else []
        parts += [f"val {latest['val_loss']:.4f}"] if "val_loss" in latest else []
        parts += [f"{si(latest['tokens_per_s'])} tokens/s"] if "tokens_per_s" in latest else []
        parts += [f"{si(latest['bytes_sent'], 'B')} sent"] if "bytes_sent" in latest else []
        if first_t < t < self._num_steps:
            left_s = round((now - first_s) / (t - first_t) * (self._num_steps - t))
            parts.append(f"{left_s // 3600}:{left_s // 60 % 60:02}:{left_s % 60:02} left")
        return "  ".join(parts)


class TensorBoardSink(Sink):
    """Every number of every line as a scalar of its key."""

    def __init__(self, dir: Path) -> None:
        """Write event files into ``dir``.

        Raises:
            ValueError: when tensorboard is not installed.
        """
        self._open = functools.partial(require("torch.utils.tensorboard", "tensorboard").SummaryWriter, str(dir))
        self._writer: Any = None

    def write(self, record: Record) -> None:
        """Add the line's numbers at its step; the first line purges later steps of an interrupted run."""
        if self._writer is None:
            self._writer = self._open(purge_step=record["t"])
        for key, value in _numbers(record).items():
            self._writer.add_scalar(key, value, record["t"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbSink(Sink):
    """Every number of every line in a Weights & Biases run."""

    def __init__(self, project: str, name: str, mode: Literal["online", "offline"] | None = None) -> None:
        """Start a run.

        Args:
            mode: "offline" writes to the disk only; None leaves it to wandb, which reads the variable WANDB_MODE.

        Raises:
            ValueError: when wandb is not installed.
        """
        self._run = require("wandb", "wandb").init(project=project, name=name, mode=mode)

    def write(self, record: Record) -> None:
        self._run.log(_numbers(record), step=record["t"])

    def close(self) -> None:
        self._run.finish()


def _numbers(record: Record) -> dict[str, float]:
    """All numbers but the step and the rank."""
    names = [key for key, value in record.items() if isinstance(value, (int, float)) and key not in ("t", "rank")]
    return {key: record[key] for key in names}
