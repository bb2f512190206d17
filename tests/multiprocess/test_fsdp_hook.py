"""lowcomm's hook between islands of FSDP2, on four gloo processes."""

import pytest
import torch
from torch import nn

import lowcomm
from lowcomm.compress.power_sgd import PowerSGD
from tests.multiprocess.fsdp import REDUCERS, one_process, plain
from tests.torchrun import torchrun


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Each rank's parameters after the last step, by case."""
    out = tmp_path_factory.mktemp("fsdp")
    torchrun(4, "tests/multiprocess/fsdp.py", str(out))
    return [torch.load(out / f"rank{rank}.pt") for rank in range(4)]


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", REDUCERS)
def test_ranks_stay_equal_and_resume_bitwise(results, name):
    for result in results:
        assert equal(result[name], results[0][name])
        assert equal(result[name], result[f"{name} resumed"])


def test_the_mean_is_that_of_all_ranks(results):
    expected, start = one_process(4), dict(plain().named_parameters())
    for name, x in expected.items():
        assert torch.allclose(results[0]["exact"][name], x, rtol=1e-10, atol=1e-12)
        apart = (results[0]["quantized"][name] - x).norm()
        assert 0 < apart < 0.1 * (x - start[name]).norm()


def test_what_is_remembered_is_of_the_same_parameter_at_every_step(results):
    """The same gradients again and again, in turns: what is not sent stays small, so sums are apart by one error."""
    for result in results:
        for name, exact in result["exact turns"].items():
            assert 0 < (result["quantized turns"][name] - exact).abs().max() < 0.01 * exact.abs().max()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="whole tensors"):
        lowcomm.fsdp_hook(lowcomm.Reducer(PowerSGD()), lowcomm.SoloComm())
    with pytest.raises(ValueError, match="fully_shard"):
        lowcomm.fsdp_hook(lowcomm.Reducer(), lowcomm.SoloComm()).register(nn.Linear(2, 2))
