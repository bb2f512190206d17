"""What counts for nothing brings nothing: no infinity and no NaN comes through a weight of zero."""

import pytest
import torch

from lowcomm.algorithms.demo import DeMo
from lowcomm.algorithms.gasloc import mixed
from lowcomm.algorithms.noloco import outer_step
from lowcomm.algorithms.savic import SAVIC
from lowcomm.algorithms.streaming_diloco import StreamingDiLoCo
from lowcomm.comm.solo import SoloComm
from lowcomm.outer.nesterov import Nesterov, NesterovState
from lowcomm.reduce import Reducer
from lowcomm.tensors import add_, mix, mul_
from tests.compressors import EF14, EF21SGDM, EControl
from tests.replicas import make_batch, make_engine, scaled_sgd, sgd

BAD = [float("nan"), float("inf")]


def bad(value):
    return torch.tensor([value, 2.0])


@pytest.mark.parametrize("value", BAD)
def test_arithmetic(value):
    x, y = torch.tensor([3.0, 4.0]), bad(value)
    add_([x], [y], alpha=0.0)
    assert x.tolist() == mix(x, y, 0.0).tolist() == mix(y, x, 1.0).tolist() == [3.0, 4.0]
    mul_([y], 0.0)
    assert y.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("value", BAD)
def test_momentum(value):
    one, anchor, heavy = torch.ones(2), torch.ones(2), torch.ones(2)
    Nesterov(0.5, momentum=0.0).apply([anchor], [one], NesterovState([bad(value)]))
    outer_step([heavy], [bad(value)], 0.0, [(0.5, [one]), (0.0, [bad(value)])])
    assert anchor.tolist() == [0.5, 0.5] and heavy.tolist() == [1.5, 1.5]
    (x,) = mixed([bad(value)], [one], [one], gossip=1.0, momentum=0.0)
    assert x.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("value", BAD)
def test_memories(value):
    x = torch.ones(2)
    decaying, averaging, controlled = EF14(decay=0.0), EF21SGDM(eta=1.0), EControl(eta=0.0)
    states = [feedback.init(x) for feedback in (decaying, averaging, controlled)]
    states[0].error, states[1].average, states[2].error = bad(value), bad(value), bad(value)
    for feedback, state in zip((decaying, averaging, controlled), states, strict=True):
        assert feedback.before(x, state)[0].tolist() == [1.0, 1.0], feedback


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("blend", [0.0, 1.0])
def test_blends(blend, value):
    """A bad step between sending and applying is lost where the anchor is loaded; a bad anchor, where it is not."""
    engine, comm = make_engine(sgd), SoloComm()
    algorithm = StreamingDiLoCo(2, delay=1, blend=blend, blocks_per_fragment=None)
    state = algorithm.init(engine, comm)
    for t in range(1, 4):
        engine.backward(make_batch(0, t))
        engine.update()
        if t == 3:
            for x in engine.slots()["param"] if blend == 0 else state.anchor:
                x.fill_(value)
        algorithm.after_update(t, engine, state, comm)
    assert all(p.isfinite().all() for p in engine.slots()["param"])


@pytest.mark.parametrize("value", BAD)
def test_scalings_that_take_the_last_gradient_alone(value):
    engine, comm, algorithm = make_engine(scaled_sgd), SoloComm(), SAVIC(1, beta=0.0)
    state = algorithm.init(engine, comm)
    for square in state.squares:
        square.fill_(value)
    engine.backward(make_batch(0, 1))
    algorithm.before_update(1, engine, state, comm)
    engine.update()
    algorithm.after_update(1, engine, state, comm)
    assert all(scale.isfinite().all() for scale in engine.slots()["scale"])


@pytest.mark.parametrize("value", BAD)
def test_rates(value):
    """As at the first step of a warm-up."""
    engine, comm, algorithm = make_engine(lambda params: torch.optim.SGD(params, lr=0.0)), SoloComm(), DeMo(Reducer())
    state = algorithm.init(engine, comm)
    engine.backward(make_batch(0, 1))
    engine.slots()["grad"][0].fill_(value)
    algorithm.before_update(1, engine, state, comm)
    assert all(g.count_nonzero() == 0 for g in engine.slots()["grad"])
