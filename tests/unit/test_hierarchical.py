"""Islands: each link carries what it should, in every world, and unlike sizes are refused."""

import pytest
import torch

from lowcomm import Meter, MeteredComm, Task
from lowcomm.comm.echo import EchoComm
from lowcomm.tensors import digest
from tests.compressors import Absmax, Cast, Hierarchical, Identity, PowerSGD, Quantized
from tests.conformance.test_compressors import check_means
from tests.torchrun import torchrun
from tests.unit.islands import COMPRESSORS, program
from tests.world import run_world


@pytest.mark.parametrize(("island", "num_ranks", "shape"), [(1, 4, (5, 7)), (2, 4, (257,)), (2, 8, (3,)), (4, 8, ())])
@pytest.mark.parametrize(
    "parts", [(Identity(), Quantized()), (Cast(), Quantized(Absmax(4, block=8))), (Quantized(), Identity())], ids=str
)
def test_mean_of_what_was_sent_is_the_mean(parts, island, num_ranks, shape):
    compressor = Hierarchical(island, *parts)
    results = run_world(num_ranks, lambda comm: program(comm, compressor, shape))
    check_means([(sent, mean) for _, sent, mean in results])
    exact = torch.stack([x for x, _, _ in results]).mean(0)
    assert (results[0][2] - exact).abs().max() < 0.4


def test_gloo_computes_what_the_simulator_does(tmp_path):
    """Bitwise, as no sum has more than two terms; several rounds, so that views are used again."""
    torchrun(4, "tests/unit/islands.py", str(tmp_path))
    for name, compressor in COMPRESSORS.items():
        simulated = run_world(4, lambda comm: program(comm, compressor, (33,)))  # noqa: B023
        for rank in range(4):
            assert digest(torch.load(tmp_path / f"{name}{rank}.pt")) == digest(simulated[rank])


@pytest.mark.parametrize(("island", "num"), [(1, 1), (2, 64), (4, 100), (8, 100)])
def test_bytes_are_those_of_the_closed_form(num, island):
    compressor, meter = Hierarchical(island, Cast(), Quantized()), Meter()
    x = torch.empty(num, device="meta")
    Task(compressor.mean(x, compressor.init(x), MeteredComm(EchoComm(8), meter))).result()
    assert meter.bytes_sent == compressor.sent_bytes((num,), 4, 8)


def test_slow_links_carry_each_slice_once():
    """Islands of 4 send a quarter of what 8 ranks side by side would, with fewer to send it to."""
    flat, islands = Quantized(), Hierarchical(4, Identity(), Quantized())
    num = 2**16
    assert islands.slow_bytes((num,), 4, 8) < 0.25 * flat.sent_bytes((num,), 4, 8)


def test_wrong_islands_are_refused():
    compressor = Hierarchical(4)
    x = torch.ones(10)
    with pytest.raises(ValueError, match="6 members"):
        Task(compressor.mean(x, compressor.init(x), EchoComm(6))).result()
    with pytest.raises(ValueError, match="island=0"):
        Hierarchical(0)
    with pytest.raises(ValueError, match="PowerSGD"):
        Hierarchical(2, outer=PowerSGD())
