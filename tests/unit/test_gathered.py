"""All-gather of coded vectors: nearer than two shots, for more bytes."""

import pytest
import torch

from lowcomm.codecs.absmax import Absmax
from lowcomm.comm.base import Task
from lowcomm.compress.gathered import Gathered
from lowcomm.compress.quantized import Quantized
from lowcomm.tensors import rng
from tests.world import run_world


def error(compressor, num_ranks):
    xs = [torch.randn(2**16, generator=rng(0, "vector", rank)) for rank in range(num_ranks)]
    exact = torch.stack(xs).double().mean(0)

    def program(comm):
        return Task(compressor.mean(xs[comm.rank], compressor.init(xs[comm.rank]), comm)).result()[1]

    return float((run_world(num_ranks, program)[0] - exact).norm() / exact.norm())


@pytest.mark.parametrize(("bits", "gathered", "two_shot"), [(8, 0.0070, 0.0099), (4, 0.127, 0.18)])
@pytest.mark.parametrize("num_ranks", [4, 16])
def test_error_is_smaller_and_does_not_grow_with_the_ranks(bits, gathered, two_shot, num_ranks):
    codec = Absmax(bits, block=256)
    assert error(Gathered(codec), num_ranks) == pytest.approx(gathered, rel=0.04)
    assert error(Quantized(codec), num_ranks) == pytest.approx(two_shot, rel=0.04)


def test_bytes_grow_with_the_ranks():
    codec = Absmax()
    for num_ranks in (1, 2, 8):
        expected = (num_ranks - 1) * codec.num_bytes(1000)
        assert Gathered(codec).sent_bytes([10, 100], 4, num_ranks) == expected
