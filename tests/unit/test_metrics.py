"""metrics.jsonl is valid, survives a cut and reads after a resume as if there had been none; sinks show its numbers."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, call

import pytest
from rich.console import Console

from lowcomm.metrics import (
    Metrics,
    ProgressSink,
    Sink,
    TensorBoardSink,
    WandbSink,
    file_of,
    of_replicas,
    read,
    truncate_after,
)
from lowcomm.places import name_of


def step(t: int, **more: Any) -> dict[str, Any]:
    return {"kind": "step", "t": t, "rank": 0, "loss": 5.0 / t, "bytes_sent": 1000 * t, **more}


def run_lines(last_t: int) -> list[dict[str, Any]]:
    """Step lines, an evaluation every two steps, a summary."""
    lines = []
    for t in range(1, last_t + 1):
        lines.append(step(t))
        if t % 2 == 0:
            lines.append({"kind": "eval", "t": t, "rank": 0, "val_loss": 6.0 / t})
    return [*lines, {"kind": "summary", "t": last_t, "rank": 0}]


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    file = Metrics(path)
    for line in lines:
        file.write(line)
    file.close()


def test_lines_are_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    file = Metrics(path)
    for t in (1, 2):
        file.write(step(t))
        assert len(read(path)) == t
    file.close()
    assert read(path) == [step(1), step(2)]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "m").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"/m cannot be written .*No space left.*; is the disk full\?"):
        write(tmp_path / "m", [step(1)])


@pytest.mark.parametrize("num_shards", [1, 3])
def test_replicas_count_once_with_the_bytes_of_all_their_ranks(tmp_path: Path, num_shards: int) -> None:
    names = [name_of(replica, shard, num_shards) for replica in range(12) for shard in range(num_shards)]
    assert len({file_of(tmp_path, name) for name in names}) == 12 * num_shards
    for rank, name in enumerate(names):
        write(file_of(tmp_path, name), [step(1), step(2, rank=rank, tokens=64, bytes_sent=rank, bytes_received=1)])
    lines = of_replicas(tmp_path)
    assert [line["rank"] for line in lines] == [replica * num_shards for replica in range(12)]
    assert {line["tokens"] for line in lines} == {64} and {line["bytes_received"] for line in lines} == {num_shards}
    ranks = [range(replica * num_shards, (replica + 1) * num_shards) for replica in range(12)]
    assert [line["bytes_sent"] for line in lines] == [sum(x) for x in ranks]


def test_not_finite_is_null(tmp_path: Path) -> None:
    write(tmp_path / "m", [step(1, val_loss=math.nan, traffic={"a": [math.inf, 1.0]})])
    line = json.loads((tmp_path / "m").read_text(), parse_constant=pytest.fail)
    assert line == step(1, val_loss=None, traffic={"a": [None, 1.0]})


@pytest.mark.parametrize("cut", [0, 1, 10, None])
@pytest.mark.parametrize("t", [0, 3, 4])
def test_resumed_file_is_the_uninterrupted_one(tmp_path: Path, t: int, cut: int | None) -> None:
    """It died within a line (cut), or ended and is made longer (None)."""
    path, whole = tmp_path / "m", tmp_path / "whole"
    write(whole, run_lines(6))
    write(path, run_lines(5))
    if cut is not None:
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:-2]) + lines[-2][:cut])
    resumed = Metrics(path)  # opened before the file is replaced, as a run does
    truncate_after(path, t)
    for line in run_lines(6):
        if line["t"] > t or line["kind"] == "summary":
            resumed.write(line)
    resumed.close()
    assert path.read_text() == whole.read_text()


def test_the_summary_goes_when_a_run_that_ended_is_made_longer(tmp_path: Path) -> None:
    write(tmp_path / "m", run_lines(4))
    truncate_after(tmp_path / "m", 4)
    assert read(tmp_path / "m") == run_lines(4)[:-1]


def test_truncation_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    write(path, run_lines(3))
    before = path.read_text()

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        truncate_after(path, 1)
    assert path.read_text() == before


def test_unfinished_and_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write(path, [step(1), step(2)])
    text = path.read_text()
    for tail in ('{"kind": "st', "\0\0\0\n", '{"t": 3}\n'):
        path.write_text(text + tail)
        assert read(path) == [step(1), step(2)]
        path.write_text(tail.rstrip("\n") + "\n" + text)
        with pytest.raises(ValueError, match=r"m:1 is no line of metrics"):
            read(path)
    truncate_after(tmp_path / "none", 3)
    with pytest.raises(ValueError, match="there is no"):
        read(tmp_path / "none")


def test_sinks_see_what_the_file_sees(tmp_path: Path) -> None:
    sinks = [MagicMock(spec=Sink), MagicMock(spec=Sink)]
    file = Metrics(tmp_path / "m", sinks)
    file.write(step(1, lr=math.nan))
    file.close()
    assert read(tmp_path / "m") == [step(1, lr=None)]
    assert all(sink.mock_calls == [call.write(step(1, lr=None)), call.close()] for sink in sinks)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, to be set by the test."""
    seconds = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    return seconds


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(clock: list[float], terminal: bool) -> None:
    out = io.StringIO()
    sink = ProgressSink(1000, console=Console(file=out, force_terminal=terminal, width=120))
    for t in range(501, 601):  # resumed at 500: the time left counts from there
        clock[0] += 1.0
        sink.write(step(t, tokens_per_s=12345.0, loss=None if t == 600 else 1.5))
    sink.write({"kind": "eval", "t": 600, "val_loss": 2.25})
    sink.write({"kind": "fault", "t": 600, "message": "rank 3 was lost [/]"})
    sink.write({"kind": "summary", "t": 1000, "val_loss": 2.0})
    sink.close()
    text = out.getvalue()
    assert "step 600/1,000  loss 1.5000  val 2.2500  12.3 k tokens/s  600 kB sent  0:06:40 left" in text
    assert "fault at step 600: rank 3 was lost [/]" in text
    assert "step 1,000/1,000  loss 1.5000  val 2.0000" in text
    if not terminal:
        assert "\x1b" not in text
        assert len(text.splitlines()) == 10 + 3  # of 100 seconds a line every 10, and three that always show


def test_tensorboard_shows_a_step_that_was_done_again_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator as reader

    TensorBoardSink(tmp_path).close()  # a run that ends before its first line
    for first, last, loss in ((1, 5, 9.0), (4, 6, 1.0)):  # interrupted after step 5, goes on from step 3
        sink = TensorBoardSink(tmp_path)
        for t in range(first, last + 1):
            sink.write(step(t, loss=loss, lr=None, algorithm="DiLoCo", traffic={"a": 1}))
        sink.close()
    events = reader.EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "bytes_sent"}
    found = [(e.step, e.value) for e in events.Scalars("loss")]
    assert found == [(1, 9.0), (2, 9.0), (3, 9.0), (4, 1.0), (5, 1.0), (6, 1.0)]


def test_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, numbers = MagicMock(), {"loss": 2.5, "bytes_sent": 2000}
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    sink = WandbSink("project", "name", mode="offline")
    sink.write(step(2, lr=None))
    sink.close()
    begun = call.init(project="project", name="name", mode="offline")
    assert wandb.mock_calls == [begun, call.init().log(numbers, step=2), call.init().finish()]
