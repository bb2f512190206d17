"""Gradients and deltas that travel while backward goes on: the same numbers, in less time."""

from functools import partial

import pytest
import torch
from torch import nn

from lowcomm.algorithms.base import step
from lowcomm.algorithms.data_parallel import DataParallel
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.comm.base import Comm
from lowcomm.compress.cast import Cast
from lowcomm.compress.identity import Identity
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.outer.sgd import SGD
from lowcomm.reduce import Reducer
from lowcomm.sim.cluster.compute import Constant
from lowcomm.sim.engine import SimEngine
from lowcomm.sim.pace import Pace
from lowcomm.sim.record.trace import Span, Trace
from lowcomm.sim.wire.clock import Clock
from tests.replicas import adamw, flat, make_batch, make_engine, train
from tests.sim.slow import on_links
from tests.world import run_world

BUCKETS = [1, 64, 256, 2**20]  # make_model has tensors of 240, 40, 40 and 8 bytes
STEP_S = 9.0


@pytest.mark.parametrize("compressor", [Identity(), Cast()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("bucket_bytes", BUCKETS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_overlap_changes_no_bit(compressor, bucket_bytes, num_ranks):
    # the same buckets, since a tensor that is alone in one may be too small to be worth compressing
    reducer = Reducer(compressor, bucket_bytes=bucket_bytes)
    plain = run_world(num_ranks, partial(train, DataParallel(reducer), num_steps=5, inner=adamw))
    results = run_world(num_ranks, partial(train, DataParallel(reducer, overlap=True), num_steps=5, inner=adamw))
    for expected, got in zip(plain, results, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(expected, got, strict=True))


class Recorder(Comm):
    """A comm that notes when sums set out and how long they are."""

    def __init__(self, comm):
        self.comm, self.rank, self.members, self.sums = comm, comm.rank, comm.members, []

    def issue(self, call):
        assert call.kind == "all_sum"
        self.sums.append((self.now(), call.x.tolist()))
        return self.comm.issue(call)

    def sub(self, members):
        raise AssertionError("a group was made")

    def now(self):
        return self.comm.now()


def three_layers():
    """Parameters of 2, 4 and 6 float32 elements, used in this order; their gradients are all `rank` + 1."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(n)) for n in (2, 4, 6)])

    def loss(model, scale):
        x = torch.zeros(())
        for p in model:  # each layer takes the one before it, so backward goes from the last to the first
            x = x + p.sum() * scale
            x = x * 1.0
        return x

    return TorchEngine(model, torch.optim.SGD(model.parameters(), lr=1.0), loss=loss, clip_norm=None)


def one_step(algorithm, bytes_per_s):
    """Seconds of a step of 9 s on two ranks, the parameters after it, and what rank 0 sent when."""

    def program(comm, clock):
        comm = Recorder(comm)
        engine = SimEngine(three_layers(), Pace(clock, Constant(STEP_S), Trace(), comm.rank))
        state = algorithm.init(engine, comm)
        step(algorithm, 1, engine, state, comm, comm.rank + 1.0)
        return clock.now, [p.tolist() for p in engine.slots()["param"]], comm.sums

    results, _ = on_links(program, bytes_per_s)
    assert results[0][:2] == results[1][:2]
    return results[0]


EVERY_STEP = {"DataParallel": DataParallel, "DiLoCo": partial(DiLoCo, 1, SGD(lr=1.0))}


@pytest.mark.parametrize("method", EVERY_STEP.values(), ids=EVERY_STEP)
def test_the_time_of_a_step_by_hand(method):
    """Forward ends at 3 s; backward's 6 s are half a second for each of 12 elements: ready at 6, 8 and 9 s.

    Two ranks send each group's own bytes: 24, 16 and 8 at 8 bytes/s take 3, 2 and 1 s. The first is there at 9 s but
    shares the link from 8 s on: 8 of its bytes and 16 of the second are left then. At 9 s the third begins, and all
    that is left, 4 + 12 + 8 bytes, is there after 3 s more.
    """
    by_parameter = Reducer(bucket_bytes=1)
    time_s, params, sums = one_step(method(reducer=by_parameter, overlap=True), 8.0)
    assert [start_s for start_s, _ in sums] == pytest.approx([6.0, 8.0, 9.0])
    assert [len(x) for _, x in sums] == [6, 4, 2]
    assert time_s == pytest.approx(12.0)
    assert params == [[-1.5] * 2, [-1.5] * 4, [-1.5] * 6]
    plain_s, same, sums = one_step(method(reducer=by_parameter), 8.0)
    assert plain_s == pytest.approx(9.0 + 6.0) and same == params
    assert {start_s for start_s, _ in sums} == {9.0}


@pytest.mark.parametrize("method", EVERY_STEP.values(), ids=EVERY_STEP)
def test_groups_are_filled_from_the_last_parameter_on(method):
    _, _, sums = one_step(method(reducer=Reducer(bucket_bytes=40), overlap=True), 8.0)
    assert [(pytest.approx(start_s), len(x)) for start_s, x in sums] == [(8.0, 10), (9.0, 2)]


def three_rounds(algorithm):
    """Seconds of three rounds of two steps on two ranks, and their parameters."""

    def program(comm, clock):
        engine = SimEngine(make_engine(adamw), Pace(clock, Constant(1.0), Trace(), comm.rank))
        state = algorithm.init(engine, comm)
        for t in range(1, 7):
            step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
        return flat(engine.slots()["param"])

    return on_links(program, 1000.0)


def test_rounds_that_overlap_have_the_same_end_sooner():
    plain, plain_s = three_rounds(DiLoCo(2))
    overlapped, overlapped_s = three_rounds(DiLoCo(2, reducer=Reducer(bucket_bytes=64), overlap=True))
    elsewhere = run_world(2, partial(train, DiLoCo(2), num_steps=6, inner=adamw))
    for rank in (0, 1):
        assert torch.equal(overlapped[rank], plain[rank]) and torch.equal(plain[rank], elsewhere[rank][5])
    # 41 parameters of 8 bytes at 1,000 bytes/s after each round; of these 30 are final at its very end
    assert plain_s == pytest.approx(6 + 3 * 0.328)
    assert overlapped_s == pytest.approx(6 + 3 * 0.240)


def test_a_step_is_one_span_in_the_trace_and_takes_its_time_with_and_without_a_listener():
    for ready in (None, lambda i, gradient: None):
        clock, trace = Clock(), Trace()
        engine = SimEngine(three_layers(), Pace(clock, Constant(STEP_S), trace, 0))
        clock.spawn(0, partial(engine.backward, 1.0, ready))
        clock.run()
        assert clock.now == STEP_S
        assert trace.spans == [Span(0, "compute", 0.0, STEP_S, "step 1")]
