"""Runs ``lowcomm train`` as a user would, in processes of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.record import ROOT
from lowcomm.metrics import read


def train(config: Mapping[str, Any], out: Path, num_replicas: int) -> list[dict[str, Any]]:
    """Train to the end in the new directory ``out``, under torchrun for several replicas; rank 0's metrics.

    Raises:
        subprocess.CalledProcessError: when the run fails; its output says why.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f"{out.name}.yaml")
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_replicas}"]
    command = [sys.executable, *(torchrun if num_replicas > 1 else []), "-m", "lowcomm", "train"]
    subprocess.run([*command, "--config", str(path), "--out", str(out)], check=True, cwd=ROOT)
    return read(out / "metrics.jsonl")
