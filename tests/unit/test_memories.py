"""What single feedbacks keep besides their equations: rounding at random, the share that got through."""

import pytest
import torch

from lowcomm.tensors import digest, rng
from tests.compressors import EF14, Absmax, EControl


def test_a_memory_that_rounds_at_random_has_other_numbers_in_each_round_and_for_each_seed():
    """With the same ones each round, its errors would add up."""
    x, memory = torch.randn(64, generator=rng(0, "x")), Absmax(4, block=16, stochastic=True)

    def errors(seed):
        feedback, found = EF14(0.0, memory, seed), []
        state = feedback.init(x)
        for _ in range(3):
            _, kept = feedback.before(x, state)
            _, state = feedback.after(kept, torch.zeros_like(x), x, state)  # nothing is sent: all of x is left
            found.append(digest([state.error]))
        return found

    assert errors(0) == errors(0) and len({*errors(0), *errors(1)}) == 6


@pytest.mark.parametrize(
    ("send", "share"),
    [
        (lambda wanted: wanted, 1.0),
        (lambda wanted: 0.5 * wanted, 0.75),  # of the energy
        (lambda wanted: wanted * torch.tensor([0.0, 0.0, 0.0, 1.0]), 0.25),  # of the values
        (lambda wanted: -wanted, 0.0),
    ],
)
def test_econtrol_measures_what_got_through_of_what_it_wanted_to_send(send, share):
    feedback, x = EControl(dense_first=False), torch.tensor([1.0, 2.0, 3.0, 40.0], dtype=torch.float64)
    state = feedback.init(x)
    _, kept = feedback.before(x, state)
    _, state = feedback.after(kept, x * torch.tensor([0.5, 0.5, 0.0, 0.0]), x, state)
    assert state.eta > 0 and state.error.tolist() == [0.5, 1.0, 3.0, 40.0], "so it wants more than what is new in x"
    wanted, kept = feedback.before(x, state)
    _, state = feedback.after(kept, send(wanted), x, state)
    assert state.eta.item() == pytest.approx(share, rel=1e-12)


def test_econtrol_counts_what_float16_cannot():
    """More values than its largest number, of more energy than that; and squares below its smallest."""
    for scale in (1e-4, 100.0):
        x = torch.full((100_000,), scale, dtype=torch.float16)
        sent = torch.where(torch.arange(100_000) < 80_000, x, torch.zeros_like(x))
        before = EControl().init(x)
        _, state = EControl().after(EControl().before(x, before)[1], sent, sent, before)
        assert state.eta.dtype == torch.float16 and state.eta.item() == pytest.approx(0.8, rel=1e-3)
