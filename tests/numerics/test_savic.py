"""SAVIC against explicit replicas, and what it promises."""

import copy

import pytest
import torch

from lowcomm.algorithms.base import step
from lowcomm.algorithms.local_sgd import LocalSGD
from lowcomm.algorithms.savic import SAVIC
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.comm.solo import SoloComm
from lowcomm.compress.cast import Cast
from lowcomm.config import Optimizer, Run
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.models.llama import Llama
from lowcomm.optim.scaled_sgd import ScaledSGD
from lowcomm.reduce import Reducer
from lowcomm.rounds.qsr import QSR
from lowcomm.sim.record.timing import TimingEngine, shapes_of
from tests.replicas import adamw, flat, make_batch, make_engine, make_model, mse, scaled_sgd, train
from tests.world import run_world

N, STEPS, LR, DECAY = 3, 12, 0.05, 0.1


def close(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-12)


def reference(every, alpha, beta, bias_correction, batches=None):
    """Explicit replicas in one list, one line of the equations a line. Returns each one's parameters by step."""
    batches = batches or [lambda t, rank=rank: make_batch(rank, t) for rank in range(N)]
    models = [make_model() for _ in batches]
    d_squared, d_hat, num_rounds = 0.0, torch.ones(41, dtype=torch.float64), 0
    trace = [[] for _ in models]
    for t in range(1, STEPS + 1):
        gradients = []
        for model, batch in zip(models, batches, strict=True):
            gradient = torch.autograd.grad(mse(model, batch(t)), list(model.parameters()))
            gradients.append(torch.cat([g.reshape(-1) for g in gradient]))
        xs = [flat(list(m.parameters())) for m in models]
        xs = [(1 - LR * DECAY) * x - LR * g / d_hat for x, g in zip(xs, gradients, strict=True)]
        if t % every == 0:
            num_rounds += 1
            xs = [sum(xs) / len(xs)] * len(xs)
            h = sum(gradients) / len(gradients)
            d_squared = beta * d_squared + (1 - beta) * h**2
            d = torch.sqrt(d_squared / (1 - beta**num_rounds) if bias_correction else d_squared)
            d_hat = torch.maximum(d, torch.full_like(d, alpha))
        for seen, model, x in zip(trace, models, xs, strict=True):
            torch.nn.utils.vector_to_parameters(x.clone(), model.parameters())
            seen.append(x)
    return trace


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("every", [1, 4])
def test_savic_is_the_reference(every, beta, bias_correction):
    algorithm = SAVIC(every, alpha=0.05, beta=beta, bias_correction=bias_correction)
    expected = reference(every, 0.05, beta, bias_correction)
    got = run_world(N, lambda comm: train(algorithm, comm, STEPS, scaled_sgd))
    for rank in range(N):
        for t in range(STEPS):
            assert close(got[rank][t], expected[rank][t]), f"rank {rank}, step {t + 1}"


def test_a_round_of_one_step_is_one_replica_with_all_the_data():
    """In one metric the mean of the steps is the step of the mean: what Local Adam lacks."""

    def together(t):
        parts = [make_batch(rank, t) for rank in range(N)]
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    (expected,) = reference(1, 0.05, 0.9, True, [together])
    got = run_world(N, lambda comm: train(SAVIC(1, alpha=0.05, beta=0.9), comm, STEPS, scaled_sgd))
    for rank in range(N):
        assert all(close(a, b) for a, b in zip(got[rank], expected, strict=False))


