"""Starts a program of ours on several ranks, as a user would."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def torchrun(num_ranks: int, *arguments: str, timeout_s: float = 110) -> str:
    """Run ``arguments``, a script and what it is given, under torchrun on this machine; what all ranks printed.

    Raises:
        AssertionError: with the end of what they said, when a rank fails.
        subprocess.TimeoutExpired: when they take too long.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
