"""Worlds of one process keep the promises of `Comm` that a larger one would hold them to."""

import pytest
import torch

from lowcomm.comm.echo import EchoComm
from lowcomm.comm.solo import SoloComm


@pytest.mark.parametrize("comm", [SoloComm(), EchoComm(2)], ids=["solo", "echo"])
def test_what_no_wire_can_sum_is_refused(comm):
    with pytest.raises(ValueError, match="cannot be summed"):
        comm.all_sum(torch.ones(2, dtype=torch.bool))


def test_an_echo_of_a_high_rank_has_smaller_and_smaller_views():
    pair = EchoComm(8, rank=5).sub((4, 5))
    assert pair.all_sum(torch.ones(1)).wait() == 2
    alone = pair.sub((5,))
    assert alone.members == (5,)
    assert alone.all_sum(torch.ones(1)).wait() == 1
