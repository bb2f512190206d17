"""Compressors and methods on a GPU: the laws hold there, and the numbers are those of the CPU. Skipped without CUDA."""

import pytest
import torch

from lowcomm import Task, TorchEngine, step
from lowcomm.tensors import digest, rng
from tests.algorithms import all_algorithms, inner_of
from tests.compressors import CountSketch, all_compressors
from tests.replicas import flat, make_batch, make_model, mse
from tests.sim.slow import simulate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
STEPS = 9


def simulated(num_ranks, program):
    """Each rank's result. In one thread: torch's first call of a CUDA solver must not come from several at once."""
    return simulate(*[lambda comm, clock: program(comm)] * num_ranks, slow=False, isolate_torch=True)


def averaged(compressor, comm, device):
    """What three rounds of one vector, or of a stack of two matrices, come to."""
    generator = rng(0, "given", comm.rank)
    x = torch.randn((2, 37, 24), generator=generator, dtype=torch.float64)
    x = (x.reshape(-1) if compressor.elementwise else x).to(device)
    state = compressor.init(x)
    for _ in range(3):
        sent, mean, state = Task(compressor.mean(x, state, comm)).result()
    return sent, mean


@pytest.mark.parametrize("compressor", all_compressors(), ids=str)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_compressors(compressor, num_ranks):
    results = simulated(num_ranks, lambda comm: averaged(compressor, comm, "cuda"))
    means = [mean for _, mean in results]
    assert all(mean.is_cuda and digest([mean]) == digest([means[0]]) for mean in means), "ranks differ"
    assert torch.allclose(torch.stack([sent for sent, _ in results]).mean(0), means[0], rtol=1e-12, atol=1e-12)
    if "stochastic=True" in str(compressor) or isinstance(compressor, CountSketch):
        return  # another generator draws there; places with equal estimates are chosen in another order
    on_cpu = simulated(num_ranks, lambda comm: averaged(compressor, comm, "cpu"))[0][1]
    # a value on the border of two codes may fall to either side
    error = (means[0].cpu() - on_cpu).norm() / on_cpu.norm()
    assert error < 1e-3, f"{error:g} away from what the CPU computes"


def trained(algorithm, comm, device):
    """`tests.replicas.train` on a device: parameters after each step and at the end."""
    model = make_model().to(device)
    engine = TorchEngine(model, inner_of(algorithm)(list(model.parameters())), loss=mse, clip_norm=None)
    state = algorithm.init(engine, comm)
    trace = []
    for t in range(1, STEPS + 1):
        batch = tuple(x.to(device) for x in make_batch(comm.rank, t))
        step(algorithm, t, engine, state, comm, batch)
        trace.append(flat(engine.slots()["param"]).cpu())
    algorithm.finish(STEPS, engine, state, comm)
    return [*trace, flat(engine.slots()["param"]).cpu()]


@pytest.mark.parametrize("algorithm", all_algorithms(), ids=str)
def test_algorithms(algorithm):
    on_gpu, on_cpu = (simulated(3, lambda comm, d=device: trained(algorithm, comm, d)) for device in ("cuda", "cpu"))
    assert all(torch.equal(on_gpu[0][-1], trace[-1]) for trace in on_gpu), "replicas end apart"
    lossy = "Identity" not in str(algorithm)
    for got, expected in zip(on_gpu, on_cpu, strict=True):
        for x, y in zip(got, expected, strict=True):
            assert torch.allclose(x, y, rtol=0, atol=0.02 if lossy else 1e-9)
