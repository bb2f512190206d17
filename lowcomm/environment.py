"""The environment that results may depend on: versions, hardware, commit."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy
import torch

import lowcomm


def environment() -> dict[str, Any]:
    """Plain data for environment.json; None for what is unknown. Contains no host, user or path."""
    num_gpus = torch.cuda.device_count()
    commit = _git("rev-parse", "HEAD")
    changes = None if commit is None else _git("status", "--porcelain")
    return {
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "lowcomm": lowcomm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "git_commit": commit,
        "git_dirty": None if changes is None else bool(changes),
        "cpu": _cpu(),
        "num_cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "num_threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "num_gpus": num_gpus,
        "gpus": [torch.cuda.get_device_name(i) for i in range(num_gpus)],
        "cuda": torch.version.cuda,
    }


def _git(*arguments: str) -> str | None:
    """The output of git in the working directory; None without git, repository or commit."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu() -> str | None:
    """The processor's name, available on Linux only."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or None)
