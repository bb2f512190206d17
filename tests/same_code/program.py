"""Runs every algorithm on gloo under torchrun and saves each rank's parameters, for test_gloo to compare.

Usage: torchrun ... tests/same_code/program.py OUT [gloo|nccl]     (nccl: one GPU for each rank)
"""

import sys
from pathlib import Path

import torch

import lowcomm
from tests.algorithms import inner_of
from tests.replicas import train
from tests.same_code.cases import CASES, STEPS, wire_laws

if __name__ == "__main__":
    torch.set_num_threads(1)
    backend = sys.argv[2] if len(sys.argv) > 2 else "gloo"
    comm = lowcomm.connect(backend, timeout_s=60)
    wire_laws(comm)  # tensors of the CPU travel over NCCL too
    if backend == "nccl":
        wire_laws(comm, "cuda")
    traces = [train(algorithm, comm, STEPS, inner_of(algorithm)) for algorithm in CASES]
    torch.save(traces, Path(sys.argv[1]) / f"rank{comm.rank}.pt")
    lowcomm.disconnect()
