"""Two-bit values with two magnitudes of a block."""

import pytest
import torch

from lowcomm.tensors import rng
from tests.compressors import Bins, SignMagnitude


def coded(codec, x):
    return codec.decode(codec.encode(x[None]), len(x))[0]


def error(codec, x):
    return float((coded(codec, x) - x).double().norm() / x.double().norm())


def kept_values(kind):
    """The 64 largest of each 4,096, in order of their places."""
    x = torch.randn(256, 4096, generator=rng(0, "kept"))
    x = x * torch.rand(256, 4096, generator=rng(0, "tail")).log().neg().sqrt() if kind == "heavier" else x
    return x.gather(1, x.abs().topk(64).indices.sort(1).values).flatten()


@pytest.mark.parametrize("num", [1, 2, 8, 100, 256])
def test_two_magnitudes_are_exact(num):
    signs = torch.randint(2, (num,), generator=rng(0, "signs")) * 2.0 - 1
    x = signs * torch.where(torch.rand(num, generator=rng(0, "which")) > 0.3, 0.5, 2.0)
    assert torch.equal(coded(SignMagnitude(), x), x)


@pytest.mark.parametrize("kind", ["normal", "heavier"])
def test_better_than_bins_on_what_top_k_keeps(kind):
    """At equal bits, whatever the width of the bins; SparseLoCo's program takes 6 standard deviations."""
    x = kept_values(kind)
    for sigmas in (3, 4, 5):
        bins = Bins(sigmas, block=1024)
        assert SignMagnitude(256).num_bytes(len(x)) == bins.num_bytes(len(x))
        assert error(SignMagnitude(256), x) < 0.99 * error(bins, x)
    assert error(SignMagnitude(256), x) < 0.8 * error(Bins(6, block=1024), x)
    assert error(SignMagnitude(256), x) < error(SignMagnitude(256, rounds=0), x)


def test_the_border_is_nearly_the_best():
    """Against trying every border of a block."""
    x = kept_values("heavier")[:256]
    sizes = x.abs().sort().values.double()
    best = min(
        float(sum((part - part.mean()).square().sum() for part in (sizes[:i], sizes[i:]))) for i in range(1, len(sizes))
    )
    assert error(SignMagnitude(256), x) <= 1.02 * (best**0.5 / float(x.norm())) + 2**-9


def test_filling_does_not_count():
    x = torch.tensor([3.0, -3.0, 3.0, -3.0, 7.0])
    assert torch.equal(coded(SignMagnitude(block=4), x), x)
    assert torch.equal(coded(SignMagnitude(block=1024), x[:4]), x[:4])


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="block is 0"):
        SignMagnitude(block=0)
    with pytest.raises(ValueError, match="rounds=-1"):
        SignMagnitude(rounds=-1)
