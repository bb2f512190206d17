"""NoLoCo against explicit replicas, its two paths, its sign, and what a run leaves."""

import copy
import math
from functools import partial

import pytest
import torch

from lowcomm.algorithms.base import step
from lowcomm.algorithms.noloco import NoLoCo, outer_step
from lowcomm.comm.solo import SoloComm
from lowcomm.compress.quantized import Quantized
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.reduce import Reducer
from lowcomm.rounds.gossip import disagreement, groups
from tests.replicas import adamw, flat, make_batch, make_engine, make_model, mse, sgd, step_all, train, train_on
from tests.world import run_world

STEPS = 12


def close(a, b, atol=1e-12):
    return torch.allclose(a, b, rtol=0, atol=atol)


def reference(num, every, inner, alpha, beta, gamma, size, num_steps=STEPS, stop=None):
    """Explicit replicas, one line of the method a line. Returns each replica's parameters by step.

    After step ``stop`` the run ends with a partial round, and then goes on.
    """
    models = [make_model() for _ in range(num)]
    optimizers = [inner(list(m.parameters())) for m in models]
    phi = [flat(list(m.parameters())) for m in models]
    d = [torch.zeros_like(x) for x in phi]
    trace, round = [[] for _ in models], 0
    for t in range(1, num_steps + 1):
        step_all(models, optimizers, t)
        if t % every == 0 or t == stop:
            round += 1
            theta = [flat(list(m.parameters())) for m in models]
            for group in groups(range(num), size, 0, round):
                delta_bar = sum(theta[i] - phi[i] for i in group) / len(group)
                phi_bar = sum(phi[i] for i in group) / len(group)
                for i in group:
                    d[i] = alpha * d[i] + beta * delta_bar + gamma * (phi_bar - phi[i])
                for i in group:
                    phi[i] = phi[i] + d[i]
            for x, m in zip(phi, models, strict=True):
                torch.nn.utils.vector_to_parameters(x.clone(), m.parameters())
        for rank, m in enumerate(models):
            trace[rank].append(flat(list(m.parameters())))
    return trace


@pytest.mark.parametrize("inner", [sgd, adamw])
@pytest.mark.parametrize(("num", "size"), [(4, 2), (5, 2), (6, 4), (4, None), (1, 2), (2, 2)])
@pytest.mark.parametrize("gamma", [None, 0.4, 0.7])
def test_noloco_is_the_reference(inner, num, size, gamma):
    """Odd numbers and groups that do not come out even, too; and both paths for gamma = beta."""
    expected = reference(num, 3, inner, 0.5, 0.7, 0.7 if gamma is None else gamma, size)
    algorithm = NoLoCo(every=3, alpha=0.5, beta=0.7, gamma=gamma, group_size=size)
    got = run_world(num, lambda comm: train(algorithm, comm, STEPS, inner))
    for rank in range(num):
        for t in range(STEPS):
            assert close(got[rank][t], expected[rank][t]), f"rank {rank}, step {t + 1}"
    mean = torch.stack([trace[-1] for trace in expected]).mean(0)
    assert all(close(trace[-1], mean) for trace in got), "the end is the average of all anchors"


class Scripted:
    """Parameters and drifts that float64 adds without rounding."""

    def __init__(self, comm, dtype=torch.float64):
        self.comm = comm
        model = torch.nn.Linear(4, 2, bias=False, dtype=dtype)
        with torch.no_grad():
            model.weight.copy_(torch.arange(8.0).view(2, 4) / 8)
        self.engine = TorchEngine(model, torch.optim.SGD(model.parameters(), lr=0.125), loss=mse, clip_norm=None)

    def run(self, algorithm, num_rounds, drift):
        """Anchors after each round."""
        engine, comm = self.engine, self.comm
        state, found = algorithm.init(engine, comm), []
        for t in range(1, num_rounds + 1):
            with torch.no_grad():
                for p in engine.slots()["param"]:
                    p.add_(drift(comm.rank, t, p))
            algorithm.after_update(t, engine, state, comm)
            found.append(flat(state.anchor))
        return found


def test_the_fast_path_is_bit_for_bit_the_two_tensor_path_where_nothing_rounds():
    """With eighths that is the case for some rounds; after that they agree to rounding."""

    def drift(rank, t, p):
        return torch.full_like(p, float((3 * rank + 5 * t) % 7 - 3) / 8)

    def program(gamma, beta):
        return lambda comm: Scripted(comm).run(NoLoCo(1, 0.5, beta, gamma), 12, drift)

    fast, two = run_world(4, program(None, 0.75)), run_world(4, program(0.75, 0.75))
    for a, b in zip(fast, two, strict=True):
        assert all(map(torch.equal, a, b))
    assert not torch.equal(fast[0][-1], fast[1][-1]), "replicas differ"
    fast, two = run_world(4, program(None, 0.7)), run_world(4, program(0.7, 0.7))
    for a, b in zip(fast, two, strict=True):
        assert all(map(close, a, b))


