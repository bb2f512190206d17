"""Uses a process group as a training program does, leaves it, and prints how many of gloo's threads are still there.

Usage: torchrun ... tests/multiprocess/disconnecting.py
"""

from pathlib import Path

import torch

import lowcomm

if __name__ == "__main__":
    comm = lowcomm.connect("gloo", timeout_s=60)
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # imports much of torch
    comm.all_sum(torch.ones(3)).wait()
    lowcomm.disconnect()
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    print(f"left: {sum('gloo' in name for name in names)} of {len(names) > 0}")
