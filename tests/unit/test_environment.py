"""environment.json says what a run ran on, and nothing about who or where."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from lowcomm.environment import environment


def test_plain_and_private() -> None:
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__
    assert found["num_cpus"] >= 1
    assert found["memory_bytes"] > 2**28
    assert len(found["gpus"]) == found["num_gpus"]
    assert platform.node() not in found.values()
    assert str(Path.cwd()) not in json.dumps(found)


def test_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert (environment()["git_commit"], environment()["git_dirty"]) == (None, None)
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    assert (environment()["git_commit"], environment()["git_dirty"]) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "new").touch()
    assert environment()["git_dirty"] is True
    (tmp_path / ".git" / "index").write_bytes(b"damaged")
    assert (environment()["git_commit"], environment()["git_dirty"]) == (git("rev-parse", "HEAD"), None)
    monkeypatch.setenv("PATH", "")
    assert environment()["git_commit"] is None
