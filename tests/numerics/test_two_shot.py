"""The error of a quantised mean in two shots does not grow with the number of replicas."""

import pytest
import torch

from lowcomm.codecs.absmax import Absmax
from lowcomm.comm.base import Task
from lowcomm.compress.quantized import Quantized
from lowcomm.tensors import rng
from tests.world import run_world

NUM = 2**15  # at 64 replicas two blocks of 256 in each chunk
# |mean - exact| / |exact| of normal values in blocks of 256, as measured by others for 4, 8, 16 and 64 replicas
MEASURED = {8: {4: 0.0099, 8: 0.0099, 16: 0.0098, 64: 0.0097}, 4: {4: 0.18, 8: 0.18, 16: 0.176, 64: 0.181}}


def error(bits, num_ranks):
    compressor = Quantized(Absmax(bits))
    xs = torch.randn(num_ranks, NUM, generator=rng(0, "x"))
    results = run_world(num_ranks, lambda comm: Task(compressor.mean(xs[comm.rank], 0, comm)).result())
    mean, exact = results[0][1].double(), xs.double().mean(0)
    return float((mean - exact).norm() / exact.norm())


@pytest.mark.parametrize("bits", MEASURED)
def test_error_does_not_grow_with_the_number_of_replicas(bits):
    errors = {num_ranks: error(bits, num_ranks) for num_ranks in MEASURED[bits]}
    assert errors == pytest.approx(MEASURED[bits], rel=0.04)
    assert max(errors.values()) < 1.05 * min(errors.values())  # a ring's would double and more
