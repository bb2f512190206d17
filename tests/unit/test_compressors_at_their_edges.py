"""Compressors and codes at the edges of their formats: large values, exact zeros, many ranks, shared seeds."""

from functools import partial

import pytest
import torch

from benchmarks.step_size import ef_bv
from lowcomm.codecs.absmax import Absmax
from lowcomm.codecs.float32 import Float32
from lowcomm.codecs.half import Half
from lowcomm.codecs.qsgd import QSGD
from lowcomm.comm.base import Task
from lowcomm.comm.echo import EchoComm
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
from lowcomm.feedback.ef_bv import EFBV
from lowcomm.tensors import digest, rng
from tests.world import run_world

RANDOM = Absmax(4, 64, stochastic=True)
SCALED = RandomK(0.5, unbiased=True)


@pytest.mark.parametrize(
    "parts",
    [
        (SCALED, SCALED),
        (Quantized(RANDOM), Gathered(QSGD(7))),
        (RandomK(0.5, Quantized(RANDOM)), TopK(values=RANDOM)),
        (Hierarchical(1, SCALED, Identity()), SCALED),
    ],
    ids=str,
)
def test_islands_refuse_to_draw_the_same_numbers_twice(parts):
    """Errors within and between islands would add up: the mean of two unbiased ones was twice what it should be."""
    with pytest.raises(ValueError, match=r"give outer another seed, such as seed=1$"):
        Hierarchical(2, *parts)
    coded = Quantized(RANDOM)  # what does not share numbers is accepted
    for one, other in ((coded, Quantized(Absmax(4))), (coded, Quantized(RANDOM, seed=1)), (SCALED, coded)):
        assert Hierarchical(2, one, other).inner is one


@pytest.mark.parametrize("cls", [Gathered, Quantized, TopK], ids=lambda cls: cls.__name__)
def test_each_seed_rank_and_round_has_its_own_random_rounding(cls):
    """Else errors of ranks or rounds would add up: on equal vectors, in places of which neither rank owns the mean."""
    x = torch.rand(96, generator=rng(0, "test"))

    def program(comm, seed):
        compressor = TopK(1.0, values=RANDOM, seed=seed) if cls is TopK else cls(RANDOM, seed)
        state, seen = compressor.init(x), []
        for _ in range(2):
            sent, _, state = Task(compressor.mean(x, state, comm)).result()
            seen.append(digest([sent[64:]]))
        return seen

    ranks = [run_world(3, partial(program, seed=seed))[:2] for seed in (0, 1)]
    assert len({seen for seeds in ranks for rounds in seeds for seen in rounds}) == 2 * 2 * 2


@pytest.mark.parametrize("cls", [RandomBlock, RandomK, Sketch, partial(CountSketch, exact=False), PowerSGD], ids=str)
def test_other_seeds_and_rounds_send_other_parts(cls):
    x, comm, seen = torch.randn(1, 40, 50, generator=rng(0, "test")), EchoComm(2), set()
    for seed in (0, 1):
        compressor = cls(seed=seed)
        state = compressor.init(x)
        for _ in range(2):
            _, mean, state = Task(compressor.mean(x, state, comm)).result()
            seen.add(digest([mean]))
    assert len(seen) == 4


MEMORY = EF21Plus(TopK(num=2, chunk=None))
WITHIN = [
    *(RandomK(0.5, MEMORY), DCT(MEMORY, tile=4), Hierarchical(2, MEMORY, MEMORY)),
    *(Hierarchical(2, SCALED, RandomBlock(0.5)), Hierarchical(2, RandomBlock(0.5), SCALED)),
]