def test_the_sign_is_that_of_the_code():
    """On f(x) = |x - 1|^2 / 2 with three SGD steps a round; the sign of the paper's equation 2 runs away."""

    def ends(sign):
        x, d = torch.full((8, 3), 5.0, dtype=torch.float64), torch.zeros(8, 3, dtype=torch.float64)
        for round in range(1, 61):
            delta = (x - 1) * (0.9**3 - 1)
            parts = torch.tensor(groups(range(8), 2, 0, round))
            mean_delta, mean_x = torch.empty_like(x), torch.empty_like(x)
            for means, values in ((mean_delta, delta), (mean_x, x)):
                means[parts] = values[parts].mean(1, keepdim=True).expand(-1, 2, -1)
            outer_step([x], [d], 0.5, [(sign * 0.7, [mean_delta]), (0.7, [mean_x - x])])
        return (x - 1).abs().max()

    assert ends(1.0) < 1e-2
    assert ends(-1.0) > 1e3

    def program(comm):
        script = Scripted(comm)
        return script.run(NoLoCo(1), 60, lambda rank, t, p: (1 + rank - p) * (1 - 0.9**3))[-1]

    mean = torch.stack(run_world(4, program)).mean(0)
    assert close(mean, torch.full_like(mean, 2.5), 1e-2), "towards the mean of the replicas' optima"


@pytest.mark.parametrize("gamma", [None, 0.2])
def test_one_group_of_all_is_diloco_with_heavy_ball_momentum(gamma):
    """The anchors of all replicas are one, which moves by b <- alpha b + beta mean delta."""
    num, every, alpha, beta = 3, 4, 0.9, 0.7
    models = [make_model() for _ in range(num)]
    optimizers = [adamw(list(m.parameters())) for m in models]
    anchor, buffer = flat(list(models[0].parameters())), 0.0
    algorithm = NoLoCo(every, alpha, beta, gamma, group_size=None)
    got = run_world(num, lambda comm: train(algorithm, comm, STEPS, adamw))
    for t in range(1, STEPS + 1):
        step_all(models, optimizers, t)
        if t % every == 0:
            buffer = alpha * buffer + beta * sum(flat(list(m.parameters())) - anchor for m in models) / num
            anchor = anchor + buffer
            for m in models:
                torch.nn.utils.vector_to_parameters(anchor.clone(), m.parameters())
            assert all(torch.equal(got[0][t - 1], trace[t - 1]) for trace in got)
        for rank, m in enumerate(models):
            assert close(got[rank][t - 1], flat(list(m.parameters())))


@pytest.mark.parametrize(("num", "size"), [(4, 2), (5, 2), (7, 3)])
@pytest.mark.parametrize("gamma", [None, 0.3])
def test_the_mean_over_replicas_does_not_depend_on_who_met_whom(num, size, gamma):
    """Drifts that do not depend on where a replica is: then the mean is plain momentum on their mean, odd or even."""

    def drift(rank, t, p):
        return torch.full_like(p, math.sin((rank + 1) * t))

    traces = []
    for seed in (0, 1):
        algorithm = NoLoCo(1, 0.5, 0.7, gamma, size, seed=seed)
        found = run_world(num, lambda comm, a=algorithm: Scripted(comm).run(a, 9, drift))
        traces.append(torch.stack([torch.stack(x) for x in found]))
    assert not close(traces[0], traces[1], 1e-3), "the groups matter to each replica"
    anchor, buffer = torch.arange(8.0, dtype=torch.float64) / 8, 0.0
    for t in range(1, 10):
        buffer = 0.5 * buffer + 0.7 * sum(math.sin((rank + 1) * t) for rank in range(num)) / num
        anchor = anchor + buffer
        for trace in traces:
            assert close(trace[:, t - 1].mean(0), anchor)


def test_who_is_alone_steps_with_its_own():
    num, alone = 3, []
    for round in range(1, 6):
        alone += [part[0] for part in groups(range(num), 2, 0, round) if len(part) == 1]
    traces = {}
    for gamma in (None, 0.7):
        algorithm = NoLoCo(1, 0.0, 0.7, gamma)
        program = lambda comm, a=algorithm: Scripted(comm).run(a, 5, lambda rank, t, p: torch.full_like(p, 1 + rank))  # noqa: E731
        traces[gamma] = run_world(num, program)
    for round, rank in enumerate(alone[1:], 1):  # without momentum, its anchor moves by beta times its own drift
        moved = traces[None][rank][round] - traces[None][rank][round - 1]
        assert close(moved, torch.full_like(moved, 0.7 * (1 + rank)))
    assert all(close(a, b) for rank in range(num) for a, b in zip(traces[None][rank], traces[0.7][rank], strict=True))


def test_an_ensemble_goes_on_after_a_partial_last_round():
    """As if that had been any round; with the pull, for which anchors were not sent ahead."""
    expected = reference(4, 3, adamw, 0.5, 0.7, 0.4, 2, stop=8)

    def program(comm):
        return train_on(NoLoCo(3, gamma=0.4, finalize="ensemble"), comm, 8, STEPS, adamw)[0]

    for got, wanted in zip(run_world(4, program), expected, strict=True):
        assert all(map(close, got, wanted))


