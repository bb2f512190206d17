"""The same program in two worlds: the simulator, and gloo processes under torchrun."""

import pytest
import torch

from tests.algorithms import inner_of
from tests.replicas import train
from tests.same_code.cases import CASES, STEPS
from tests.torchrun import torchrun
from tests.world import run_world


@pytest.fixture(scope="module", params=[2, 4])
def gloo(request, tmp_path_factory):
    """Every rank's traces, by rank."""
    out = tmp_path_factory.mktemp(f"gloo{request.param}")
    torchrun(request.param, "tests/same_code/program.py", str(out))
    return [torch.load(out / f"rank{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("name", CASES)
def test_gloo_computes_what_the_simulator_does(gloo, name):
    """Bit for bit where sums have two terms or are gathered; else the order of summation may differ."""
    n = len(gloo)
    simulated = run_world(n, lambda comm: train(CASES[name], comm, STEPS, inner_of(CASES[name])))
    exact = n == 2 or "cast" in name
    for rank in range(n):
        for got, expected in zip(gloo[rank][name], simulated[rank], strict=True):
            assert torch.equal(got, expected) if exact else torch.allclose(got, expected, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(gloo[0][name][-1], trace[name][-1]) for trace in gloo)
