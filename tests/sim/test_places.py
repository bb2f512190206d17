"""Replicas of two ranks, of which each holds half of the parameters, do what replicas of one rank do."""

import pytest
import torch

from lowcomm.algorithms.base import step
from lowcomm.algorithms.composed import After, Then
from lowcomm.algorithms.data_parallel import DataParallel
from lowcomm.algorithms.des_loc import DESLOC
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.eager_diloco import EagerDiLoCo
from lowcomm.algorithms.gasloc import GASLoC
from lowcomm.algorithms.local_sgd import LocalSGD
from lowcomm.algorithms.noloco import NoLoCo
from lowcomm.algorithms.sparta import SPARTA
from lowcomm.algorithms.streaming_diloco import StreamingDiLoCo
from lowcomm.comm.base import Late
from lowcomm.compress.quantized import Quantized
from lowcomm.engine.around import Around
from lowcomm.places import place_of
from lowcomm.reduce import NonFinite, Reducer
from lowcomm.state import state_tree
from tests.replicas import adamw, flat, make_batch, make_engine
from tests.sim.test_losses import assert_same, clean
from tests.world import run_world

STEPS, NUM_SHARDS = 9, 2


class Sharded(Around):
    """Computes the gradients of the whole model, but lends and keeps one shard of it: every other parameter.

    What other ranks of the replica hold comes before forward.
    """

    def __init__(self, inner, place):
        super().__init__(inner)
        self._place = place
        self._mine = range(place.shard, len(inner.slots()["param"]), NUM_SHARDS)

    def backward(self, batch, ready=None):
        self.gather()
        return self._inner.backward(batch, ready)

    def gather(self):
        within = self._place.within
        for i, x in enumerate(self._inner.slots()["param"]):
            x.copy_(within.broadcast(x, within.members[i % NUM_SHARDS]).wait())

    def slots(self):
        return {name: [xs[i] for i in self._mine] for name, xs in self._inner.slots().items()}

    def gradients(self, numbers):
        return self._inner.gradients([self._mine[i] for i in numbers])

    def names(self):
        return [self._inner.names()[i] for i in self._mine]


METHODS = [
    DataParallel(),
    DataParallel(weights=[1.0, 3.0]),
    DiLoCo(3),
    LocalSGD(3, weights=[1.0, 3.0]),
    EagerDiLoCo(3),
    StreamingDiLoCo(3, 1, blocks_per_fragment=None),
    StreamingDiLoCo(3, delays=[0, 2], blocks_per_fragment=None),
    NoLoCo(2, gamma=0.5),
    GASLoC(2),
    DESLOC({"param": 2, "exp_avg": 3}),
    SPARTA(fraction=1.0),
    After(2, DataParallel(), Then(SPARTA(fraction=1.0, every=2), DiLoCo(3))),
]


@pytest.mark.parametrize("algorithm", METHODS, ids=str)
def test_shards_make_no_difference(algorithm):
    def whole(comm):
        engine = make_engine(adamw)
        state, found = algorithm.init(engine, comm), []
        for t in range(1, STEPS + 1):
            step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
            found.append(flat(engine.slots()["param"]))
        algorithm.finish(STEPS, engine, state, comm)
        return [*found, flat(engine.slots()["param"])]

    def sharded(comm):
        place, inner = place_of(comm, NUM_SHARDS), make_engine(adamw)
        engine = Sharded(inner, place)
        state, found = algorithm.init(engine, place.across), []
        for t in range(1, STEPS + 1):
            step(algorithm, t, engine, state, place.across, make_batch(place.replica, t))
            engine.gather()
            found.append(flat(inner.slots()["param"]))
        algorithm.finish(STEPS, engine, state, place.across)
        engine.gather()
        return [*found, flat(inner.slots()["param"])]

    expected, got = run_world(2, whole), run_world(4, sharded)
    for rank, trace in enumerate(got):
        for t, (x, y) in enumerate(zip(trace, expected[rank // NUM_SHARDS], strict=True), start=1):
            assert torch.equal(x, y), f"rank {rank} after step {t}"


def test_what_one_shard_cannot_average_none_does():
    """A value of one shard of one replica is infinite: all four ranks stay where they were."""
    algorithm = DiLoCo(1, reducer=Reducer(Quantized()))

    def program(comm):
        place = place_of(comm, NUM_SHARDS)
        engine = Sharded(make_engine(adamw), place)
        state = algorithm.init(engine, place.across)
        if comm.rank == 3:
            engine.slots()["param"][0][0] = torch.inf
        before = clean([engine.slots(), state_tree(state)])
        with pytest.raises(NonFinite if place.shard == 1 else Late):
            algorithm.after_update(1, engine, state, place.across)
        assert_same(before, clean([engine.slots(), state_tree(state)]))

    run_world(4, program)


def test_ranks_that_make_no_whole_replicas_are_refused():
    with pytest.raises(ValueError, match="3 ranks do not make replicas of 2"):
        run_world(3, lambda comm: place_of(comm, 2))
