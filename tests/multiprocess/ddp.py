"""Trains a small model in DistributedDataParallel with lowcomm's hook; for test_ddp_hook.

Usage: torchrun ... tests/multiprocess/ddp.py OUT
"""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import lowcomm
from lowcomm.tensors import rng
from tests.compressors import EF14, Hierarchical, PowerSGD, Quantized

STEPS = 8
NUM_EXACT = 2  # steps before torch's hook may compress
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


def with_ignored(reducer):
    """Gradients of a model of which DDP is told to ignore a parameter, by one of two names, and means another."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
    model[2].weight, model.scale = model[0].weight, nn.Parameter(torch.ones(12))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["0.weight", "0.bias", "scale"])
    wrapped = DistributedDataParallel(model)
    if reducer is not None:
        lowcomm.ddp_hook(reducer).register(wrapped)
    x = torch.randn(8, 12, generator=rng(0, "x", dist.get_rank()))
    (wrapped(x) * model.scale).square().mean().backward()
    return [[p.grad for name, p in model.named_parameters() if name != "0.bias"]]


def deep(dtype):
    """Matrices of several shapes, some of them alike."""
    torch.manual_seed(0)
    sides = (12, 24, 30, 30, 30, 5)
    layers = [layer for n, m in pairwise(sides) for layer in (nn.Linear(n, m), nn.Tanh())]
    return nn.Sequential(*layers).to(dtype)


def gradients(model, optimizer, steps):
    """The averaged gradients of each step, in the order of the parameters, as one vector."""
    dtype = next(model.parameters()).dtype
    for t in steps:
        x = torch.randn(8, 12, generator=rng(0, "x", dist.get_rank(), t)).to(dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        yield torch.cat([p.grad.reshape(-1) for p in model.parameters()]).clone()
        optimizer.step()


def is_compressed(p, rank):
    return p.dim() > 1 and sum(p.shape) * rank * 2 < p.numel()


def with_torchs_hook(rank, dtype):
    """Gradients, norms of the matrices' memories after each step, and the order of the parameters in DDP's bucket.

    Torch also remembers how a rank's vectors differ from their mean, though they are sent whole. There is one bucket:
    with several, torch's hook hangs on gloo; it starts sums in callbacks.
    """
    module, order = deep(dtype), []
    model = DistributedDataParallel(module, bucket_cap_mb=1.0)
    place = {id(p): i for i, p in enumerate(module.parameters())}
    state = PowerSGDState(None, rank, start_powerSGD_iter=NUM_EXACT, batch_tensors_with_same_shape=True)

    def hook(state, bucket):
        assert bucket.is_last()
        order[:] = [place[id(p)] for p in bucket.parameters()]
        return powerSGD_hook(state, bucket)

    model.register_comm_hook(state, hook)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    parameters, norms, means = list(module.parameters()), [], []
    for mean in gradients(model, optimizer, range(1, STEPS + 1)):
        means.append(mean)
        squares = 0.0
        for error in state.error_dict.values():
            pieces = error.split([parameters[at].numel() for at in order])
            kept = [e for e, at in zip(pieces, order, strict=True) if is_compressed(parameters[at], rank)]
            squares += sum(float(e.square().sum()) for e in kept)
        norms.append(squares**0.5)
    return means, norms, order


def with_our_hook(rank, dtype, order):
    """The same gradients and norms; from torch's first factors, which it draws shape by shape."""
    module = deep(dtype)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    means = list(gradients(DistributedDataParallel(module), optimizer, range(1, NUM_EXACT + 1)))
    hook, model = (
        lowcomm.ddp_hook(lowcomm.Reducer(PowerSGD(rank, error="global"), EF14())),
        DistributedDataParallel(module),
    )
    hook.register(model)

    parameters, by_shape = list(module.parameters()), {}
    for at, p in enumerate(parameters):
        by_shape.setdefault(p.shape, []).append(at)
    ours = dict(zip(by_shape, hook._state.buckets, strict=True))
    torch.manual_seed(np.random.RandomState(0).randint(1_000_000_000))
    for shape in dict.fromkeys(parameters[at].shape for at in order if is_compressed(parameters[at], rank)):
        q, alike = ours[shape].compressor.q, by_shape[shape]
        q[[alike.index(at) for at in order if at in alike]] = torch.randn(q.shape, dtype=dtype)

    norms = [0.0] * NUM_EXACT
    for mean in gradients(model, optimizer, range(NUM_EXACT + 1, STEPS + 1)):
        means.append(mean)
        norms.append(sum(float(b.feedback.error.square().sum()) for b in hook._state.buckets) ** 0.5)
    return means, norms


def beside_torch(rank, dtype):
    """Gradients and memories of torch's PowerSGD hook and of ours, in two runs from one start."""
    *theirs, order = with_torchs_hook(rank, dtype)
    return theirs, with_our_hook(rank, dtype, order)


if __name__ == "__main__":
    torch.set_num_threads(1)
    lowcomm.connect("gloo", timeout_s=60)
    traces = {name: with_reducer(reducer) for name, reducer in REDUCERS.items()}
    traces["ddp"] = train(wrapped(), range(1, STEPS + 1))
    traces["spoilt"] = with_reducer(REDUCERS["quantized"], spoil_at=3)
    traces["half precision"] = half_precision()
    traces["ignored"], traces["ignored, ddp"] = with_ignored(REDUCERS["exact"]), with_ignored(None)
    for name in ("quantized", "power_sgd"):
        traces[f"{name} straight"] = straight(REDUCERS[name])
        traces[f"{name} resumed"] = resumed(REDUCERS[name])

    traces["torch"] = {(r, d): beside_torch(r, d) for r in (1, 2, 4) for d in (torch.float32, torch.float64)}
    torch.save(traces, Path(sys.argv[1]) / f"rank{dist.get_rank()}.pt")
    lowcomm.disconnect()
