"""What EControl measures of a round when it is not told how much got through."""

import pytest
import torch

from lowcomm.feedback.econtrol import EControl


@pytest.mark.parametrize(
    ("sent", "share"),
    [
        ([2.0, 0.0, 0.0, 0.0], 0.25),  # a quarter of the values, all of the energy of one of them: 4 of 7
        ([1.0, 0.5, 0.5, 0.5], 1 - 1.75 / 7),  # all values, not all of the energy
        ([2.0, 1.0, 1.0, 1.0], 1.0),
        ([-2.0, -1.0, -1.0, -1.0], 0.0),  # worse than nothing
    ],
)
def test_the_next_share_is_the_lesser_of_values_and_energy(sent, share):
    feedback, x = EControl(dense_first=False), torch.tensor([2.0, 1.0, 1.0, 1.0])
    state = feedback.init(x)
    wanted, kept = feedback.before(x, state)
    assert torch.equal(wanted, x)
    _, after = feedback.after(kept, torch.tensor(sent), torch.tensor(sent), state)
    assert float(after.eta) == pytest.approx(share)
