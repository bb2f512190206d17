"""Trains a small model in DistributedDataParallel with lowcomm's hook; for test_ddp_hook.

Usage: torchrun ... tests/multiprocess/ddp.py OUT
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import lowcomm
from lowcomm.compress.hierarchical import Hierarchical
from lowcomm.compress.power_sgd import PowerSGD
from lowcomm.compress.quantized import Quantized
from lowcomm.feedback.ef14 import EF14
from lowcomm.tensors import rng

STEPS = 8
REDUCERS = {
    "exact": lowcomm.Reducer(),
    "quantized": lowcomm.Reducer(Quantized(), EF14()),
    "power_sgd": lowcomm.Reducer(PowerSGD(rank=2, min_compression=1), EF14()),
    "hierarchical": lowcomm.Reducer(Hierarchical(island=1)),
    "islands": lowcomm.Reducer(Hierarchical(island=2, inner=Quantized())),
}


def wrapped(cap_mb=0.002):
    """A model with several of DDP's buckets, so that it lays them out anew."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 5))
    return DistributedDataParallel(model.double(), bucket_cap_mb=cap_mb)


def train(model, steps, spoil_at=0):
    """A list of the parameters after each step, all steps of which see other data on each rank."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trace = []
    for t in steps:
        x = torch.randn(8, 12, generator=rng(0, "x", dist.get_rank(), t), dtype=torch.float64)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        (loss * float("inf") if t == spoil_at and dist.get_rank() == 1 else loss).backward()
        if all(p.grad.isfinite().all() for p in model.parameters()):
            optimizer.step()
        trace.append([p.detach().clone() for p in model.parameters()])
    return trace


def resumed(reducer):
    """Half of the steps, then the rest with other objects and another cut in buckets."""
    model, hook = wrapped(), lowcomm.ddp_hook(reducer)
    hook.register(model)
    first = train(model, range(1, 5))
    saved = (model.module.state_dict(), hook.state_dict())
    torch.save(saved, Path(sys.argv[1]) / f"half{dist.get_rank()}.pt")
    parameters, state = torch.load(Path(sys.argv[1]) / f"half{dist.get_rank()}.pt")
    model, hook = wrapped(cap_mb=1.0), lowcomm.ddp_hook(reducer)
    model.module.load_state_dict(parameters)
    hook.register(model)
    hook.load_state_dict(state)
    return first + train(model, range(5, 9))


def straight(reducer):
    """As `resumed` without a stop; the momentum starts anew at the same step."""
    model, hook = wrapped(), lowcomm.ddp_hook(reducer)
    hook.register(model)
    return train(model, range(1, 5)) + train(model, range(5, 9))


def with_reducer(reducer, spoil_at=0):
    model = wrapped()
    lowcomm.ddp_hook(reducer).register(model)
    return train(model, range(1, STEPS + 1), spoil_at)


def half_precision():
    """16-bit gradients come back in 16 bits."""
    model = wrapped().module.bfloat16()
    model = DistributedDataParallel(model)
    lowcomm.ddp_hook(REDUCERS["power_sgd"]).register(model)
    x = torch.randn(8, 12, generator=rng(0, "x", dist.get_rank())).bfloat16()
    model(x).square().mean().backward()
    return [[p.grad for p in model.parameters()]]


class FakeBucket:
    """As much of a GradBucket as torch's hook asks for."""

    def __init__(self, tensors):
        self.flat = torch.cat([x.reshape(-1) for x in tensors])
        pieces = self.flat.split([x.numel() for x in tensors])
        self.pieces = [piece.view(x.shape) for piece, x in zip(pieces, tensors, strict=True)]

    def buffer(self):
        return self.flat

    def gradients(self):
        return self.pieces

    def index(self):
        return 0

    def is_last(self):
        return True


def beside_torch(rank, dtype, comm):
    """Means of torch's PowerSGD hook and of ours after each round from the same start, and norms of the memories.

    Those are of matrices: torch also keeps how a rank's vectors differ from their mean, though they are sent whole.
    """
    shapes = [(24, 12), (24,), (30, 30), (30, 30), (16, 3, 5), (5, 24), (5,)]
    like = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    reducer = lowcomm.Reducer(PowerSGD(rank, error="global"), EF14())
    state = reducer.init(like)
    theirs = PowerSGDState(None, rank, start_powerSGD_iter=2, batch_tensors_with_same_shape=True)
    theirs.iter = 2
    # their start: drawn stack by stack, in order of the first of each shape, as ours are kept
    torch.manual_seed(np.random.RandomState(0).randint(1_000_000_000))
    for bucket in state.buckets:
        if (q := bucket.compressor.q) is not None:
            q.copy_(torch.randn(q.shape, dtype=dtype))
    trace = []
    for t in range(6):
        random = rng(0, "gradients", comm.rank, t)
        gradients = [torch.randn(shape, generator=random, dtype=dtype) for shape in shapes]
        bucket = FakeBucket(gradients)
        powerSGD_hook(theirs, bucket).wait()
        means, state = reducer.mean(gradients, state, comm).result()
        ours = torch.cat([x.reshape(-1) for x in means])
        memory = sum(float(b.feedback.error.square().sum()) for b in state.buckets) ** 0.5
        errors = theirs.error_dict[0].split([x.numel() for x in like])
        whole = [x.dim() < 2 or sum(x.view(len(x), -1).shape) * rank * 2 >= x.numel() for x in like]
        their_memory = torch.cat([e for e, is_whole in zip(errors, whole, strict=True) if not is_whole]).norm()
        trace.append((bucket.buffer(), ours, float(their_memory), memory))
    return trace


if __name__ == "__main__":
    torch.set_num_threads(1)
    comm = lowcomm.connect("gloo", timeout_s=60)
    traces = {name: with_reducer(reducer) for name, reducer in REDUCERS.items()}
    traces["ddp"] = train(wrapped(), range(1, STEPS + 1))
    traces["spoilt"] = with_reducer(REDUCERS["quantized"], spoil_at=3)
    traces["half precision"] = half_precision()
    for name in ("quantized", "power_sgd"):
        traces[f"{name} straight"] = straight(REDUCERS[name])
        traces[f"{name} resumed"] = resumed(REDUCERS[name])

    traces["torch"] = {(r, d): beside_torch(r, d, comm) for r in (1, 2, 4) for d in (torch.float32, torch.float64)}
    torch.save(traces, Path(sys.argv[1]) / f"rank{dist.get_rank()}.pt")
    lowcomm.disconnect()