def test_an_alpha_above_all_gradients_is_local_sgd():
    def scaled_by_alpha(params):
        return ScaledSGD(params, lr=LR, scale=100.0)

    savic = run_world(N, lambda comm: train(SAVIC(4, alpha=100.0), comm, STEPS, scaled_by_alpha))
    local = run_world(N, lambda comm: train(LocalSGD(4), comm, STEPS, lambda ps: torch.optim.SGD(ps, lr=LR / 100)))
    for a, b in zip(savic, local, strict=True):
        assert all(close(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("k", [2, 4])
def test_k_identical_replicas_are_one(k):
    algorithm = SAVIC(4, alpha=0.05)
    alone = train(algorithm, SoloComm(), STEPS, scaled_sgd, data_rank=0)
    for got in run_world(k, lambda comm: train(algorithm, comm, STEPS, scaled_sgd, data_rank=0)):
        assert all(torch.equal(a, b) for a, b in zip(alone, got, strict=True))


@pytest.mark.parametrize("reducer", [Reducer(), Reducer(Cast(), bucket_bytes=64)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_scaling_is_the_same_everywhere_and_changes_at_syncs_only(reducer, dtype):
    def program(comm):
        engine, algorithm = make_engine(scaled_sgd, dtype), SAVIC(3, 0.01, reducer=reducer, gradient_reducer=reducer)
        state = algorithm.init(engine, comm)
        seen = [flat(engine.slots()["scale"])]
        for t in range(1, STEPS + 1):
            engine.backward(make_batch(comm.rank, t, dtype))
            gradients = flat(engine.slots()["grad"])
            algorithm.before_update(t, engine, state, comm)
            assert torch.equal(gradients, flat(engine.slots()["grad"])), "local steps take local gradients"
            engine.update()
            algorithm.after_update(t, engine, state, comm)
            seen.append(flat(engine.slots()["scale"]))
        return seen

    traces = run_world(4, program)
    for trace in traces:
        for t in range(STEPS + 1):
            assert torch.equal(trace[t], traces[0][t]) and (trace[t] >= 0.01).all()
            assert trace[t].dtype == torch.promote_types(dtype, torch.float32)
            assert t == 0 or torch.equal(trace[t], trace[t - 1]) == (t % 3 != 0)


def test_the_mean_of_gradients_in_bfloat16_is_not_rounded():
    def program(comm):
        engine, algorithm = make_engine(scaled_sgd, torch.bfloat16), SAVIC(1, alpha=1e-9, beta=0.0)
        state = algorithm.init(engine, comm)
        engine.backward(make_batch(comm.rank, 1, torch.bfloat16))
        mine = flat(engine.slots()["grad"]).float()
        algorithm.before_update(1, engine, state, comm)
        engine.update()
        algorithm.after_update(1, engine, state, comm)
        return mine, flat(engine.slots()["scale"])

    (one, scale), (other, _) = run_world(2, program)
    assert torch.allclose(scale, (one + other).abs() / 2, rtol=1e-6, atol=1e-9)


def test_gradients_are_measured_before_they_are_clipped():
    model = make_model()
    engine = TorchEngine(model, scaled_sgd(list(model.parameters())), loss=mse, clip_norm=1e-3)
    algorithm = SAVIC(1, alpha=1e-6)
    state = algorithm.init(engine, SoloComm())
    engine.backward(make_batch(0, 1))
    expected = flat(engine.slots()["grad"]).abs().clamp(min=1e-6)
    algorithm.before_update(1, engine, state, SoloComm())
    engine.update()
    algorithm.after_update(1, engine, state, SoloComm())
    assert close(flat(engine.slots()["scale"]), expected)


def test_traffic_is_two_vectors_a_round():
    def traffic(comm):
        metered = MeteredComm(comm, Meter())
        train(SAVIC(5, alpha=0.05), metered, STEPS, scaled_sgd)
        return metered.meter.bytes_sent

    # two full rounds, and the parameters alone after the last two steps: 41 numbers of 8 bytes each time
    assert run_world(4, traffic) == [(2 * 2 + 1) * 2 * 3 / 4 * 41 * 8] * 4


def test_it_runs_on_shapes_alone():
    run = Run(
        Llama(size="500k"),
        algorithm=SAVIC(),
        optimizer=Optimizer("lowcomm.optim.scaled_sgd.ScaledSGD", {"lr": 1e-3}),
        num_steps=100,
    )
    engine, comm = TimingEngine(shapes_of(run, 1)), SoloComm()
    state = run.algorithm.init(engine, comm)
    for t in range(1, 33):
        step(run.algorithm, t, engine, state, comm, None)
    assert run.algorithm.num_rounds(state) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"beta": 1.0}, "beta=1.0"),
        ({"every": 0}, "every is 0"),
        ({"every": QSR()}, "rounds have one length"),
    ],
)
def test_mistakes_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        SAVIC(**options)


def test_an_optimizer_without_a_scaling_is_refused_at_once():
    with pytest.raises(ValueError, match="ScaledSGD"):
        SAVIC().init(make_engine(adamw), SoloComm())


def test_scaled_sgd_divides_by_its_scale_and_keeps_it():
    params = [torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=dtype)) for dtype in (torch.float64, torch.bfloat16)]
    optimizer = ScaledSGD(params, lr=0.5, weight_decay=0.25, scale=2.0)
    params[0].grad = torch.tensor([4.0, -8.0], dtype=torch.float64)
    optimizer.step()
    assert params[0].tolist() == [0.875 - 1.0, 1.75 + 2.0]
    assert params[1].tolist() == [1.0, 2.0], "without a gradient it stays"
    assert [optimizer.state[p]["scale"].dtype for p in params] == [torch.float64, torch.float32]
    saved = copy.deepcopy(optimizer.state_dict())
    other = ScaledSGD(params, lr=0.1)
    other.load_state_dict(saved)
    assert other.state[params[0]]["scale"].tolist() == [2.0, 2.0]


def test_each_group_of_scaled_sgd_has_its_own_scale_also_one_that_comes_later():
    a, b, c = params = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
    optimizer = ScaledSGD([{"params": [a]}, {"params": [b], "scale": 4.0}], lr=1.0, scale=2.0)
    optimizer.add_param_group({"params": [c], "scale": 8.0})
    for p in params:
        p.grad = torch.ones(1)
    optimizer.step()
    assert torch.cat(params).tolist() == [0.5, 0.75, 0.875]


def test_scaled_sgd_takes_a_closure_that_computes_the_gradients():
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    assert ScaledSGD([p], lr=0.5, scale=2.0).step(closure) == 5.0
    assert p.tolist() == [0.5, 1.0]


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"weight_decay": -0.1}, {"scale": 0.0}, {"scale": float("inf")}])
def test_scaled_sgd_refuses_what_makes_no_sense(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ScaledSGD([torch.nn.Parameter(torch.ones(2))], **options)
