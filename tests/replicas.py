"""Small replicas for tests: a model in float64, a stream of batches of its own, an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lowcomm.algorithms.base import Algorithm, step
from lowcomm.comm.base import Comm
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.optim.scaled_sgd import ScaledSGD
from lowcomm.state import state_tree
from lowcomm.tensors import rng

Inner = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


def scaled_sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return ScaledSGD(params, lr=0.05, weight_decay=0.1)


def make_model(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)
    generator = rng(seed, "weights")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
    return model


def make_batch(rank: int, t: int, dtype: torch.dtype = torch.float64, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = rng(1, "batch", rank, t)
    x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    noise = torch.randn(size, generator=generator, dtype=torch.float64)
    return x.to(dtype), (x.sum(1).sin() + 0.1 * noise).to(dtype)


def mse(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]).squeeze(1), batch[1])


Loss = Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]


def make_engine(inner: Inner = sgd, dtype: torch.dtype = torch.float64, loss: Loss = mse) -> TorchEngine:
    model = make_model(dtype)
    return TorchEngine(model, inner(list(model.parameters())), loss=loss, clip_norm=None)


def step_all(models: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer], t: int) -> None:
    """Inner step ``t`` of explicit replicas, each on its own batch."""
    for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
        optimizer.zero_grad()
        mse(model, make_batch(rank, t)).backward()
        optimizer.step()


def scripted_engine(size: int = 1) -> TorchEngine:
    """A vector from 0 whose batches are its gradients, at a rate of 1."""
    model = nn.Linear(size, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return TorchEngine(model, optimizer, loss=lambda m, b: (m.weight * b).sum(), clip_norm=None)


def tensors_in(state: Any) -> list[Tensor]:
    return [x for x in tree_leaves(state_tree(state)) if isinstance(x, Tensor)]


def flat(params: list[Tensor]) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in params]).clone()


def train(
    algorithm: Algorithm, comm: Comm, num_steps: int, inner: Inner = sgd, data_rank: int | None = None
) -> list[Tensor]:
    """The training loop in small; this replica's flat parameters after each step, and at last after `finish`."""
    engine = make_engine(inner)
    state, found = algorithm.init(engine, comm), []
    for t in range(1, num_steps + 1):
        step(algorithm, t, engine, state, comm, make_batch(comm.rank if data_rank is None else data_rank, t))
        found.append(flat(engine.slots()["param"]))
    algorithm.finish(num_steps, engine, state, comm)
    return [*found, flat(engine.slots()["param"])]


def train_on(
    algorithm: Algorithm, comm: Comm, ends_t: int, num_steps: int, inner: Inner = sgd
) -> tuple[list[Tensor], Any]:
    """Go on up to ``num_steps`` with a run that ended at ``ends_t``; the parameters after each step, and the state."""
    engine = make_engine(inner)
    state, found = algorithm.init(engine, comm), []
    for t in range(1, num_steps + 1):
        step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
        if t == ends_t:
            algorithm.finish(t, engine, state, comm)
        found.append(flat(engine.slots()["param"]))
    return found, state
