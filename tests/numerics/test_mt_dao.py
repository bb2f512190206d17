"""MT-DAO, the recipe: QHADOPT in every replica and plain means of all that it keeps, against both written out."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lowcomm.algorithms.base import step
from lowcomm.algorithms.des_loc import DESLOC
from lowcomm.cli import parse_run
from lowcomm.comm.solo import SoloComm
from lowcomm.optim.qhadopt import QHADOPT
from lowcomm.outer.sgd import SGD
from lowcomm.predict import predict
from lowcomm.reduce import Reducer
from lowcomm.tensors import rng
from tests.replicas import flat, make_batch, make_engine, make_model, mse
from tests.world import run_world

N, STEPS, EVERY = 3, 13, 4
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def gradient(x, rank, t):
    """Of the small model at parameters ``x``, on a replica's batch of step t."""
    model = make_model()
    torch.nn.utils.vector_to_parameters(torch.from_numpy(x), model.parameters())
    return flat(list(torch.autograd.grad(mse(model, make_batch(rank, t)), list(model.parameters())))).numpy()


@pytest.mark.parametrize(
    ("betas", "omegas"), [((0.99, 0.95), (0.9,)), ((0.9, 0.99, 0.95), (0.3, 0.5))], ids=["one momentum", "two momenta"]
)
def test_it_is_the_reference(betas, omegas):
    lr, (*momentum_betas, beta_v) = 0.02, betas
    xs = [flat(list(make_model().parameters())).numpy() for _ in range(N)]
    us = [[np.zeros_like(x) for _ in omegas] for x in xs]
    vs = [np.zeros_like(x) for x in xs]
    expected = []
    for t in range(1, STEPS + 1):
        for i in range(N):
            g, k = gradient(xs[i], i, t), t - 1
            if k == 0:
                vs[i] = g * g
                continue
            n = np.clip(g / np.maximum(np.sqrt(vs[i]), 1e-6), -(k**0.25), k**0.25)
            us[i] = [beta * u + (1 - beta) * n for beta, u in zip(momentum_betas, us[i], strict=True)]
            xs[i] = xs[i] - lr * ((1 - sum(omegas)) * n + sum(w * u for w, u in zip(omegas, us[i], strict=True)))
            vs[i] = beta_v * vs[i] + (1 - beta_v) * g * g
        if t % EVERY == 0:
            xs = [sum(xs) / N] * N
            us = [[sum(u) / N for u in zip(*us, strict=True)]] * N
            vs = [sum(vs) / N] * N
        expected.append([np.concatenate([xs[i], *us[i], vs[i]]) for i in range(N)])

    names = ["param", *["exp_avg", "exp_avg_2"][: len(omegas)], "exp_avg_sq"]
    algorithm = DESLOC(dict.fromkeys(names, EVERY))

    def program(comm):
        engine = make_engine(lambda params: QHADOPT(params, lr=lr, betas=betas, omega=omegas))
        state = algorithm.init(engine, comm)
        seen = []
        for t in range(1, STEPS + 1):
            step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
            seen.append(torch.cat([flat(engine.slots()[name]) for name in names]))
        return seen

    for rank, trace in enumerate(run_world(N, program)):
        for t, got in enumerate(trace):
            np.testing.assert_allclose(got.numpy(), expected[t][rank], rtol=0, atol=1e-12, err_msg=f"{rank}, {t + 1}")


@pytest.mark.parametrize(("beta", "left"), [(0.9, 0.034), (0.999, 0.969)])
def test_what_a_round_leaves_of_the_common_momentum(beta, left):
    """The reason for a slow one: of the average, beta^K is there after K steps, on every replica."""
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = QHADOPT(model.parameters(), lr=0.0, betas=(beta, 0.9999), omega=0.9)
    model.weight.grad = torch.ones(1, 1)
    for _ in range(2):
        optimizer.step()
    common = optimizer.state[model.weight]["exp_avg"].clone()
    model.weight.grad = torch.zeros(1, 1)
    for _ in range(32):
        optimizer.step()
    assert float(optimizer.state[model.weight]["exp_avg"] / common) == pytest.approx(beta**32, rel=1e-4)
    assert beta**32 == pytest.approx(left, abs=1e-3)


def test_what_replicas_drift_apart_in_a_round():
    """A local momentum's variance K steps after an average, of gradients that are noise: (1 - b)/(1 + b) (1 - b^2K)."""
    num, every, beta = 20_000, 32, 0.99
    weight = torch.nn.Parameter(torch.zeros(num, dtype=torch.float64))
    optimizer = QHADOPT([weight], lr=0.0, betas=(beta, 0.0), omega=1.0, eps=1.0)
    generator = rng(0, "noise")
    for t in range(every + 1):
        weight.grad = 0.1 * (1 - 2.0 * torch.randint(2, (num,), generator=generator, dtype=torch.float64))
        optimizer.step()  # the first sets the second moment alone; eps divides, so a gradient is its own normal form
        assert t > 0 or not optimizer.state[weight]["exp_avg"].any()
    variance = float(optimizer.state[weight]["exp_avg"].var()) / 0.01
    assert variance == pytest.approx((1 - beta) / (1 + beta) * (1 - beta ** (2 * every)), rel=0.05)


def test_the_config_is_the_recipe():
    run, _ = parse_run(["--config", str(CONFIGS / "mt_dao.yaml")])
    assert run.algorithm == DESLOC({"param": 32, "exp_avg": 32, "exp_avg_sq": 32}, SGD(1.0), Reducer())
    optimizer = run.optimizer.build([torch.nn.Parameter(torch.ones(1))])
    assert isinstance(optimizer, QHADOPT)
    assert optimizer.param_groups[0]["betas"] == (0.999, 0.9999) and optimizer.param_groups[0]["omega"] == 0.9


@pytest.mark.parametrize(("name", "factor"), [("mt_dao", 3 / 32), ("des_loc", 1.5 / 32)])
def test_traffic_of_the_configs_is_that_of_the_papers(name, factor):
    """In terms of data parallel's: 3 / 32, a tenth; and with periods K, 3 K and 6 K half of that."""
    run, _ = parse_run(["--config", str(CONFIGS / f"{name}.yaml"), "--num_steps", "384"])
    seen = predict(run, 4, run.data.tokenizer.vocab_size)
    assert seen.step_bytes == pytest.approx(factor * 2 * 3 / 4 * 4 * seen.num_parameters, rel=1e-5)
    assert seen.num_rounds == 384 / 32


def test_alone_it_is_its_optimizer():
    engines = [make_engine(lambda params: QHADOPT(params, lr=0.02)) for _ in range(2)]
    algorithm, comm = DESLOC(dict.fromkeys(("param", "exp_avg", "exp_avg_sq"), 2)), SoloComm()
    state = algorithm.init(engines[0], comm)
    for t in range(1, 9):
        for engine in engines:
            engine.backward(make_batch(0, t))
            engine.update()
        algorithm.after_update(t, engines[0], state, comm)
        for name in ("exp_avg", "exp_avg_sq"):
            assert all(torch.equal(a, b) for a, b in zip(*(e.slots()[name] for e in engines), strict=True))
        assert torch.allclose(*(flat(e.slots()["param"]) for e in engines), rtol=0, atol=1e-15)
