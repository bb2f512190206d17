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


@pytest.mark.parametrize(("k", "algorithm"), enumerate(CASES), ids=str)
def test_gloo_computes_what_the_simulator_does(gloo, k, algorithm):
    """Bit for bit where sums have two terms; else the order of summation may differ."""
    n = len(gloo)
    simulated = run_world(n, lambda comm: train(algorithm, comm, STEPS, inner_of(algorithm)))
    for rank in range(n):
        for got, expected in zip(gloo[rank][k], simulated[rank], strict=True):
            assert torch.equal(got, expected) if n == 2 else torch.allclose(got, expected, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(gloo[0][k][-1], trace[k][-1]) for trace in gloo)
