"""Codes on a GPU, compiled: what they decode to is bitwise what any other way gives. Skipped without CUDA."""

import pytest
import torch

from lowcomm.codecs import blocks
from lowcomm.tensors import rng
from tests.compressors import BlockCodec, all_codecs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
CODECS = [codec for codec in all_codecs() if isinstance(codec, BlockCodec)]
MANY = 2**20  # values of a row that is compiled


def error(y, x):
    return float((y.cpu().double() - x.cpu().double()).norm() / x.cpu().double().norm())


@pytest.mark.parametrize("shape", [(1, MANY), (3, MANY + 4099), (1, 3 * MANY + 77), (5, 3001)], ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_payload_decodes_to_the_same_bits_everywhere(codec, shape, monkeypatch):
    x = torch.randn(shape, generator=rng(0, "x"))
    payload = codec.encode(x.cuda(), rng(0, "rounding", device="cuda"))
    y = codec.decode(payload, shape[1])
    on_cpu = codec.decode(payload.cpu(), shape[1])
    assert torch.equal(y.cpu(), on_cpu), "CPU and GPU differ"
    of_cpu = codec.encode(x, rng(0, "rounding"))
    assert torch.equal(codec.decode(of_cpu.cuda(), shape[1]).cpu(), codec.decode(of_cpu, shape[1]))
    monkeypatch.setattr(blocks, "COMPILED_ON", ())
    assert torch.equal(codec.decode(payload, shape[1]), y), "compiled and not compiled differ"
    # scales may differ in the last bit, and a value on the border of two codes fall to either side
    assert error(y, x) == pytest.approx(
        error(codec.decode(of_cpu, shape[1]), x), rel=0.05 if codec.stochastic else 2e-3
    )
    if not codec.stochastic:
        missed, size = (on_cpu - x).double().square().sum(1), x.double().square().sum(1)
        assert (missed <= (1 - codec.contraction(shape[1])) * size * (1 + 1e-5)).all()


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_magnitudes_far_from_one_and_nan(codec):
    block = codec.layout().block
    for scale in (0.0, 1e-38, 1e-30, 1e30, 1e37):
        x = torch.randn(1, max(MANY, 2 * block), generator=rng(0, "x")).clamp(-3, 3).mul_(scale).cuda()
        y = codec.decode(codec.encode(x, rng(0, "rounding", device="cuda")), x.shape[1])
        assert y.isfinite().all(), scale
        assert scale or not y.any()
    x[0, 3] = float("nan")
    y = codec.decode(codec.encode(x, rng(0, "rounding", device="cuda")), x.shape[1])
    assert y[0, :block].isnan().all() and not y[0, block:].isnan().any()
