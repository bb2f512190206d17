"""The laws of every compressor."""

import pytest
import torch

from lowcomm.comm.base import Task
from lowcomm.comm.echo import EchoComm
from lowcomm.compress.base import Compressor
from lowcomm.tensors import digest, rng
from tests.roles import players
from tests.world import run_world

SHAPES = [(), (1,), (17,), (4, 6), (3, 5, 2), (0,)]


def draw(kind, shape, rank):
    generator = rng(0, kind, rank)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return {"normal": x, "heavy": x**5, "zero": x * 0, "constant": x * 0 + rank - 1.0}[kind]


@pytest.fixture(params=players(Compressor, "compress"), ids=lambda c: c.__name__)
def compressor(request):
    return request.param()


@pytest.mark.parametrize("kind", ["normal", "heavy", "zero", "constant"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_mean_of_what_was_sent_is_the_mean(compressor, kind, shape, num_ranks):
    def program(comm):
        x = draw(kind, shape, comm.rank)
        before = digest([x])
        state = compressor.init(x)
        for _ in range(3):
            sent, mean, state = Task(compressor.mean(x, state, comm)).result()
        assert digest([x]) == before, "the input was modified"
        assert sent.shape == mean.shape == x.shape and sent.dtype == mean.dtype == x.dtype
        return sent, mean

    results = run_world(num_ranks, program)
    means = [mean for _, mean in results]
    assert all(digest([m]) == digest([means[0]]) for m in means), "ranks differ"
    sent = torch.stack([sent for sent, _ in results]).mean(0)
    assert torch.allclose(sent, means[0], rtol=1e-12, atol=1e-12 * float(sent.abs().max() if sent.numel() else 0))


def test_runs_on_tensors_without_values(compressor):
    """So that traffic can be predicted for models that fit nowhere."""
    x = torch.empty(12, 5, device="meta")
    sent, mean, _ = Task(compressor.mean(x, compressor.init(x), EchoComm(4))).result()
    assert sent.shape == mean.shape == x.shape
