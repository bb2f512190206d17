"""Rosenbrock's valley with 256 replicas: where the states of an optimizer must be averaged, and where they need not."""

import torch
from torch import nn

from lowcomm.algorithms.base import step
from lowcomm.algorithms.des_loc import DESLOC
from lowcomm.comm.base import Done
from lowcomm.comm.echo import EchoComm
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.tensors import rng


class Stacked(EchoComm):
    """Many replicas as the rows of one rank's tensors: a sum runs over rows, and all rows share what is left over."""

    def issue(self, call):
        num = len(self.members)
        x, rest = call.x.reshape(-1).tensor_split([call.x.numel() // num * num])
        rows = x.view(num, -1)
        return Done(torch.cat([rows.sum(0).expand_as(rows).reshape(-1), rest * num]).view(call.x.shape))


class Rosenbrock(nn.Module):
    """A point for each replica, from (-1, 1); the minimum of (1 - x)^2 + 100 (y - x^2)^2 is at (1, 1)."""

    def __init__(self, num_replicas: int) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(num_replicas, 1))


def noisy(model, noise):
    """Its gradient is each replica's own, with noise added."""
    x, y = model.points.unbind(1)
    return ((1 - x) ** 2 + 100 * (y - x**2) ** 2).sum() + (noise * model.points).sum()


def distance(periods, resets=False, *, lr=1.0, num_replicas=256, num_rounds=25, last=5):
    """Mean distance of the replicas' average to the minimum over the last rounds."""
    model = Rosenbrock(num_replicas)
    # momentum and second moment forget half in 192 and in 692 steps: the periods of the paper's example
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.5 ** (1 / 192), 0.5 ** (1 / 692)))
    engine = TorchEngine(model, optimizer, loss=noisy, clip_norm=None)
    comm, algorithm = Stacked(num_replicas), DESLOC(periods)
    state, generator = algorithm.init(engine, comm), rng(0, "noise")
    distances = []
    for t in range(1, num_rounds * 192 + 1):
        noise = 1.5 * torch.randn(num_replicas, 2, generator=generator, dtype=torch.float64)
        step(algorithm, t, engine, state, comm, noise)
        if t % 192 == 0:
            distances.append(float((model.points.detach() - 1).mean(0).norm()))
            if resets:
                optimizer.state.clear()
    return sum(distances[-last:]) / last


DES_LOC = {"param": 192, "exp_avg": 192, "exp_avg_sq": 692}
LOCAL_ADAM = {"param": 192, "exp_avg": 192, "exp_avg_sq": 192}
LOCAL_STATES = {"param": 192}


def test_where_steps_are_long_states_must_be_averaged():
    """The paper's example at lr 1: local states end up beyond the valley, states that are reset wander about."""
    assert distance(DES_LOC) < 0.2
    assert distance(LOCAL_ADAM) < 0.2
    assert distance(LOCAL_STATES) > 1
    assert distance(LOCAL_STATES, resets=True) > 1


def test_where_steps_are_short_local_states_do_as_well():
    """So what the example shows is a matter of the learning rate: this is lr 0.1."""
    assert distance(DES_LOC, lr=0.1, num_rounds=12) < 0.1
    assert distance(LOCAL_STATES, lr=0.1, num_rounds=12) < 0.1
    assert distance(LOCAL_STATES, resets=True, lr=0.1, num_rounds=12) > 0.5
