"""Starts one process for each rank of a run, with the variables that torchrun would set."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TINY = """
model:
  class_path: Llama
  init_args: {size: 500k, num_layers: 1, dim: 32, num_heads: 2, num_kv_heads: 1, ffn_dim: 64}
data: {source: {class_path: Files, init_args: {paths: [TEXT]}}, seq_len: 32, validation_fraction: 0.2}
algorithm: {class_path: DiLoCo, init_args: {every: 7}}
optimizer: {path: torch.optim.AdamW, args: {lr: 3.0e-3}}
schedule: {class_path: Cosine, init_args: {num_warmup_steps: 4}}
batch: {size: 2}
num_steps: 40
evaluation: {every: 20, num_tokens: 512, batch_size: 4}
checkpoint: {every: 10}
log: {every: 1}
timeout_s: 60
"""


def write_tiny(folder: Path) -> Path:
    """A run of a tiny model on a tiny text, in ``folder``; the path of its config."""
    text = folder / "text"
    text.mkdir()
    for i in range(10):
        (text / f"{i}.txt").write_text("".join(f"{i} times {j} is {i * j}.\n" for j in range(100)))
    config = folder / "run.yaml"
    config.write_text(TINY.replace("TEXT", str(text / "*.txt")))
    return config


@dataclass
class Ended:
    """How the ranks of one launch ended."""

    codes: list[int]
    errors: list[str]


def free_port() -> int:
    """One on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def launch(
    arguments: Sequence[str], num_ranks: int = 2, stop_at: str = "", by_rank: Sequence[Sequence[str]] = ()
) -> Ended:
    """Run ``lowcomm *arguments`` (and ``by_rank[rank]``) on every rank and wait for all to end, 100 s at most."""
    port, processes = free_port(), []
    for rank in range(num_ranks):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "STOP_AT": stop_at,
        }
        extra = by_rank[rank] if by_rank else []
        command = [sys.executable, "-m", "tests.multiprocess.interrupted", *arguments, *extra]
        quiet, read = subprocess.DEVNULL, subprocess.PIPE
        processes.append(subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=quiet, stderr=read))
    try:
        errors = [process.communicate(timeout=100)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return Ended([process.returncode for process in processes], errors)
