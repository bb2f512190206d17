"""What NoLoCo says on the wire: whom to, how much, and when."""

import pytest
import torch

from lowcomm.algorithms.base import step
from lowcomm.algorithms.noloco import NoLoCo
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.compress.cast import Cast
from lowcomm.compress.power_sgd import PowerSGD
from lowcomm.compress.quantized import Quantized
from lowcomm.compress.random_k import RandomK
from lowcomm.feedback.ef14 import EF14
from lowcomm.feedback.ef21 import EF21
from lowcomm.reduce import Reducer
from lowcomm.rounds.gossip import groups
from lowcomm.tensors import num_bytes
from tests.replicas import adamw, flat, make_batch, make_engine, train_on
from tests.world import Passing, run_world

STEPS = 12


class PairsOnly(Passing):
    """Refuses whatever takes more than two ranks, until it `may_meet`."""

    may_meet = False

    def issue(self, call):
        assert self.may_meet or call.kind in ("exchange", "send", "recv"), f"{call.kind} among {self.members}"
        return super().issue(call)

    def sub(self, members):
        raise AssertionError("a group was made")


@pytest.mark.parametrize(
    "algorithm",
    [
        NoLoCo(2),
        NoLoCo(2, gamma=0.5, group_size=3),
        NoLoCo(2, gamma=0.5, reducer=Reducer(Quantized(), EF21()), anchors=Reducer(Cast())),
        NoLoCo(2, gamma=0.5, reducer=Reducer(RandomK(0.5), EF14(0.5))),
        NoLoCo(2, gamma=0.5, group_size=None, reducer=Reducer(PowerSGD(1, min_compression=1), EF14())),
    ],
    ids=str,
)
def test_rounds_are_pair_exchanges_and_only_the_end_is_collective(algorithm):
    def program(comm):
        mine = PairsOnly(comm)
        engine = make_engine(adamw)
        state = algorithm.init(engine, mine)
        for t in range(1, STEPS + 1):
            step(algorithm, t, engine, state, mine, make_batch(mine.rank, t))
        with pytest.raises(AssertionError, match="sum among"):
            algorithm.finish(STEPS, engine, state, mine)
        mine.may_meet = True
        algorithm.finish(STEPS, engine, state, mine)
        return flat(engine.slots()["param"])

    ends = run_world(5, program)
    assert all(torch.equal(ends[0], x) for x in ends) and ends[0].isfinite().all()


@pytest.mark.parametrize(("num", "size"), [(4, 2), (6, 3), (4, None)])
@pytest.mark.parametrize("gamma", [None, 0.5])
def test_traffic_is_the_closed_form(num, size, gamma):
    """(n - 1) S a round with one tensor and twice that with two, n the group's size; at the end an all-reduce."""
    num_rounds, of_group = 3, size or num

    def program(comm):
        metered = MeteredComm(comm, Meter())
        engine, algorithm = make_engine(), NoLoCo(2, gamma=gamma, group_size=size)
        state = algorithm.init(engine, metered)
        for t in range(1, 2 * num_rounds + 1):
            step(algorithm, t, engine, state, metered, make_batch(comm.rank, t))
        before = metered.meter.bytes_sent
        algorithm.finish(2 * num_rounds, engine, state, metered)
        return before, metered.meter.bytes_sent - before, metered.meter.bytes_received, num_bytes(state.anchor)

    for rounds, end, received, size_bytes in run_world(num, program):
        two = 2 if gamma is not None and size is not None else 1  # with one group of all, no anchor needs to be asked
        assert rounds == num_rounds * (of_group - 1) * size_bytes * two
        assert end == 2 * (num - 1) * size_bytes // num and received == rounds + end


ANCHORS = [
    Reducer(),
    Reducer(Cast(), bucket_bytes=64),
    Reducer(RandomK(0.5), EF21()),
    Reducer(Cast("float16"), EF21()),
    Reducer(PowerSGD(1, min_compression=1), EF21()),
]


