"""What compressors state that they lose is nearly lost by the worst of vectors: no smaller constant would do."""

import math

import pytest
import torch

from lowcomm.codecs.absmax import Absmax
from lowcomm.codecs.half import Half
from lowcomm.codecs.qsgd import QSGD
from lowcomm.codecs.sign import Sign
from lowcomm.comm.base import Task
from lowcomm.compress.cast import Cast
from lowcomm.compress.count_sketch import CountSketch
from lowcomm.compress.dct import DCT
from lowcomm.compress.ef21_plus import EF21Plus
from lowcomm.compress.gathered import Gathered
from lowcomm.compress.hierarchical import Hierarchical
from lowcomm.compress.identity import Identity
from lowcomm.compress.power_sgd import PowerSGD
from lowcomm.compress.quantized import Quantized
from lowcomm.compress.random_block import RandomBlock
from lowcomm.compress.random_k import RandomK
from lowcomm.compress.sketch import Sketch
from lowcomm.compress.top_k import TopK
from tests.contraction import EXACT, Contraction, contraction
from tests.world import run_world


def lost(compressor, xs, num_rounds=1):
    """The share of sum |x|^2 that is lost, on average over rounds."""

    def program(comm):
        x = xs[comm.rank]
        state, total = compressor.init(x), 0.0
        for _ in range(num_rounds):
            sent, _, state = Task(compressor.mean(x, state, comm)).result()
            total += float((x - sent).double().square().sum()) / num_rounds
        return total

    return sum(run_world(len(xs), program)) / float(sum(x.double().square().sum() for x in xs))


def one_large(large, small, num):
    return torch.tensor([large] + [small] * (num - 1))


ABSMAX_WORST = one_large(127.0, 0.4999, 256)
WORST = [
    (Quantized(), [ABSMAX_WORST]),
    (Gathered(), [ABSMAX_WORST]),
    (Gathered(Sign()), [one_large(1.0, 0.0, 4096)]),
    (Gathered(Half()), [torch.full((64,), 1 + 2.0**-8)]),
    (Cast(), [torch.full((64,), 1 + 2.0**-8)]),
    (Cast("float16"), [torch.full((64,), 1 + 2.0**-11)]),
    (TopK(), [torch.ones(8192)]),
    (TopK(1 / 16, values=Sign()), [one_large(1.0, 1e-3, 4096)]),
    (EF21Plus(TopK()), [torch.ones(8192)]),
    (EF21Plus(Gathered()), [ABSMAX_WORST]),
    (DCT(), [DCT().inverse(torch.ones(4096), (1, 64, 64))]),
    # the mean of members who cancel has no entries, and no directions
    (CountSketch(), [torch.arange(1000.0) - 2, 2 - torch.arange(1000.0)]),
    (PowerSGD(1), [torch.eye(16)[None], -torch.eye(16)[None]]),
    (PowerSGD(1, warm_start=False), [torch.eye(16)[None], -torch.eye(16)[None]]),
    (PowerSGD(1, error="global"), [torch.eye(16)[None], -torch.eye(16)[None]]),
    # equal members, whose slices are coded once in the name of all
    (Hierarchical(4, Identity(), Gathered()), [torch.cat([ABSMAX_WORST] * 4)] * 8),
]


@pytest.mark.parametrize(("compressor", "xs"), WORST, ids=lambda value: "" if isinstance(value, list) else str(value))
def test_the_worst_vector_loses_nearly_that(compressor, xs):
    states = contraction(compressor, xs[0].shape, len(xs))
    assert not states.in_expectation
    assert 0.85 * states.loss <= lost(compressor, xs) <= states.loss * (1 + 1e-5)


NORMAL = torch.randn(256, generator=torch.Generator().manual_seed(0))
ON_AVERAGE = [
    (RandomK(0.1), [NORMAL]),
    (RandomK(0.1), [NORMAL, NORMAL.flip(0), NORMAL.square()]),
    (RandomK(0.1, unbiased=True), [NORMAL]),
    (RandomK(0.25, Gathered(QSGD(1)), unbiased=True), [torch.full((1024,), 0.3)]),
    # a scale that was rounded up makes 4 of 3.501: all of that is multiplied, too
    (RandomK(0.25, Gathered(Absmax(4, 64, "e8m0")), unbiased=True), [torch.full((4,), 3.501)]),
    (RandomBlock(0.1), [NORMAL]),
    (Sketch(0.25, block=64), [NORMAL]),
    (Sketch(0.2, block=8, unbiased=True), [NORMAL]),  # 2 of 8
    (Gathered(QSGD(1)), [torch.full((2048,), 0.3)]),
    (Gathered(Absmax(4, 64, stochastic=True)), [one_large(7.0, 0.48, 64)]),
    # a code that adds more than it gets is the worst where nothing else is lost
    (TopK(num=16, chunk=64, values=QSGD(1)), [torch.tensor([0.3] * 16 + [0.0] * 48)]),
    (DCT(RandomK(0.3)), [NORMAL.view(1, 16, 16)]),
    (PowerSGD(2, warm_start=False), [torch.eye(32)[None]]),
    (PowerSGD(2, warm_start=False), [torch.eye(16, 200)[None]]),
]


