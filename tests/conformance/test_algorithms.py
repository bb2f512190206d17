"""The laws of every algorithm."""

import copy

import pytest
import torch

from lowcomm.comm.echo import EchoComm
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.comm.solo import SoloComm
from lowcomm.state import restore, state_tree
from tests.algorithms import all_algorithms, expected_rounds, inner_of
from tests.replicas import backward, flat, make_batch, make_engine, train
from tests.world import run_world

STEPS = 11


@pytest.fixture(params=all_algorithms(), ids=str)
def algorithm(request):
    return request.param


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_all_ranks_end_with_the_same_parameters(algorithm, num_ranks):
    final = [
        trace[-1] for trace in run_world(num_ranks, lambda comm: train(algorithm, comm, STEPS, inner_of(algorithm)))
    ]
    assert all(torch.equal(final[0], x) for x in final)
    assert torch.isfinite(final[0]).all()


def test_two_runs_are_bitwise_equal(algorithm):
    first, second = (run_world(3, lambda comm: train(algorithm, comm, STEPS, inner_of(algorithm))) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_state_restored_in_the_middle_of_a_run_goes_on_bitwise(algorithm, stop):
    def program(comm):
        def steps(engine, state, first, last):
            for t in range(first, last + 1):
                backward(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
                algorithm.before_update(t, engine, state, comm)
                engine.update()
                algorithm.after_update(t, engine, state, comm)
            return flat(engine.slots()["param"])

        engine = make_engine(inner_of(algorithm))
        state = algorithm.init(engine, comm)
        steps(engine, state, 1, stop)
        algorithm.settle(state)
        saved = copy.deepcopy((engine.state_dict(), state_tree(state)))
        expected = steps(engine, state, stop + 1, STEPS)

        fresh = make_engine(inner_of(algorithm))
        fresh_state = algorithm.init(fresh, comm)
        fresh.load_state_dict(saved[0])
        restore(fresh_state, saved[1])
        return expected, steps(fresh, fresh_state, stop + 1, STEPS)

    for expected, got in run_world(2, program):
        assert torch.equal(expected, got)


def test_it_says_whether_it_ever_sends_in_backward(algorithm):
    engine, comm = make_engine(inner_of(algorithm)), SoloComm()
    state = algorithm.init(engine, comm)
    listeners = [algorithm.during_backward(t, engine, state, comm) for t in range(1, STEPS + 1)]
    assert algorithm.sends_in_backward() == any(x is not None for x in listeners)


def test_rounds_are_counted_and_traffic_is_that_of_an_echo(algorithm):
    """What `--dry_run` predicts is what a real world sends."""

    def traffic(comm):
        metered = MeteredComm(comm, Meter())
        engine = make_engine(inner_of(algorithm))
        state = algorithm.init(engine, metered)
        for t in range(1, STEPS + 1):
            backward(algorithm, t, engine, state, metered, make_batch(comm.rank, t))
            algorithm.before_update(t, engine, state, metered)
            engine.update()
            algorithm.after_update(t, engine, state, metered)
        algorithm.finish(STEPS, engine, state, metered)
        return algorithm.num_rounds(state), metered.meter.bytes_sent, metered.meter.bytes_received

    real = run_world(4, traffic)
    assert real[0] == traffic(EchoComm(4)) and len(set(real)) == 1
    assert real[0][0] == expected_rounds(algorithm, STEPS)
    assert traffic(SoloComm())[1:] == (0, 0), "alone there is nothing to send"
