"""GASLoC against explicit replicas, and what it has in common with DiLoCo."""

import math

import pytest
import torch

from lowcomm.algorithms.base import step
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.gasloc import GASLoC
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.comm.solo import SoloComm
from lowcomm.outer.nesterov import Nesterov
from lowcomm.outer.sgd import SGD
from lowcomm.rounds.gossip import disagreement, groups
from lowcomm.tensors import num_bytes
from tests.replicas import adamw, flat, make_batch, make_engine, make_model, sgd, step_all, train
from tests.world import run_world

STEPS = 12


def close(a, b, atol=1e-12):
    return torch.allclose(a, b, rtol=0, atol=atol)


def laplacian(num, parts):
    """Half the sum of (e_i - e_j)(e_i - e_j)^T over the pairs within each group, with weights 2 / its size."""
    found = torch.zeros(num, num, dtype=torch.float64)
    for part in parts:
        for i in part:
            for j in part:
                if i < j:
                    e = torch.zeros(num, dtype=torch.float64)
                    e[i], e[j] = 1.0, -1.0
                    found += 0.5 * (2 / len(part)) * torch.outer(e, e)
    return found


def reference(num, every, inner, algorithm):
    """All replicas as rows of one matrix, as in the paper's equation. Returns each replica's parameters by step."""
    models = [make_model() for _ in range(num)]
    optimizers = [inner(list(m.parameters())) for m in models]
    x = torch.stack([flat(list(m.parameters())) for m in models])
    last, trace = x, [[] for _ in models]
    for t in range(1, STEPS + 1):
        step_all(models, optimizers, t)
        if t % every == 0:
            g = torch.stack([flat(list(m.parameters())) for m in models]) - x
            y = x + algorithm.lr * g
            parts = groups(range(num), algorithm.group_size, algorithm.seed, t // every)
            x = y - algorithm.gossip * laplacian(num, parts) @ y + algorithm.momentum * (y - last)
            last = y
            for row, m in zip(x, models, strict=True):
                torch.nn.utils.vector_to_parameters(row.clone(), m.parameters())
        for rank, m in enumerate(models):
            trace[rank].append(flat(list(m.parameters())))
    return trace


@pytest.mark.parametrize("inner", [sgd, adamw])
@pytest.mark.parametrize(("num", "size"), [(4, 2), (5, 2), (6, 3), (4, None), (1, 2)])
@pytest.mark.parametrize(("momentum", "gossip"), [(0.5, 1.0), (0.9, 0.3), (0.0, 0.7)])
def test_gasloc_is_the_reference(inner, num, size, momentum, gossip):
    algorithm = GASLoC(3, 0.8, momentum, gossip, size, seed=4)
    expected = reference(num, 3, inner, algorithm)
    got = run_world(num, lambda comm: train(algorithm, comm, STEPS, inner))
    for rank in range(num):
        for t in range(STEPS):
            assert close(got[rank][t], expected[rank][t]), f"rank {rank}, step {t + 1}"
    mean = torch.stack([trace[-1] for trace in expected]).mean(0)
    assert all(close(trace[-1], mean) for trace in got), "the end is the average of all replicas"


def test_one_group_of_all_without_momentum_is_diloco_with_outer_sgd():
    """All the way to the mean: every replica."""
    gossip = run_world(3, lambda comm: train(GASLoC(4, 0.8, momentum=0.0, group_size=None), comm, STEPS, adamw))
    diloco = run_world(3, lambda comm: train(DiLoCo(4, SGD(0.8)), comm, STEPS, adamw))
    for a, b in zip(gossip, diloco, strict=True):
        assert all(map(close, a, b))


def test_on_the_same_data_it_is_diloco_with_nesterov_momentum():
    """x - x of the last round before momentum is -lr times torch's buffer, so replicas that agree do as DiLoCo's."""
    algorithm = GASLoC(3, 0.7, momentum=0.9, gossip=0.3)
    gossip = run_world(4, lambda comm: train(algorithm, comm, STEPS, adamw, data_rank=0))
    diloco = run_world(4, lambda comm: train(DiLoCo(3, Nesterov(0.7, 0.9)), comm, STEPS, adamw, data_rank=0))
    for a, b in zip(gossip, diloco, strict=True):
        assert all(map(close, a, b))


def drifting(algorithm, drift):
    """A program: parameters after each round in which a replica's inner steps do what ``drift`` says."""

    def program(comm):
        engine = make_engine()
        state, found = algorithm.init(engine, comm), []
        for t in range(1, 10):
            with torch.no_grad():
                for p in engine.slots()["param"]:
                    p.add_(drift(comm.rank, t, p))
            algorithm.after_update(t, engine, state, comm)
            found.append(flat(engine.slots()["param"]))
        return torch.stack(found)

    return program


DRIFTS = {
    "given": lambda rank, t, p: torch.full_like(p, math.sin((rank + 1) * t)),
    "linear": lambda rank, t, p: 0.3 * (rank - p),  # the steps of quadratics with one curvature
}


@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize(("num", "size"), [(4, 2), (5, 2), (7, 3), (4, None)])
def test_the_mean_over_replicas_is_dilocos_anchor_whoever_met(num, size, drift):
    """Where inner steps answer linearly, so that their mean is that of the mean replica."""
    for seed in (0, 1):
        algorithm = GASLoC(1, 0.7, 0.9, 0.3, size, seed=seed)
        gossip = torch.stack(run_world(num, drifting(algorithm, DRIFTS[drift])))
        diloco = run_world(num, drifting(DiLoCo(1, Nesterov(0.7, 0.9)), DRIFTS[drift]))
        assert close(gossip.mean(0), diloco[0])
        assert not close(gossip[0], gossip[1], 1e-3), "replicas differ, in one group of all too: momentum is their own"


def test_traffic_is_the_closed_form():
    def program(comm):
        metered = MeteredComm(comm, Meter())
        engine, algorithm = make_engine(), GASLoC(2, group_size=3)
        state = algorithm.init(engine, metered)
        for t in range(1, 7):
            step(algorithm, t, engine, state, metered, make_batch(comm.rank, t))
        return metered.meter.bytes_sent, metered.meter.bytes_received, num_bytes(state.anchor)

    for sent, received, size_bytes in run_world(6, program):
        assert sent == received == 3 * 2 * size_bytes


@pytest.mark.parametrize("finalize", ["average", "pick", "ensemble"])
def test_what_a_run_leaves_behind(finalize):
    def program(comm):
        engine, algorithm = make_engine(adamw), GASLoC(5, finalize=finalize)
        state = algorithm.init(engine, comm)
        for t in range(1, 11):
            step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
        before = flat(algorithm.consensus(engine, state))
        algorithm.finish(10, engine, state, comm)
        assert torch.equal(flat(algorithm.consensus(engine, state)), flat(engine.slots()["param"]))
        return before, flat(engine.slots()["param"]), disagreement(state.anchor, comm)

    found = run_world(4, program)
    points = [x[0] for x in found]
    wanted = {"average": [torch.stack(points).mean(0)] * 4, "pick": [points[0]] * 4, "ensemble": points}[finalize]
    assert all(close(end, expected) for (_, end, _), expected in zip(found, wanted, strict=True))
    assert (found[0][2] > 1e-3) == (finalize == "ensemble")


def test_zero_local_steps_change_nothing_in_bf16():
    def idle(comm):
        engine, algorithm = make_engine(dtype=torch.bfloat16), GASLoC(1)
        state = algorithm.init(engine, comm)
        with torch.no_grad():
            for xs in zip(state.anchor, state.proposed, engine.slots()["param"], strict=True):
                xs[0].mul_(1 + 2**-12)
                for x in xs[1:]:
                    x.copy_(xs[0])
        before = flat(state.anchor)
        for t in range(1, 5):
            algorithm.after_update(t, engine, state, comm)
        return before, flat(state.anchor)

    for before, after in run_world(4, idle):
        assert before.dtype == torch.float32 and torch.equal(before, after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0"),
        ({"lr": 0.0}, r"lr=0.0\): it must be positive"),
        ({"momentum": 1.0}, "at least 0 and below 1"),
        ({"gossip": 0.0}, "it must be positive"),
        ({"group_size": 1}, "at least 2 members"),
        ({"finalize": "best"}, "choose 'average'"),
        ({"gossip": 3.1, "group_size": None}, r"gossip=3.1\) with momentum 0.5 in one group of all: .* = 3, .* k = 1;"),
        ({"gossip": 2.0, "momentum": 0.0, "group_size": None}, "between 0 and .* = 2, "),
        ({"momentum": 0.9}, r"gossip=1\) with momentum 0.9 in groups of 2: .* = 0.38, .*; lower gossip or momentum"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        GASLoC(**options)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_one_group_of_all_is_allowed_up_to_where_replicas_part(momentum):
    """Each replica's deviation is its own, also there; it contracts just within what is allowed."""
    limit = 2 * (1 + momentum)
    with pytest.raises(ValueError, match="in one group of all"):
        GASLoC(1, gossip=1.001 * limit, momentum=momentum, group_size=None)
    algorithm = GASLoC(1, gossip=0.98 * limit, momentum=momentum, group_size=None)

    def program(comm):
        engine = make_engine()
        state, found = algorithm.init(engine, comm), []
        for t in range(1, 401):
            if t == 1:  # the only one in which inner steps do something
                with torch.no_grad():
                    for p in engine.slots()["param"]:
                        p.add_(comm.rank)
            algorithm.after_update(t, engine, state, comm)
            found.append(flat(state.anchor))
        return found

    a, b = run_world(2, program)
    assert (a[-1] - b[-1]).abs().max() < 1e-3 * (a[0] - b[0]).abs().max()


def test_alone():
    assert train(GASLoC(4), SoloComm(), STEPS)[-1].isfinite().all()
    nesterov = train(DiLoCo(4, Nesterov(0.7, 0.5)), SoloComm(), STEPS)
    assert all(map(close, train(GASLoC(4), SoloComm(), STEPS), nesterov))