@pytest.mark.parametrize(
    ("compressor", "xs"), ON_AVERAGE, ids=lambda value: "" if isinstance(value, list) else str(value)
)
def test_what_is_lost_on_average_is_that(compressor, xs):
    states = contraction(compressor, xs[0].shape, len(xs))
    assert states.in_expectation
    assert lost(compressor, xs, 600) == pytest.approx(states.loss, rel=0.05)


def test_a_warm_start_may_keep_nothing():
    """Factors that have seen half of the columns know nothing of the other half, nor does an empty P of its rows."""
    compressor = PowerSGD(2)
    first, second = torch.zeros(1, 20, 20), torch.zeros(1, 20, 20)
    first[0, :, :10], second[0, 2:, 10:] = torch.randn(20, 10), torch.randn(18, 10)

    def program(comm):
        _, _, state = Task(compressor.mean(first, compressor.init(first), comm)).result()
        return Task(compressor.mean(second, state, comm)).result()[0]

    assert run_world(1, program)[0].count_nonzero() == 0
    assert contraction(compressor, first.shape, 1) == Contraction(1.0)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_second_shot_is_within_a_factor_of_4(num_ranks):
    """Whole numbers go exactly, and halves as their means do not: the owner answers for all of that."""
    compressor = Quantized(Absmax(4, block=8))
    xs = [torch.tensor(([7.0] + [float(rank % 2)] * 7) * num_ranks) for rank in range(num_ranks)]
    states = contraction(compressor, xs[0].shape, num_ranks)
    assert states.loss / 4 < lost(compressor, xs) <= states.loss


def test_the_second_rounding_of_a_cast_is_within_a_factor_of_4():
    """Values that have 16 bits, whose mean lies in the middle of two that have."""
    xs = [torch.ones(64), torch.full((64,), 1 + 2.0**-7)]
    states = contraction(Cast(), xs[0].shape, 2)
    assert states.loss / 4 < lost(Cast(), xs) <= states.loss


def test_under_a_scale_that_was_rounded_up_the_largest_is_rounded_too():
    compressor, x = Gathered(Absmax(4, 64, "e8m0", stochastic=True)), torch.tensor([3.501, 0.49])
    states = contraction(compressor, x.shape, 1)
    assert states.loss / 2 < lost(compressor, [x], 200) <= states.loss


def test_estimates_of_a_count_sketch_add_noise():
    """Far less than what can be guaranteed, as only the largest estimates are kept."""
    compressor = CountSketch(exact=False)
    states = contraction(compressor, NORMAL.shape, 1)
    assert states.delta < 0 and not states.unbiased
    assert 1.0 < lost(compressor, [NORMAL], 100) < states.loss


def test_two_stages():
    exact, half = EXACT, Contraction(0.5)
    noisy = Contraction(2.0, in_expectation=True, unbiased=True)
    assert exact.then(exact, 5) == exact
    assert half.then(exact, 5).loss == pytest.approx(0.5) and exact.then(half, 5).loss == pytest.approx(2.5)
    assert exact.then(noisy, 3) == Contraction(6.0, in_expectation=True, unbiased=True)
    assert noisy.then(noisy, 3).loss == 2 + 3 * 2 * (1 + 2)
    assert half.then(half, 2).loss == pytest.approx((0.5**0.5 + (2 * 0.5) ** 0.5 * (1 + 0.5**0.5)) ** 2)
    assert not half.then(noisy, 2).unbiased and half.then(noisy, 2).in_expectation
    assert noisy.delta == -1.0


def test_what_does_not_get_smaller_is_exact():
    for compressor in (Quantized(), Gathered(), TopK(), DCT(), EF21Plus(), Sketch(), CountSketch(), PowerSGD()):
        assert contraction(compressor, (1, 1), 8) == EXACT
        assert contraction(compressor, (1, 64, 512), 8).loss > 0
    assert contraction(RandomK(1.0), (100,), 2) == EXACT
    assert math.isclose(contraction(RandomK(0.1), (100,), 2).delta, 0.1)
