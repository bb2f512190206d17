"""Rounds that do not wait for everyone, in the simulator, against the same rounds written out."""

import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.local_sgd import LocalSGD
from lowcomm.algorithms.noloco import NoLoCo
from lowcomm.attendance import attend
from lowcomm.cli import main
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.engine.around import Around
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.ledger import Ledger
from lowcomm.membership import Members
from lowcomm.metrics import read
from lowcomm.outer.sgd import SGD
from lowcomm.participation.dbw import DynamicBackup
from lowcomm.participation.options import Participation
from lowcomm.participation.rules import All, Deadline, FirstK, Quorum
from lowcomm.replica import Replica
from lowcomm.sim.seats import seats_of
from lowcomm.sim.wire.clock import Clock
from lowcomm.sim.wire.comm import World
from lowcomm.train import Plan, train
from tests.multiprocess.launch import write_tiny
from tests.replicas import flat, make_batch, make_model, mse

EVERY, NUM_ROUNDS, LR = 3, 5, 0.1
STEP_S = [1.0, 1.1, 1.7, 4.5]  # the last misses several rounds in a row


def factor(t):
    """Of the learning rate at a step."""
    return 1 / (1 + t)


def joined(rank, number):
    x, y = make_batch(rank, number)
    return torch.cat([x, y[:, None]], 1)


def loss(model, batch):
    return mse(model, (batch[:, :-1], batch[:, -1]))


class Slow(Around):
    """A step takes virtual time."""

    def __init__(self, inner, clock, step_s):
        super().__init__(inner)
        self.clock, self.step_s = clock, step_s

    def backward(self, batch, ready=None):
        self.clock.sleep(self.step_s)
        return self._inner.backward(batch, ready)


class Numbered:
    """The batches of a rank."""

    def __init__(self, rank):
        self.rank, self.number = rank, 0

    def next(self):
        self.number += 1
        return joined(self.rank, self.number)


def trained(algorithm, options):
    """The views, each rank's parameters, tokens and steps."""
    clock, num = Clock(), len(STEP_S)
    world, seats = World(clock), seats_of(options, clock, len(STEP_S))

    def program(rank):
        model, meter = make_model(), Meter()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        schedule = LambdaLR(optimizer, lambda epoch: factor(epoch + 1))
        inner = TorchEngine(model, optimizer, loss=loss, schedule=schedule, clip_norm=None)
        engine, comm = Slow(inner, clock, STEP_S[rank]), MeteredComm(world.comm(rank, range(num)), meter)
        state = algorithm.init(engine, comm)
        attendance = attend(options, seats[rank], comm, algorithm, state)
        ledger = Ledger(lambda line: None, meter, comm.now, rank, num, 10, 100, None, None)
        stream = Numbered(rank)
        replica = Replica(algorithm, engine, state, stream, ledger, Members(comm), torch.device("cpu"), attendance)
        train(replica, Plan(EVERY * NUM_ROUNDS, 0, 0, [], 1.0), None)
        return flat(list(model.parameters())), ledger.tokens, stream.number

    for rank in range(num):
        clock.spawn(rank, partial(program, rank))
    return clock.run(), seats[0].hall.views


def by_hand(views, outer_lr, momentum, options):
    """The anchor after these rounds."""
    anchor = [p.detach().clone() for p in make_model().parameters()]
    buffer = [torch.zeros_like(x) for x in anchor]
    loaded, numbers = [(anchor, 0)] * len(STEP_S), [0] * len(STEP_S)
    for newest, view in enumerate(views):
        deltas, weights = [], []
        for rank, tokens, version in zip(view.members, view.tokens, view.versions, strict=True):
            base, since = loaded[rank]
            assert since == version and tokens == 10 * EVERY
            params = [nn.Parameter(x.clone()) for x in base]
            model = make_model()
            for i in range(EVERY):
                numbers[rank] += 1
                named = dict(zip(dict(model.named_parameters()), params, strict=True))
                said = torch.func.functional_call(model, named, joined(rank, numbers[rank])[:, :-1])
                gradients = torch.autograd.grad(
                    nn.functional.mse_loss(said.squeeze(1), joined(rank, numbers[rank])[:, -1]), params
                )
                rate = LR * factor(version * EVERY + i + 1)
                params = [nn.Parameter((p - rate * g).detach()) for p, g in zip(params, gradients, strict=True)]
            deltas.append([x - p.detach() for x, p in zip(base, params, strict=True)])
            kept = options.discount if options.late == "carry" else 0.0
            weights.append(tokens * kept ** (newest - version))
        mean = [sum(w * d for w, d in zip(weights, ds, strict=True)) / sum(weights) for ds in zip(*deltas, strict=True)]
        buffer = [momentum * b + m for b, m in zip(buffer, mean, strict=True)]
        anchor = [a - outer_lr * (m + momentum * b) for a, m, b in zip(anchor, mean, buffer, strict=True)]
        for rank in view.members:
            loaded[rank] = (anchor, newest + 1)
    return flat(anchor)