def test_a_run_that_ended_with_a_full_round_goes_on_from_the_average():
    """No round uses the anchors that were sent ahead before the end; by one tensor none are."""

    def program(comm, gamma):
        _, state = train_on(NoLoCo(3, gamma=gamma), comm, 6, STEPS, adamw)
        return flat(state.anchor)

    one, two = (run_world(6, partial(program, gamma=gamma)) for gamma in (None, 0.7))
    assert all(map(close, one, two))


@pytest.mark.parametrize("finalize", ["average", "pick", "ensemble"])
@pytest.mark.parametrize("gamma", [None, 0.5])
def test_what_a_run_leaves_behind(finalize, gamma):
    def program(comm):
        engine, algorithm = make_engine(adamw), NoLoCo(5, gamma=gamma, finalize=finalize)
        state = algorithm.init(engine, comm)
        for t in range(1, 10 + 1):
            step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
        before = flat(state.anchor)
        assert torch.equal(flat(algorithm.consensus(engine, state)), before)
        apart = disagreement(state.anchor, comm)
        algorithm.finish(10, engine, state, comm)
        assert torch.equal(flat(engine.slots()["param"]), flat(state.anchor))
        return before, flat(algorithm.consensus(engine, state)), apart, disagreement(state.anchor, comm)

    found = run_world(4, program)
    anchors, ends = [x[0] for x in found], [x[1] for x in found]
    wanted = {"average": [torch.stack(anchors).mean(0)] * 4, "pick": [anchors[0]] * 4, "ensemble": anchors}[finalize]
    assert all(map(close, ends, wanted))
    assert found[0][2] > 1e-3
    assert (found[0][3] > 1e-3) == (finalize == "ensemble")


@pytest.mark.parametrize("gamma", [None, 0.5])
def test_zero_local_steps_change_nothing_in_bf16(gamma):
    """Anchors between the values that bfloat16 has are not dragged onto its grid."""

    def idle(comm):
        engine, algorithm = make_engine(dtype=torch.bfloat16), NoLoCo(1, gamma=gamma)
        state = algorithm.init(engine, comm)
        with torch.no_grad():
            for a, p in zip(state.anchor, engine.slots()["param"], strict=True):
                a.mul_(1 + 2**-12)
                p.copy_(a)
        assert all(a.dtype == torch.float32 for a in state.anchor + state.momentum)
        before = copy.deepcopy([state.anchor, engine.slots()["param"]])
        for t in range(1, 5):
            algorithm.after_update(t, engine, state, comm)
        return before, [state.anchor, engine.slots()["param"]]

    for before, after in run_world(4, idle):
        for xs, ys in zip(before, after, strict=True):
            assert all(map(torch.equal, xs, ys))


def test_rounding_deltas_hurts_less_than_rounding_parameters():
    """Why the two-tensor path is for lossy reducers."""
    lossy = Reducer(Quantized())

    def distance(algorithm):
        exact = run_world(4, lambda comm: train(NoLoCo(4), comm, STEPS, adamw))
        rounded = run_world(4, lambda comm: train(algorithm, comm, STEPS, adamw))
        return (rounded[0][-1] - exact[0][-1]).norm()

    assert 3 * distance(NoLoCo(4, gamma=0.7, reducer=lossy)) < distance(NoLoCo(4, reducer=lossy))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0; a round needs at least 1"),
        ({"alpha": 1.0}, r"alpha=1.0\): it must be at least 0 and below 1"),
        ({"beta": 0.0}, r"beta=0.0\): it must be positive"),
        ({"group_size": 1}, "at least 2 members; None: all replicas"),
        ({"finalize": "best"}, "choose 'average', 'pick' or 'ensemble'"),
        ({"gamma": float("nan")}, "it must be finite"),
        ({"gamma": 1.5}, r"gamma=1.5\) with momentum 0.5 in groups of 2: .* 2 \(1 - a\^2\) .* = 1.5, with .* k = 1/2"),
        ({"gamma": 0.0}, "only for a pull between 0 and"),
        ({"gamma": 0.69, "alpha": 0.9, "group_size": 4}, "= 0.6909"),
        (
            {"alpha": 0.9},
            r"gamma=None\), which is beta = 0.7, with momentum 0.9 .* = 0.38, .* lower gamma, or lower alpha",
        ),
    ],
)
def test_bad_values(options, message):
    if options.get("gamma") == 0.69:  # just allowed
        NoLoCo(**options)
        options = options | {"gamma": 0.7}
    with pytest.raises(ValueError, match=message):
        NoLoCo(**options)


def test_alone_and_published_values():
    assert NoLoCo() == NoLoCo(every=50, alpha=0.5, beta=0.7, gamma=None, group_size=2)
    NoLoCo(alpha=0.9, group_size=None)  # one group of all has no partners to drift from
    NoLoCo(gamma=0.0, group_size=None)
    assert train(NoLoCo(4), SoloComm(), STEPS)[-1].isfinite().all()
