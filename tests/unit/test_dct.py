"""What is peculiar to compressing frequencies: the transform itself, its tiles, and what it makes exact."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowcomm import SoloComm, Task
from tests.compressors import DCT, TopK
from tests.conformance.test_compressors import draw

SHAPES = [(1,), (2, 7), (3, 0), (1, 64, 64), (2, 9, 13), (2, 5, 3, 2), (1, 65, 130), (4, 1, 1), (1, 127)]


def test_against_the_definition():
    n, m = 5, 8
    x = draw("normal", (1, n, m), 0)
    expected = torch.zeros(n, m, dtype=torch.float64)
    for j in range(n):
        for k in range(m):
            scale = math.sqrt((1 if j == 0 else 2) / n * (1 if k == 0 else 2) / m)
            for a in range(n):
                for b in range(m):
                    wave = math.cos(math.pi * (a + 0.5) * j / n) * math.cos(math.pi * (b + 0.5) * k / m)
                    expected[j, k] += scale * wave * x[0, a, b]
    assert torch.allclose(DCT().transform(x).view(n, m), expected, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tile", [1, 4, 64])
def test_keeps_lengths_and_comes_back(shape, tile):
    x = draw("normal", shape, 0)
    dct = DCT(tile=tile)
    coefficients = dct.transform(x)
    assert coefficients.shape == (x.numel(),)
    assert coefficients.square().sum() == pytest.approx(float(x.square().sum()), rel=1e-12)
    assert torch.allclose(dct.inverse(coefficients, shape), x, atol=1e-13)


def test_tiles_are_transformed_alone():
    x = torch.zeros(1, 12, 12, dtype=torch.float64)
    x[0, 4:8, 8:12] = draw("normal", (4, 4), 0)
    tiles = DCT(tile=4).transform(x).view(9, 16)
    assert torch.equal(tiles.abs().sum(1).nonzero().flatten(), torch.tensor([5]))


@given(st.integers(0, 200_000), st.integers(1, 64))
def test_tiles_are_few_and_nearly_equal(side, tile):
    runs = DCT(tile=tile)._runs(side)
    assert sum(run.count for run in runs) == math.ceil(side / tile)
    assert [run.places.start for run in runs] == [0, *(run.places.stop for run in runs)][: len(runs)]
    assert sum(run.count * run.length for run in runs) == side
    lengths = [run.length for run in runs]
    assert not lengths or max(lengths) <= min(tile, min(lengths) + 1)


def test_few_waves_are_exact():
    """Two waves in every tile are its two largest coefficients."""
    dct = DCT(tile=16)
    coefficients = torch.zeros(4, 256, dtype=torch.float64)
    coefficients[:, 3], coefficients[:, 40] = 1.0, -2.0
    x = dct.inverse(coefficients.view(-1), (1, 32, 32))
    sent, _, _ = Task(DCT(TopK(num=2, chunk=256), tile=16).mean(x, 0, SoloComm())).result()
    assert torch.allclose(sent, x, atol=1e-6)  # the kept coefficients go in float32
    sent, _, _ = Task(DCT(TopK(num=1, chunk=256), tile=16).mean(x, 0, SoloComm())).result()
    assert (sent - x).square().sum() == pytest.approx(4.0)  # the smaller wave of each of 4 tiles


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="tile=0"):
        DCT(tile=0)
    with pytest.raises(ValueError, match="elementwise"):
        DCT(DCT())
