"""lowcomm around a loop of one's own."""

import pytest
import torch

import lowcomm
from lowcomm.algorithms.base import Algorithm
from lowcomm.algorithms.data_parallel import DataParallel
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.comm.base import Comm
from tests.replicas import adamw, make_batch, make_model, mse
from tests.world import run_world

STEPS = 5


def own_loop(comm: Comm, algorithm: Algorithm, step) -> list[torch.Tensor]:
    """The parameters after a loop whose optimizer takes its steps by ``step(optimizer, closure)``."""
    model = make_model(seed=comm.rank)
    optimizer = adamw(list(model.parameters()))
    sync = lowcomm.attach(model, optimizer, algorithm, comm)
    for t in range(1, STEPS + 1):

        def closure(t=t):
            optimizer.zero_grad()
            loss = mse(model, make_batch(comm.rank, t))
            loss.backward()
            return loss

        assert step(optimizer, closure).isfinite()
        sync.step()
    sync.finish()
    return [p.detach() for p in model.parameters()]


def plainly(optimizer, closure):
    loss = closure()
    optimizer.step()
    return loss


@pytest.mark.parametrize("algorithm", [DataParallel(), DiLoCo(every=2), DiLoCo(every=2, start=3)], ids=repr)
@pytest.mark.parametrize(
    "step", [lambda optimizer, closure: optimizer.step(closure), lambda o, closure: o.step(closure=closure)]
)
def test_a_closure_computes_what_a_plain_step_does(algorithm, step):
    plain = run_world(2, lambda comm: own_loop(comm, algorithm, plainly))
    closed = run_world(2, lambda comm: own_loop(comm, algorithm, step))
    for mine in closed:
        assert all(torch.equal(a, b) for a, b in zip(mine, plain[0], strict=True))
