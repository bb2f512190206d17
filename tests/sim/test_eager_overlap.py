"""Eager updates: a round's transfer has the whole next round, its later messages included."""

import pytest

from lowcomm.algorithms.base import step
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.eager_diloco import EagerDiLoCo
from lowcomm.compress.cast import Cast
from lowcomm.reduce import Reducer
from lowcomm.sim.cluster.compute import Constant
from lowcomm.sim.engine import SimEngine
from lowcomm.sim.pace import Pace
from lowcomm.sim.record.trace import Trace
from tests.replicas import make_batch, make_engine
from tests.sim.slow import on_links


def seconds(algorithm, bytes_per_s):
    """When two ranks have taken 8 steps of a second each, and when `finish` has come to its end."""

    def program(comm, clock):
        engine = SimEngine(make_engine(), Pace(clock, Constant(1.0), Trace(), comm.rank))
        state = algorithm.init(engine, comm)
        for t in range(1, 9):
            step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
        trained_s = clock.now
        algorithm.finish(8, engine, state, comm)
        return trained_s, clock.now

    (first, second), _ = on_links(program, bytes_per_s)
    assert first == second
    return pytest.approx(first)


def test_a_transfer_shorter_than_a_round_costs_no_time():
    """41 parameters of 8 bytes at 100 bytes/s take 3.28 s, a round of 4 steps 4 s."""
    assert seconds(DiLoCo(4), 100.0) == (8 + 2 * 3.28, 8 + 2 * 3.28)
    assert seconds(EagerDiLoCo(4), 100.0) == (8.0, 8 + 3.28)


def test_a_longer_one_makes_the_next_round_wait():
    """At 50 bytes/s it takes 6.56 s."""
    assert seconds(EagerDiLoCo(4), 50.0) == (4 + 6.56, 4 + 6.56 + 6.56)


def test_the_second_message_sets_out_in_the_middle_of_a_round():
    """Cast sends two messages of 21 values of 2 bytes one after the other: 2 s each at 21 bytes/s."""
    assert seconds(EagerDiLoCo(4, reducer=Reducer(Cast())), 21.0) == (8.0, 12.0)
