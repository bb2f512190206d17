"""Writes metrics.jsonl, one JSON object per line, and passes lines to other sinks.

That is the file of replica 0; others write metrics.replica00001.jsonl and so on. Where a replica is many ranks, each
has its own: metrics.jsonl is shard 0's of replica 0, metrics.replica00000.shard00001.jsonl the next (`file_of`).

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
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowcomm.console import show, spelt
from lowcomm.optional import require
from lowcomm.places import name_of
from lowcomm.report.si import si

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

KINDS = ("step", "round", "eval", "fault", "summary")
Record = Mapping[str, Any]
_DRAW_EVERY_S = 0.1


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

    A sink that fails is left out from then on, and the standard error says so: lines are shown for whoever watches, and
    training needs nobody. That the file itself cannot be written is an OSError.

    The file is open only during writes, as a simulation has one for each of very many ranks.
    """

    def __init__(self, path: Path, sinks: Sequence[Sink] = ()) -> None:
        self._path, self._sinks = path, list(sinks)
        self._has_begun = False

    def write(self, record: Record) -> None:
        """Write one line; it has at least ``kind`` and ``t``."""
        assert record["kind"] in KINDS, record
        assert isinstance(record["t"], int), record
        clean = _finite(record)
        line = json.dumps(clean, allow_nan=False) + "\n"
        try:
            if not self._has_begun:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._has_begun = True
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise OSError(f"{self._path} cannot be written ({error}); is the disk full?") from error
        self._tell(lambda sink: sink.write(clean))

    def close(self) -> None:
        """Close all sinks."""
        self._tell(lambda sink: sink.close())

    def _tell(self, call: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                call(sink)
            except (Exception, SystemExit) as error:  # rich makes an exit of a pipe whose reader left
                self._sinks.remove(sink)
                cause = error.__context__ if isinstance(error, SystemExit) else error
                what = f"{type(sink).__name__} failed ({cause!r}) and is left out from here on"
                show(f"lowcomm: {what}; training goes on, and {self._path} holds every line", sys.stderr)


def file_of(out: Path, name: str) -> Path:
    """The lines of the rank whose files are called ``name``, see `Place.name`."""
    is_first = name in (name_of(0), name_of(0, 0, num_shards=2))
    return out / ("metrics.jsonl" if is_first else f"metrics.{name}.jsonl")


def check_names(out: Path) -> None:
    """Refuse a directory of an earlier lowcomm.

    Raises:
        ValueError: naming a file that was called by rank.
    """
    for former in sorted(out.glob("metrics.rank*.jsonl")):
        raise ValueError(
            f"{former} is of an earlier lowcomm, which called files by rank; this one calls them by replica and does "
            "not go on with those: use the version that wrote it, or another directory"
        )


def of_replicas(out: Path) -> list[dict[str, Any]]:
    """The last line of each replica of a run, in their order.

    Where a replica is many ranks it is its first one's, whose tokens are the whole replica's, with the bytes of all.
    """
    ranks: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(out.glob("metrics*.jsonl"), key=lambda path: ("shard" in path.name, path.name)):
        replica = re.search(r"replica(\d+)", path.name)
        ranks.setdefault(int(replica[1]) if replica else 0, []).append(read(path)[-1])
    return [
        lines[0] | {key: sum(line[key] for line in lines) for key in ("bytes_sent", "bytes_received")}
        for _, lines in sorted(ranks.items())
    ]


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
        self._printed_s = self._drawn_s = -math.inf
        self._bar: Progress | None = None

    def write(self, record: Record) -> None:
        now = time.monotonic()
        self._latest |= {key: value for key, value in record.items() if value is not None}
        self._first = self._first or (record["t"], now)
        if record["kind"] == "fault":
            self._print(f"fault at step {record['t']}: {record.get('message', 'a replica was lost')}")
        elif self._console.is_terminal and record["kind"] != "summary":
            self._show(self._line(now), now)
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
        line = spelt(line, self._console.encoding)
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _show(self, line: str, now: float) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        if self._bar is None:
            columns = (BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
            # no thread draws it: that could not say that the console is gone
            self._bar = Progress(*columns, console=self._console, auto_refresh=False)
            self._bar.add_task("", total=self._num_steps)
            self._bar.start()
        is_due = now - self._drawn_s >= _DRAW_EVERY_S
        self._drawn_s = now if is_due else self._drawn_s
        self._bar.update(self._bar.task_ids[0], completed=self._latest["t"], description=line, refresh=is_due)

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