RULES = [All(), FirstK(3), FirstK(1), Quorum(0.5, 0.2), Deadline(5.0, at_least=2)]


@pytest.mark.parametrize("late", ["carry", "drop"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rounds_are_those_written_out_and_every_token_of_theirs_counts(rule, late):
    options = Participation(rule, late, 0.5)
    for algorithm, outer in (
        (DiLoCo(EVERY), (0.7, 0.9)),
        (LocalSGD(EVERY), (1.0, 0.0)),
        (DiLoCo(EVERY, SGD(0.5)), (0.5, 0)),
    ):
        ranks, views = trained(algorithm, options)
        assert len(views) == NUM_ROUNDS
        for params, _, _ in ranks:
            assert torch.equal(params, ranks[0][0])
        torch.testing.assert_close(ranks[0][0], by_hand(views, *outer, options), rtol=1e-12, atol=1e-12)
        for rank, (_, tokens, _) in enumerate(ranks):
            applied = [
                n
                for view in views
                if rank in view.members
                for n, version in zip(view.tokens, view.versions, strict=True)
                if late == "carry" or version == max(view.versions)
            ]
            assert tokens == sum(applied)
        missed = {rank for rank in range(len(STEP_S)) for v in views if rank not in v.members}
        assert bool(missed) == (rule != All())


def test_a_method_whose_replicas_cannot_catch_up_is_refused():
    with pytest.raises(ValueError, match="cannot miss a round"):
        trained(NoLoCo(every=EVERY), Participation())
    with pytest.raises(ValueError, match="learns from what members measure"):
        trained(DiLoCo(EVERY), Participation(DynamicBackup()))
    with pytest.raises(ValueError, match="nobody decides"):
        attend(Participation(), None, None, DiLoCo(EVERY), None)


@pytest.fixture
def simulated(tmp_path):
    """A run on four hosts, of which the last takes 1.7 times as long: its evaluations and its summary."""
    config, cluster = write_tiny(tmp_path), tmp_path / "cluster.yaml"
    compute = {"model": {"class_path": "Constant", "init_args": {"mean_s": 1.0}}, "speeds": [1, 1, 1, 1 / 1.7]}
    hosts = {"num_hosts": 4, "compute": {"class_path": "Scaled", "init_args": compute}}
    cluster.write_text(json.dumps({"class_path": "Uniform", "init_args": hosts}))

    def go(name, *flags):
        often = ["--checkpoint.every", "0", "--evaluation.every", "7", "--num_steps", "42"]
        out = tmp_path / name
        args = ["simulate", "--config", str(config), *often, "--cluster", str(cluster), "--out", str(out), *flags]
        assert main(args) == 0
        lines = read(out / "metrics.jsonl")
        return [(x["t"], x.get("val_loss")) for x in lines if x["kind"] == "eval"], lines[-1], out

    return go


def rule(name, **options):
    return ["--participation", json.dumps({"rule": {"class_path": name, "init_args": options}})]


def test_waiting_for_all_changes_no_value_and_waiting_for_fewer_takes_less_time(simulated):
    plain, summary, out = simulated("plain")
    everyone, summary_of_all, out_of_all = simulated("all", *rule("All"))
    assert everyone == plain and summary_of_all["tokens"] == summary["tokens"]
    files = [(x / "final.safetensors").read_bytes() for x in (out, out_of_all)]
    assert files[0] == files[1]
    some, summary_of_some, _ = simulated("some", *rule("FirstK", k=3))
    assert [t for t, _ in some] == [t for t, _ in plain] and some[-1][1] < plain[0][1]
    assert summary_of_some["time_s"] < 0.7 * summary["time_s"]
    _, summary_timed, _ = simulated("timed", *rule("FirstK", k=3), "--timing_only", "true")
    assert summary_timed["time_s"] == pytest.approx(summary_of_some["time_s"], rel=1e-9)
