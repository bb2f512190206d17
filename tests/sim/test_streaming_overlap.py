"""What a delayed fragment hides: its transfer goes on while replicas train, in virtual time and by hand."""

from functools import partial

import pytest
import torch

from lowcomm.algorithms.base import step
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.streaming_diloco import StreamingDiLoCo
from lowcomm.compress.cast import Cast
from lowcomm.outer.nesterov import Nesterov
from lowcomm.reduce import Reducer
from lowcomm.sim.cluster.compute import Constant
from lowcomm.sim.engine import SimEngine
from lowcomm.sim.pace import Pace
from lowcomm.sim.record.trace import Trace
from tests.replicas import adamw, flat, make_batch, make_engine, train
from tests.sim.slow import on_links
from tests.world import run_world

STEPS = 12
PLAIN_BYTES = 41 * 8  # of the small model, which an all-reduce between two sends once
CAST_BYTES = 21 * 2  # half of it in 16 bits, in each of two messages


def seconds(algorithm, bytes_per_s):
    """Of 12 inner steps of 1 s on two ranks, and rank 0's parameters."""

    def program(comm, clock):
        engine = SimEngine(make_engine(adamw), Pace(clock, Constant(1.0), Trace(), comm.rank))
        state = algorithm.init(engine, comm)
        for t in range(1, STEPS + 1):
            step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
        algorithm.finish(STEPS, engine, state, comm)
        return flat(engine.slots()["param"])

    params, end_s = on_links(program, bytes_per_s)
    assert torch.equal(params[0], params[1])
    return end_s, params[0]


def streaming(delay, blend=0.5, **options):
    return StreamingDiLoCo(4, delay, blend=blend, outer=Nesterov(0.4, 0.9), **options)


@pytest.mark.parametrize(("transfer_s", "delay", "waited_s"), [(0.8, 1, 0), (2.5, 1, 1.5), (2.5, 2, 0.5), (2.5, 3, 0)])
def test_a_transfer_is_waited_for_only_beyond_its_delay(transfer_s, delay, waited_s):
    """Sent after steps 4, 8 and 12, the last of which is waited for at the end of the run."""
    rate = PLAIN_BYTES / transfer_s
    assert seconds(streaming(0), rate)[0] == pytest.approx(STEPS + 3 * transfer_s)
    assert seconds(streaming(delay), rate)[0] == pytest.approx(STEPS + 2 * waited_s + transfer_s)


def test_a_whole_round_of_delay_hides_a_transfer_as_long_as_a_round():
    late = streaming(4, blend=0.0, blocks_per_fragment=None)
    assert seconds(late, PLAIN_BYTES / 4.0)[0] == pytest.approx(STEPS + 4.0)
    assert seconds(late, PLAIN_BYTES / 5.0)[0] == pytest.approx(STEPS + 2 * 1.0 + 5.0)


def test_fragments_share_out_the_waiting():
    """Of 35 and 6 parameters; sent at 4, 8, 12 and at 6, 10; what is left of the second is sent at the end."""
    plain_s, _ = seconds(streaming(0, blocks_per_fragment=1), PLAIN_BYTES / 4.1)
    assert plain_s == pytest.approx(STEPS + 3 * 3.5 + 3 * 0.6)
    hidden_s, _ = seconds(streaming(1, blocks_per_fragment=1), PLAIN_BYTES / 4.1)
    # the second fragment's transfer fits in its step; at the end both are under way
    assert hidden_s == pytest.approx(STEPS + 2 * 2.5 + 3.5 + 0.6)


@pytest.mark.parametrize(("delay", "waited_s"), [(0, 2.0), (1, 1.0), (2, 0.0), (3, 0.0)])
def test_the_second_message_of_a_compressor_is_hidden_too(delay, waited_s):
    """Each takes a second: with a delay of 2 steps the second one sets out after the first of them."""
    algorithm = streaming(delay, reducer=Reducer(Cast()))
    at_the_end_s = 2.0
    assert seconds(algorithm, CAST_BYTES / 1.0)[0] == pytest.approx(STEPS + 2 * waited_s + at_the_end_s)


def test_a_single_message_is_not_waited_for_before_its_time():
    assert seconds(streaming(3), PLAIN_BYTES / 2.9)[0] == pytest.approx(STEPS + 2.9)


@pytest.mark.parametrize(("delay", "hidden_s"), [(0, 0), (1, 1), (2, 2)])
def test_layers_that_are_final_set_out_within_backward(delay, hidden_s):
    """Backward is 2/3 of a step: the wire is busy from when the first of 41 numbers is final, to beyond its end."""
    transfer_s = 4.1
    algorithm = streaming(delay, reducer=Reducer(bucket_bytes=1), overlap=True)
    at_the_end_s = transfer_s - 2 / 3 * 40 / 41
    waited_s = max(0.0, at_the_end_s - hidden_s)
    whole_s, _ = seconds(algorithm, PLAIN_BYTES / transfer_s)
    assert whole_s == pytest.approx(STEPS + 2 * waited_s + at_the_end_s)


def test_the_numbers_are_those_of_another_world():
    for algorithm in (streaming(2, reducer=Reducer(Cast())), streaming(4, 0.0), streaming(1, blocks_per_fragment=1)):
        elsewhere = run_world(2, partial(train, algorithm, num_steps=STEPS, inner=adamw))
        assert torch.equal(seconds(algorithm, 50.0)[1], elsewhere[0][-1])
    assert torch.equal(seconds(streaming(0, 0.0), 50.0)[1], seconds(DiLoCo(4, Nesterov(0.4, 0.9)), 50.0)[1])
