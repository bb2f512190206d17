"""What is peculiar to random coordinates: who chooses, how evenly, and what the error is on average."""

import pytest
import torch

from lowcomm import SoloComm, Task
from lowcomm.compress.random_k import RandomK, draw_distinct
from lowcomm.tensors import rng
from tests.compressors import DCT, Absmax, Identity, Quantized, RandomBlock
from tests.conformance.test_compressors import draw
from tests.world import run_world


def rounds(compressor, x, comm, num_rounds):
    state = compressor.init(x)
    for _ in range(num_rounds):
        sent, _, state = Task(compressor.mean(x, state, comm)).result()
        yield sent


@pytest.mark.parametrize("cls", [RandomK, RandomBlock])
def test_all_ranks_choose_the_same_and_every_round_anew(cls):
    results = run_world(3, lambda comm: [s != 0 for s in rounds(cls(0.2), draw("normal", (50,), comm.rank), comm, 4)])
    for chosen in zip(*results, strict=True):
        assert torch.equal(chosen[0], chosen[1]) and torch.equal(chosen[0], chosen[2])
        assert chosen[0].sum() == 10
    assert any(not torch.equal(results[0][0], other) for other in results[0][1:])


@pytest.mark.parametrize(("density", "grows"), [(0.25, True), (0.75, False)])
def test_a_remembered_residual_diverges_below_half(density, grows):
    compressor, residual = RandomK(density, unbiased=True), torch.ones(64, dtype=torch.float64)
    state = compressor.init(residual)
    for _ in range(40):
        sent, _, state = Task(compressor.mean(residual, state, SoloComm())).result()
        residual = residual - sent
    assert (residual.norm() > 1e6) == grows
    assert (residual.norm() < 1e-3) != grows


@pytest.mark.parametrize(("num", "kept"), [(12, 3), (12, 7)])
def test_every_place_is_drawn_equally_often(num, kept):
    """Both ways of drawing: few of many, and many of few."""
    times = torch.zeros(num)
    pairs = torch.zeros(num, num)
    num_rounds = 6000
    for i in range(num_rounds):
        where = draw_distinct(num, kept, rng(i, "draw"))
        assert len(where) == kept and (where.diff() > 0).all()
        times[where] += 1
        pairs[where[:, None], where] += 1
    assert torch.allclose(times / num_rounds, torch.full((num,), kept / num), atol=0.03)
    both = pairs[~torch.eye(num, dtype=torch.bool)] / num_rounds
    assert torch.allclose(both, torch.full_like(both, kept * (kept - 1) / num / (num - 1)), atol=0.03)


def test_a_block_is_contiguous_and_wraps():
    x = torch.ones(10)
    seen = [tuple(s.nonzero().flatten().tolist()) for s in rounds(RandomBlock(0.3), x, SoloComm(), 200)]
    assert set(seen) == {tuple(sorted((i + j) % 10 for j in range(3))) for i in range(10)}


@pytest.mark.parametrize("cls", [RandomK, RandomBlock])
def test_at_least_one_value_is_sent(cls):
    assert next(rounds(cls(0.01), torch.ones(17), SoloComm(), 1)).count_nonzero() == 1
    assert cls(0.01).sent_bytes([17], 4, 2) == 4


def test_chosen_values_may_be_coded():
    values = Quantized(Absmax(8))
    assert RandomK(0.01, values).sent_bytes([1000, 1000], 4, 4) == values.sent_bytes([10_000], 4, 4)
    assert RandomBlock(0.01).sent_bytes([1000, 1000], 4, 4) == Identity().sent_bytes([10_000], 4, 4)


@pytest.mark.parametrize("cls", [RandomK, RandomBlock])
def test_mistakes_are_refused(cls):
    with pytest.raises(ValueError, match=f"{cls.__name__}\\(density=0"):
        cls(0)
    with pytest.raises(ValueError, match="elementwise"):
        cls(0.1, DCT())
