"""The laws of every code."""

import pytest
import torch

from lowcomm.tensors import digest, rng
from tests.compressors import BlockCodec, all_codecs
from tests.conformance.test_compressors import KINDS, draw

SHAPES = [(1, 1), (1, 17), (3, 257), (2, 64), (4, 1000), (2, 0), (0, 5)]
NUM_DRAWS = 1000


@pytest.fixture(params=all_codecs(), ids=str)
def codec(request):
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_comes_back_is_near(codec, shape):
    for kind in KINDS:
        check_near(codec, kind, shape)


def check_near(codec, kind, shape):
    x = draw(kind, shape, 1).float()
    before = digest([x])
    num = shape[1]
    payload = codec.encode(x, rng(0, "rounding"))
    assert digest([x]) == before, "the input was modified"
    assert payload.dtype == torch.uint8 and payload.shape == (shape[0], codec.num_bytes(num))
    y = codec.decode(payload, num)
    assert y.shape == x.shape and y.dtype == torch.float32 and y.isfinite().all()
    delta = codec.contraction(num)
    assert delta <= 1 and (delta > 0 or codec.stochastic)
    if num:
        missed, size = (y - x).double().square().sum(1), x.double().square().sum(1)
        if not codec.stochastic:
            assert (missed <= (1 - delta) * size * (1 + 1e-5) + 1e-30).all()
        assert (y[size == 0] == 0).all(), "zero must stay zero"


def test_rows_are_coded_alone_and_share_nothing_with_their_values(codec):
    for shape in SHAPES:
        x = draw("rows", shape, 0).float()
        together = codec.encode(x, rng(0, "rounding"))
        if not codec.stochastic:
            for row, payload in zip(x, together, strict=True):
                assert torch.equal(codec.encode(row[None])[0], payload)
        both = torch.cat([together, together])
        assert torch.equal(codec.decode(both, shape[1])[: shape[0]], codec.decode(together, shape[1]))
        x.fill_(7.0)
        assert torch.equal(together, both[: shape[0]])


def test_nan_spoils_its_block_and_no_other(codec):
    """So that a sum over ranks shows that one of them had NaN."""
    num, place = 3 * 64 + 5, 3
    block = codec.layout().block if isinstance(codec, BlockCodec) else 1
    x = draw("normal", (2, num), 0).float()
    x[1, place] = float("nan")
    y = codec.decode(codec.encode(x, rng(0, "rounding")), num)
    spoilt = torch.zeros(2, num, dtype=torch.bool)
    spoilt[1, place // block * block : (place // block + 1) * block] = True
    assert torch.equal(y.isnan(), spoilt)


def test_runs_without_values(codec):
    for shape in SHAPES:
        payload = codec.encode(torch.empty(shape, device="meta"), rng(0, "rounding"))
        assert payload.shape == (shape[0], codec.num_bytes(shape[1]))
        assert codec.decode(payload, shape[1]).shape == shape


def test_magnitudes_far_from_one(codec):
    for scale in (1e-30, 1e-6, 1e6, 1e30):
        x = draw("normal", (2, 300), 0).float() * scale
        assert codec.decode(codec.encode(x, rng(0, "rounding")), 300).isfinite().all()


@pytest.mark.parametrize("kind", ["heavy", "constant"])
@pytest.mark.parametrize("codec", [codec for codec in all_codecs() if codec.stochastic], ids=str)
def test_random_rounding_is_right_on_average(codec, kind):
    """The mean is x itself, and the contraction holds for the mean of squared errors."""
    num = 97
    x = draw(kind, (1, num), 1).float().expand(NUM_DRAWS, num)
    y = codec.decode(codec.encode(x, rng(0, "rounding")), num).double()
    x = x.double()
    spread = (y - x).square().mean(0).sqrt().max()  # of one value it cannot be told if it is seldom rounded up
    # six standard deviations of a mean; float32 rounds what the largest values are scaled by
    assert ((y.mean(0) - x[0]).abs() <= 6 * spread / NUM_DRAWS**0.5 + 1e-6 * x.abs().max()).all()
    missed, size = (y - x).square().sum(1), x[0].square().sum()
    assert missed.mean() <= (1 - codec.contraction(num)) * size + 6 * missed.std() / NUM_DRAWS**0.5 + 1e-12 * size


def test_float64_comes_as_float32_would(codec):
    x = draw("heavy", (2, 300), 0)
    assert torch.equal(codec.encode(x, rng(0, "rounding")), codec.encode(x.float(), rng(0, "rounding")))


@pytest.mark.parametrize("codec", [codec for codec in all_codecs() if not codec.stochastic], ids=str)
def test_long_rows_are_coded_like_short_ones(codec):
    """Rows longer than what is coded at a time, with a last block that is not full; random codes draw otherwise."""
    num = 40_009
    x = draw("rows", (3, num), 0).float()
    payload = codec.encode(x)
    for row, alone in zip(x, payload, strict=True):
        assert torch.equal(codec.encode(row[None])[0], alone)
    y = codec.decode(payload, num)
    missed, size = (y - x).double().square().sum(1), x.double().square().sum(1)
    assert (missed <= (1 - codec.contraction(num)) * size * (1 + 1e-5)).all()


def test_payloads_do_not_depend_on_the_number_of_threads(codec):
    x = draw("heavy", (2, 140_001), 0).float()
    threads, payloads = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            payloads.append(codec.encode(x, rng(0, "rounding")))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*payloads)