@pytest.mark.parametrize("compressor", WITHIN, ids=str)
def test_states_of_parts_go_on_and_are_made_equal(compressor):
    """A rank loses its state after three rounds; after a resync the laws hold as before."""

    def program(comm):
        x = torch.randn(3, 5, 7, generator=rng(0, "test", comm.rank), dtype=torch.float64)
        state, means = compressor.init(x), []
        for t in range(5):
            if t == 3:
                state = compressor.init(x) if comm.rank == 3 else state
                state = Task(compressor.resync(state, comm)).result()
            sent, mean, state = Task(compressor.mean(x, state, comm)).result()
            means.append(digest([mean]))
        return sent, mean, means

    results = run_world(4, program)
    assert all(means == results[0][2] for _, _, means in results), "ranks differ"
    assert len(set(results[0][2])) == 5, "a state did not go on"
    assert torch.allclose(sum(sent for sent, _, _ in results) / 4, results[0][1], atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"alternate": True}, {"num_iterations": 2}], ids=str)
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 10.0), (torch.float32, 1e30), (torch.float32, 1e-25)])
def test_power_sgd_stands_large_and_small_matrices(dtype, scale, options):
    """A warm start used to send x x^T: beyond float16 from norms of 256, and what overflowed once stayed NaN."""
    left, right = (torch.randn(1, 256, 2, generator=rng(0, "test", i)) for i in range(2))
    x = (scale * left @ right.mT).to(dtype)
    compressor, comm = PowerSGD(2, **options), EchoComm(1)
    state = compressor.init(x)
    for _ in range(4):
        _, mean, state = Task(compressor.mean(x, state, comm)).result()
    miss = (mean.double() - x.double()).norm() / x.double().norm()
    assert miss < (1e-2 if dtype == torch.float16 else 1e-5)


def test_halves_clamp_halves_of_the_other_kind():
    x = torch.tensor([[65504.0, -1.0, 0.25]], dtype=torch.float16)
    assert torch.equal(Half().decode(Half().encode(x), 3), torch.tensor([[65536.0, -1.0, 0.25]]))
    x, code = torch.tensor([[1e30, -1e30, 1.0]], dtype=torch.bfloat16), Half("float16")
    assert torch.equal(code.decode(code.encode(x), 3), torch.tensor([[65504.0, -65504.0, 1.0]]))


@pytest.mark.parametrize("codec", [Absmax(8, 256, stochastic=True), QSGD(127, 256)], ids=str)
def test_integers_of_steps_are_exact_under_random_rounding(codec):
    """One in 2^18 zeros used to come back as a step."""
    x = torch.arange(2**22).view(256, -1) % 255 - 127.0
    if isinstance(codec, QSGD):  # scaled by the norm, which here is that of one value
        x = torch.zeros_like(x)
        x[:, ::256] = 1.0
    assert torch.equal(codec.decode(codec.encode(x, rng(0, "test")), x.shape[1]), x)


@pytest.mark.parametrize("compressor", [Gathered(Float32()), TopK(1.0), TopK(1.0, divide_by="present")], ids=str)
def test_many_ranks_of_16_bits_are_added_in_more(compressor):
    def program(comm):
        x = (1 + torch.rand(64, generator=rng(0, "test", comm.rank))).bfloat16()
        sent, mean, _ = Task(compressor.mean(x, compressor.init(x), comm)).result()
        return sent, mean

    results = run_world(64, program)
    exact = torch.stack([sent for sent, _ in results]).double().mean(0)
    assert results[0][1].dtype == torch.bfloat16
    assert torch.equal(results[0][1], exact.bfloat16())


@pytest.mark.parametrize("compressor", [Quantized(), Gathered(), TopK(1.0)], ids=str)
def test_means_are_finite_where_sums_leave_the_range_of_16_bits(compressor):
    x = torch.full((512,), 40_000.0, dtype=torch.float16)
    sent, mean, _ = Task(compressor.mean(x, compressor.init(x), EchoComm(2))).result()
    assert mean.dtype == sent.dtype == torch.float16
    assert torch.allclose(mean, x, rtol=2e-3) and torch.allclose(sent, x, rtol=2e-3)


def test_ef_bv_has_no_jump_at_compressors_without_variance():
    at, near = (ef_bv(1.0, [1.0], 0.0, omega, 0.0, EFBV(1.0, 0.1)) for omega in (0.0, 1e-12))
    assert at == pytest.approx(1 / (1 + 0.9 * 2**0.5))
    assert near == pytest.approx(at, rel=1e-5)
    assert ef_bv(2.0, [1.0], 0.0, 0.0, 0.0, EFBV(1.0, 1.0)) == 0.5


@pytest.mark.parametrize(("bits", "width"), [(4, 394), (8, 129034)])
def test_random_rounding_loses_all_from_the_width_that_is_stated(bits, width):
    codec = Absmax(bits, 2**18, stochastic=True)
    assert codec.contraction(width) < 0
    assert codec.contraction(width - 1) == pytest.approx(0, abs=1e-12)
