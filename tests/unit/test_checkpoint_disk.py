"""Checkpoints on a disk that has no room for them, or stops having it."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowcomm.checkpoint import Checkpoints, state_bytes


def checkpoints(run: Path, rank: int = 0, world_size: int = 2) -> Checkpoints:
    return Checkpoints(run / "checkpoints", rank, world_size, "run")


def small_state(t: int) -> dict[str, Any]:
    return {"x": torch.full((3,), float(t)), "t": t}


def test_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = checkpoints(tmp_path / "new")
    saved.require_space(1)  # of a disk on which no folder of the run is yet
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 10**9))
    saved.require_space(10**9)
    with pytest.raises(ValueError, match=r"3\.00 GB free, but 3 checkpoints of 1\.10 GB .* need 3\.30 GB more"):
        saved.require_space(11 * 10**8)


def test_a_disk_that_fills_up_while_writing_is_named(tmp_path: Path) -> None:
    """The limit on a file's size stands for the end of the disk."""
    saved = checkpoints(tmp_path)
    saved.save(1, small_state(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"rank00000.partial cannot be written .*; is the disk full\?"):
            saved.save(2, {"x": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved.steps() == [1] and saved.load(1)["t"] == 1
    saved.save(2, small_state(2))
    assert saved.load(2)["t"] == 2


def test_an_interrupt_while_writing_is_no_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints(tmp_path).save(1, small_state(1))


def test_checkpoints_that_are_there_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = checkpoints(tmp_path)
    state = {"x": torch.zeros(1000)}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=state_bytes(state) * 2))
    with pytest.raises(ValueError, match="free space"):
        saved.require_space(state_bytes(state))
    for t in (1, 2):
        saved.save(t, state)
    saved.require_space(state_bytes(state))


def test_checkpoints_of_all_ranks_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(4):
        for t in (1, 2):
            checkpoints(tmp_path, rank, world_size=4).save(t, {"x": torch.zeros(250_000)})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4_000_000))
    checkpoints(tmp_path, 3, world_size=4).require_space(4_000_000)
    partial = tmp_path / "checkpoints" / "t00000003" / "rank00003.partial"  # which the next one replaces
    partial.mkdir(parents=True)
    (partial / "x").write_bytes(bytes(1_000_000))
    with pytest.raises(ValueError, match="free space"):
        checkpoints(tmp_path, 3, world_size=4).require_space(4_100_000)
