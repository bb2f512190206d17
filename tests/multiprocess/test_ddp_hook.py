"""lowcomm's hook in torch's DistributedDataParallel, on two gloo processes."""

import pytest
import torch

import lowcomm
from tests.multiprocess.ddp import NUM_EXACT, REDUCERS, STEPS
from tests.torchrun import torchrun


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """Each rank's parameters after every step, by case."""
    out = tmp_path_factory.mktemp("ddp")
    torchrun(2, "tests/multiprocess/ddp.py", str(out))
    return [torch.load(out / f"rank{rank}.pt") for rank in range(2)]


def equal(a, b):
    return all(torch.equal(x, y) for xs, ys in zip(a, b, strict=True) for x, y in zip(xs, ys, strict=True))


def test_ranks_stay_equal(traces):
    for name in traces[0].keys() - {"torch"}:
        assert equal(traces[0][name], traces[1][name]), name
        assert traces[0][name][-1][0].isfinite().all(), name


def test_an_exact_reducer_is_ddp(traces):
    assert equal(traces[0]["exact"], traces[0]["ddp"])
    assert equal(traces[0]["ignored"], traces[0]["ignored, ddp"])


@pytest.mark.parametrize("name", [name for name in REDUCERS if name != "exact"])
def test_a_compressed_reducer_is_near_ddp(traces, name):
    start, theirs, ours = traces[0]["ddp"][0], traces[0]["ddp"][-1], traces[0][name][-1]
    moved = sum((a - b).square().sum() for a, b in zip(start, theirs, strict=True))
    apart = sum((a - b).square().sum() for a, b in zip(ours, theirs, strict=True))
    assert 0 < apart < 0.1 * moved


@pytest.mark.parametrize("name", ["quantized", "power_sgd"])
def test_resumes_bitwise_with_another_bucket_layout(traces, name):
    for trace in traces:
        assert equal(trace[f"{name} straight"], trace[f"{name} resumed"])


def test_a_spoilt_step_is_skipped_on_all_ranks(traces):
    assert equal(traces[0]["spoilt"][1:2], traces[0]["spoilt"][2:3]), "the spoilt step moved the model"
    assert not equal(traces[0]["spoilt"][2:3], traces[0]["spoilt"][3:4]), "the step after it did not"


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_power_sgd_is_torchs_from_the_same_start(traces, rank, dtype):
    """With the global error, in real runs; torch orthogonalises by Gram-Schmidt up to rank 2, by QR above.

    Torch's hook sends all exactly in the first two steps. Rounding feeds back through the parameters.
    """
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for trace in traces:
        (theirs, their_memory), (ours, our_memory) = trace["torch"][rank, dtype]
        assert len(theirs) == len(ours) == STEPS
        for a, b in zip(theirs, ours, strict=True):
            assert (a - b).norm() < tolerance * a.norm()
        assert their_memory[:NUM_EXACT] == our_memory[:NUM_EXACT] == [0.0] * NUM_EXACT
        assert min(their_memory[NUM_EXACT:]) > 0
        assert our_memory == pytest.approx(their_memory, rel=tolerance)


def test_an_unregistered_hook_is_refused():
    hook = lowcomm.ddp_hook(lowcomm.Reducer())
    with pytest.raises(ValueError, match="register"):
        hook.state_dict()
