"""A replica is lost while others wait for it: state stays as before the call, and the rest go on to one end."""

import copy
from functools import partial

import pytest
import torch

from lowcomm.comm.base import Late, PeerLost
from lowcomm.membership import Members
from lowcomm.rounds.base import Rounds
from lowcomm.sim.wire.clock import Clock
from lowcomm.sim.wire.comm import SimComm, World
from lowcomm.state import state_tree
from tests.algorithms import all_algorithms, inner_of
from tests.replicas import flat, make_batch, make_engine

STEPS, LOST = 13, 2


def clean(value):
    """Copies of what stays, without what is only under way."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: clean(v) for k, v in value.items() if k not in ("leaving", "parts", "groups", "task")}
    return [clean(v) for v in value] if isinstance(value, list | tuple) else copy.copy(value)


def assert_same(a, b, where=""):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    """Checks at every loss that nothing has changed since the exchange began."""
    exchange = Rounds.exchange

    def checked(self, t, engine, state, *args, **options):
        slots = {name: xs for name, xs in engine.slots().items() if name != "grad"}
        before = clean([slots, state_tree(state)])
        try:
            exchange(self, t, engine, state, *args, **options)
        except (PeerLost, Late):
            assert_same(before, clean([slots, state_tree(state)]))
            raise

    monkeypatch.setattr(Rounds, "exchange", checked)


class Counting(Members):
    num_losses = 0

    def _regroup(self, lost, may_skip):
        self.num_losses += 1
        super()._regroup(lost, may_skip)


class Doomed(SimComm):
    """Crashes when it comes to its wait of a certain number, or notes how many there were."""

    def __init__(self, world, rank, crashes_at):
        super().__init__(world, world.comm(rank, (0, 1, 2))._view, rank)
        self.crashes_at, self.num_waits = crashes_at, 0

    def issue(self, call):
        work = super().issue(call)
        wait = work.wait

        def waited():
            self.num_waits += 1
            if self.num_waits == self.crashes_at:
                self._world.crash(self.rank)
            return wait()

        work.wait = waited
        return work


def train(algorithm, comm):
    engine = make_engine(inner_of(algorithm))
    state, members = algorithm.init(engine, comm), Counting(comm, goes_on=True)
    for t in range(1, STEPS + 1):
        engine.backward(make_batch(comm.rank, t), algorithm.during_backward(t, engine, state, members.comm))
        members.take(algorithm, engine, state, partial(algorithm.before_update, t, engine, state))
        engine.update()
        members.take(algorithm, engine, state, partial(algorithm.after_update, t, engine, state))
    members.take(algorithm, engine, state, partial(algorithm.complete, STEPS, engine, state))
    members.take(algorithm, engine, state, partial(algorithm.finish, STEPS, engine, state))
    return flat(engine.slots()["param"]), members.num_losses, algorithm.num_rounds(state)


def run(algorithm, crashes_at=0):
    clock = Clock()
    world = World(clock)
    doomed = Doomed(world, LOST, crashes_at)
    for rank in range(3):
        comm = doomed if rank == LOST else world.comm(rank, (0, 1, 2))
        clock.spawn(rank, partial(train, algorithm, comm))
    return clock.run(), doomed.num_waits


@pytest.mark.parametrize("algorithm", all_algorithms(), ids=str)
def test_whenever_one_is_lost_the_others_end_alike(algorithm):
    _, num_waits = run(algorithm)
    assert num_waits > 0
    num_losses = 0
    for k in range(1, num_waits + 1):
        ended, _ = run(algorithm, k)
        first, second = ended[0], ended[1]
        assert torch.equal(first[0], second[0]) and torch.isfinite(first[0]).all(), f"lost at its wait {k}"
        # of pairs, who is not the lost one's partner may notice later
        assert first[2] == second[2] and (first[1] == second[1] or algorithm.may_skip())
        num_losses += first[1]
    assert num_losses >= num_waits // 2, "not only those at the end, which nobody needs to notice"