@pytest.mark.parametrize("anchors", ANCHORS, ids=str)
@pytest.mark.parametrize("every", [1, 2, 3])
def test_anchors_are_on_their_way_from_one_round_to_the_next(anchors, every):
    """And waiting for all of them early, as a checkpoint does, changes nothing; nor does sending them at the end."""

    def program(settles):
        def run(comm):
            engine, algorithm = make_engine(adamw), NoLoCo(every, gamma=0.4, anchors=anchors)
            state = algorithm.init(engine, comm)
            assert not state.under_way
            for t in range(1, STEPS + 1):
                step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
                parts = [part for sent in state.under_way for part in sent.parts]
                if t % every == 0:
                    assert len(parts) == 1 and parts[0].task.pending is not None
                if settles:
                    algorithm.settle(state)
                    assert all(part.task is None for part in parts)
            return flat(state.anchor)

        return run

    for a, b in zip(run_world(4, program(False)), run_world(4, program(True)), strict=True):
        assert torch.equal(a, b)


class Logged(Passing):
    """Keeps what this rank starts: how, and how many numbers."""

    def __init__(self, inner):
        super().__init__(inner)
        self.log = []

    def issue(self, call):
        self.log.append((call.kind, call.x.numel()))
        return super().issue(call)


def messages(algorithm, num, num_steps):
    """What rank 0 starts after each inner step and, as the last, in `finish`."""

    def program(comm):
        logged, engine, found = Logged(comm), make_engine(adamw), []
        state = algorithm.init(engine, logged)
        for t in range(1, num_steps + 1):
            step(algorithm, t, engine, state, logged, make_batch(comm.rank, t))
            found.append(logged.log)
            logged.log = []
        algorithm.finish(num_steps, engine, state, logged)
        return [*found, logged.log]

    return run_world(num, program)[0]


@pytest.mark.parametrize(
    ("anchors", "first", "later"),
    [
        (Reducer(), [41], {}),
        (Reducer(Cast()), [21], {3: [21]}),
        (Reducer(Cast(), bucket_bytes=160), [15, 6], {3: [15, 6]}),
        (Reducer(feedback=EF21()), [42], {1: [41]}),  # a whole average and a number more for new partners
        (Reducer(Cast(), EF21(dense_first=False)), [42], {1: [21], 3: [21]}),
    ],
    ids=str,
)
def test_all_messages_of_the_anchors_set_out_before_the_round_that_needs_them(anchors, first, later):
    """At the inner steps that the method's notes say."""
    every, seed = 5, 5
    parts = [next(part for part in groups(range(4), 2, seed, round) if 0 in part) for round in (1, 2, 3)]
    assert parts[0] != parts[1] != parts[2], "new partners, who make anew what they share"
    log = messages(NoLoCo(every, gamma=0.5, anchors=anchors, seed=seed), 4, 2 * every)
    assert [x for _, x in log[every - 1]] == [41, *first], "deltas, then anchors"
    for age in range(1, every):
        assert [x for _, x in log[every - 1 + age]] == later.get(age, []), f"{age} steps after the round"
    assert [x for _, x in log[2 * every - 1]] == [41, *first]


@pytest.mark.parametrize("finalize", ["average", "pick", "ensemble"])
def test_a_partial_last_round_sends_no_anchors_ahead(finalize):
    """Nobody would use them."""
    *_, end = messages(NoLoCo(5, gamma=0.5, finalize=finalize), 4, 12)
    assert [x for kind, x in end if kind == "exchange"] == [41], "deltas alone"
    assert {kind for kind, _ in end} - {"exchange"} == {
        "average": {"all_sum"},
        "pick": {"broadcast"},
        "ensemble": set(),
    }[finalize]


def test_partners_hold_one_mean_anchor_when_a_run_goes_on():
    """Also where those of the round that nobody sent anchors for meet again, and so make nothing anew."""
    drawn = {
        seed: [{p for p in groups(range(4), 2, seed, round) if 0 in p} for round in (3, 4, 5)] for seed in range(20)
    }
    seed = next(seed for seed, (a, b, c) in drawn.items() if a != b == c)
    algorithm = NoLoCo(3, gamma=0.4, anchors=Reducer(Quantized(), EF21()), seed=seed)

    def program(comm):
        _, state = train_on(algorithm, comm, 7, 9, adamw)  # the fourth round; anchors for the fifth are on their way
        algorithm.settle(state)
        (anchors,) = state.under_way
        return flat(anchors.means())

    means = run_world(4, program)
    for part in groups(range(4), 2, seed, 5):
        assert torch.equal(means[part[0]], means[part[1]])
