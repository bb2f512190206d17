"""Replicas of two ranks, of which each holds half of the parameters, do what replicas of one rank do."""

import shutil

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
from lowcomm.checkpoint import Checkpoints
from lowcomm.comm.base import Late
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.compress.quantized import Quantized
from lowcomm.engine.around import Around
from lowcomm.ledger import Ledger
from lowcomm.membership import Members
from lowcomm.metrics import Metrics, file_of, of_replicas, read, truncate_after
from lowcomm.places import place_of
from lowcomm.reduce import NonFinite, Reducer
from lowcomm.replica import Replica
from lowcomm.resume import resume
from lowcomm.state import state_tree
from lowcomm.train import Plan, train
from tests.replicas import adamw, flat, make_batch, make_engine, mse
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


class Batches:
    """A replica's own, in their order; the process dies when it asks for that of ``dies_at``."""

    def __init__(self, replica, dies_at):
        self.replica, self.t, self.dies_at = replica, 0, dies_at

    def next(self):
        self.t += 1
        if self.t == self.dies_at:
            raise Died
        x, y = make_batch(self.replica, self.t)
        return torch.cat([x, y[:, None]], dim=1)

    def state_dict(self):
        return {"t": self.t}

    def load_state_dict(self, state):
        self.t = state["t"]


class Died(Exception):
    """Some rank of the world."""


def run_of(comm, out, keep=2, dies_at=None, resumes=False):
    """One rank of 2 replicas of 2 shards, with checkpoints every 2 steps; the whole parameters at the end."""
    place = place_of(comm, NUM_SHARDS)
    inner = make_engine(adamw, loss=lambda model, batch: mse(model, (batch[:, :6], batch[:, 6])))
    across = MeteredComm(place.across, Meter())
    engine, algorithm, metrics = Sharded(inner, place), DiLoCo(3), Metrics(file_of(out, place.name))
    ledger = Ledger(
        write=metrics.write, meter=across.meter, now=lambda: 0.0, rank=comm.rank, num_replicas=len(across.members),
        step_tokens=5, log_every=1, token_flops=None, peak_flops=None,
    )  # fmt: skip
    state, stream = algorithm.init(engine, across), Batches(place.replica, dies_at)
    replica = Replica(algorithm, engine, state, stream, ledger, Members(across), torch.device("cpu"))
    checkpoints = Checkpoints(out / "checkpoints", place, "run", keep)
    if resumes:
        truncate_after(file_of(out, place.name), resume(replica, checkpoints))
    train(replica, Plan(STEPS, 0, 2, (), 1.0), checkpoints)
    ledger.summary("DiLoCo", 0, 1.0)
    engine.gather()
    return flat(inner.slots()["param"])


def test_sharded_replicas_go_on_as_if_nothing_had_been(tmp_path):
    """From the newest step that every shard of every replica has, with files called by replica and shard."""
    whole = run_world(4, lambda comm: run_of(comm, tmp_path / "whole"))
    out = tmp_path / "broken"
    with pytest.raises(Died):
        run_world(4, lambda comm: run_of(comm, out, dies_at=8))
    names = [f"replica0000{replica}.shard0000{shard}" for replica in range(2) for shard in range(2)]
    assert sorted(x.name for x in (out / "checkpoints" / "t00000006").iterdir()) == names

    shutil.rmtree(out / "checkpoints" / "t00000006" / names[3])  # so all go on from step 4, the other shards too
    again = run_world(4, lambda comm: run_of(comm, out, resumes=True))
    for x, y in zip(whole, again, strict=True):
        assert torch.equal(x, y)
    for name in names:
        both = [read(file_of(folder, name)) for folder in (out, tmp_path / "whole")]
        first, second = ([(x["kind"], x["t"], x["rank"], x["tokens"], x.get("loss")) for x in lines] for lines in both)
        assert first == second
    lines = of_replicas(out)
    assert [(line["rank"], line["tokens"], line["members"]) for line in lines] == [(0, 90, 2), (2, 90, 2)]
    ranks = [read(file_of(out, name))[-1]["bytes_sent"] for name in names]
    assert [line["bytes_sent"] for line in lines] == [ranks[0] + ranks[1], ranks[2] + ranks[3]]


def test_no_shard_forgets_a_checkpoint_before_all_shards_have_the_next(tmp_path, monkeypatch):
    """One shard of one replica dies as it saves step 4: all others keep step 2, those of the other shard too."""
    saves = Checkpoints.save

    def save(self, t, state):
        if t == 4 and self.place.name == "replica00001.shard00001":
            raise Died
        return saves(self, t, state)

    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(Died):
        run_world(4, lambda comm: run_of(comm, tmp_path, keep=1))
    assert len(list((tmp_path / "checkpoints" / "t00000002").iterdir())) == 4


def test_ranks_that_make_no_whole_replicas_are_refused():
    with pytest.raises(ValueError, match="3 ranks do not make replicas of 2"):
        run_world(3, lambda comm: place_of(comm, 2))
