"""lowcomm around a loop of one's own."""

import copy

import pytest
import torch

import lowcomm
from lowcomm.algorithms.base import Algorithm
from lowcomm.algorithms.composed import After
from lowcomm.algorithms.data_parallel import DataParallel
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.streaming_diloco import StreamingDiLoCo
from lowcomm.comm.base import Comm
from lowcomm.comm.echo import EchoComm
from lowcomm.comm.metered import Meter, MeteredComm
from tests.replicas import adamw, flat, make_batch, make_model, mse
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


@pytest.mark.parametrize(
    "algorithm", [DataParallel(), DiLoCo(every=2), After(3, DataParallel(), DiLoCo(every=2))], ids=repr
)
@pytest.mark.parametrize(
    "step", [lambda optimizer, closure: optimizer.step(closure), lambda o, closure: o.step(closure=closure)]
)
def test_a_closure_computes_what_a_plain_step_does(algorithm, step):
    plain = run_world(2, lambda comm: own_loop(comm, algorithm, plainly))
    closed = run_world(2, lambda comm: own_loop(comm, algorithm, step))
    for mine in closed:
        assert all(torch.equal(a, b) for a, b in zip(mine, plain[0], strict=True))


def test_all_start_from_parameters_and_buffers_of_the_first_member():
    def program(comm):
        if comm.rank == 0:
            return []
        model = make_model(seed=comm.rank)
        model.register_buffer("mean", torch.full((2,), float(comm.rank)))
        lowcomm.attach(model, adamw(list(model.parameters())), DiLoCo(), comm.sub((1, 2)))
        return [flat(list(model.parameters())), model.mean]

    _, first, second = run_world(3, program)
    assert torch.equal(first[0], flat(list(make_model(seed=1).parameters()))) and first[1].tolist() == [1.0, 1.0]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("algorithm", [DiLoCo(every=2), StreamingDiLoCo(every=4, delay=2)], ids=repr)
def test_a_loop_that_is_saved_goes_on_bitwise(algorithm):
    """After step 5, with an average under way in one case."""

    def program(comm):
        def attached():
            model = make_model(seed=comm.rank)
            optimizer = adamw(list(model.parameters()))
            return model, optimizer, lowcomm.attach(model, optimizer, algorithm, comm)

        def steps(model, optimizer, sync, first, last):
            for t in range(first, last + 1):
                optimizer.zero_grad()
                mse(model, make_batch(comm.rank, t)).backward()
                optimizer.step()
                sync.step()
            return flat(list(model.parameters()))

        before, after = attached(), attached()
        steps(*before, 1, 5)
        for old, new, saved in zip(before, after, copy.deepcopy([x.state_dict() for x in before]), strict=True):
            assert type(old) is type(new)
            new.load_state_dict(saved)
        return steps(*before, 6, 9), steps(*after, 6, 9)

    for expected, got in run_world(2, program):
        assert torch.equal(expected, got)


def test_after_the_end_the_optimizer_is_free():
    model, comm = make_model(), MeteredComm(EchoComm(2), Meter())
    optimizer = adamw(list(model.parameters()))
    sync = lowcomm.attach(model, optimizer, DataParallel(), comm)
    sent = []
    for t in (1, 2):
        mse(model, make_batch(0, t)).backward()
        optimizer.step()
        sent.append(comm.meter.bytes_sent)
        if t == 1:
            sync.step()
            sync.finish()
    assert sent[0] == sent[1]
