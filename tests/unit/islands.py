"""Runs Hierarchical on gloo under torchrun and saves each rank's results; for test_hierarchical.

Usage: torchrun --nproc_per_node=4 ... tests/unit/islands.py OUT
"""

import sys
from pathlib import Path

import torch

import lowcomm
from lowcomm.comm.base import Task
from lowcomm.tensors import rng
from tests.compressors import Hierarchical, Quantized

COMPRESSORS = {"exact inside": Hierarchical(2), "coded twice": Hierarchical(2, inner=Quantized())}


def program(comm, compressor, shape):
    """A rank's vector, what it sent of it and the mean, in the third round."""
    x = torch.randn(shape, generator=rng(0, "x", comm.rank), dtype=torch.float64)
    state = compressor.init(x)
    for _ in range(3):
        sent, mean, state = Task(compressor.mean(x, state, comm)).result()
    return x, sent, mean


if __name__ == "__main__":
    torch.set_num_threads(1)
    comm = lowcomm.connect("gloo", timeout_s=60)
    for name, compressor in COMPRESSORS.items():
        torch.save(program(comm, compressor, (33,)), Path(sys.argv[1]) / f"{name}{comm.rank}.pt")
    lowcomm.disconnect()
