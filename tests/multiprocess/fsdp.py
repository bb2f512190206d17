"""Trains a small model with FSDP2 in two islands of two ranks, lowcomm's hook between them; for test_fsdp_hook.

Usage: torchrun --nproc_per_node=4 ... tests/multiprocess/fsdp.py OUT
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lowcomm
from lowcomm.tensors import rng
from tests.compressors import EF14, Quantized

STEPS = 6
REDUCERS = {"exact": lowcomm.Reducer(), "quantized": lowcomm.Reducer(Quantized(), EF14())}


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 5)).double()


def sharded(mesh, hook, start=None):
    model = plain()
    if start is not None:
        model.load_state_dict(start)
    for module in (model[0], model):
        fully_shard(module, mesh=mesh["shard"])
    hook.register(model)
    return model


def loss(model, rank, t):
    return model(torch.randn(8, 12, generator=rng(0, "x", rank, t), dtype=torch.float64)).square().mean()


def train(model, rank, steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for t in steps:
        optimizer.zero_grad()
        loss(model, rank, t).backward()
        optimizer.step()
    return {name: p.detach().full_tensor() for name, p in model.named_parameters()}


class Turns(nn.Module):
    """Layers of several sizes, one of which is left out at each step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12, bias=False)]).double()

    def forward(self, x, t):
        for i, layer in enumerate(self.layers):
            x = x if i == t % 3 else x + layer(x).tanh()
        return x


def taking_turns(hook, mesh, rank):
    """The sum of each gradient over the steps."""
    model, total = Turns(), {}
    fully_shard(model, mesh=mesh["shard"])
    hook.register(model)
    for t in range(3 * STEPS):
        for p in model.parameters():
            p.grad = None
        x = torch.randn(8, 12, generator=rng(0, "x", rank, t % 3), dtype=torch.float64)
        model(x, t).square().mean().backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] = total.get(name, 0) + p.grad.full_tensor()
    return total


def one_process(num_ranks):
    """The parameters of large batches."""
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for t in range(1, STEPS + 1):
        optimizer.zero_grad()
        (sum(loss(model, rank, t) for rank in range(num_ranks)) / num_ranks).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    comm = lowcomm.connect("gloo", timeout_s=60)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("island", "shard"))
    replicas = comm.sub(range(comm.rank % 2, 4, 2))
    results = {}
    for name, reducer in REDUCERS.items():
        results[name] = train(sharded(mesh, lowcomm.fsdp_hook(reducer, replicas)), comm.rank, range(1, STEPS + 1))
        hook = lowcomm.fsdp_hook(reducer, replicas)
        half = train(sharded(mesh, hook), comm.rank, range(1, 4))
        path = Path(sys.argv[1]) / f"half{comm.rank}.pt"
        torch.save(hook.state_dict(), path)
        hook = lowcomm.fsdp_hook(reducer, replicas)
        hook.load_state_dict(torch.load(path))
        results[f"{name} resumed"] = train(sharded(mesh, hook, half), comm.rank, range(4, STEPS + 1))
        results[f"{name} turns"] = taking_turns(lowcomm.fsdp_hook(reducer, replicas), mesh, comm.rank)
    torch.save(results, Path(sys.argv[1]) / f"rank{comm.rank}.pt")
    lowcomm.disconnect()
