"""Worlds of one process keep the promises of `Comm` that a larger one would hold them to."""

import pytest
import torch

from lowcomm import Meter, MeteredComm, SoloComm
from lowcomm.comm.echo import EchoComm
from lowcomm.joined import JoinedComm
from lowcomm.pairwise import Pairwise
from tests.same_code.cases import wire_laws


@pytest.mark.parametrize("rank", [0, 3])
def test_alone_the_laws_of_the_wire_hold(rank):
    wire_laws(SoloComm(rank))


def test_messages_to_oneself_are_copies_that_keep_their_order():
    comm, x = SoloComm(2), torch.tensor([1.0])
    comm.send(x, 2)
    comm.send(x.add_(1), 2)
    assert [comm.recv(x, source).wait() for source in (2, None)] == [(2, 1.0), (2, 2.0)]
    with pytest.raises(ValueError, match="nothing was sent"):
        comm.recv(x)
    for call in (comm.send, comm.recv, comm.exchange, comm.broadcast):
        with pytest.raises(ValueError, match="rank 0 is not among"):
            call(x, 0)


def test_an_echo_of_a_high_rank_has_smaller_and_smaller_views():
    pair = EchoComm(8, rank=5).sub((4, 5))
    assert pair.all_sum(torch.ones(1)).wait() == 2
    alone = pair.sub((5,))
    assert alone.members == (5,)
    assert alone.all_sum(torch.ones(1)).wait() == 1


def test_an_echo_answers_with_tensors_of_its_own():
    comm, x = EchoComm(3, rank=1), torch.ones(2)
    lists = [comm.all_gather(x).wait(), comm.all_to_all(torch.stack([0 * x, x, 3 * x])).wait()]
    single = [comm.all_sum(x).wait(), comm.broadcast(x, 0).wait(), comm.exchange(x, 2).wait(), comm.recv(x).wait()[1]]
    answers = [x, *lists[0], *lists[1], *single]
    assert len({y.untyped_storage().data_ptr() for y in [x, *lists, *single]}) == 1 + 2 + 4
    assert len({y.data_ptr() for y in answers}) == 1 + 3 + 3 + 4
    assert [y.tolist() for y in answers[1:]] == [[1, 1]] * 6 + [[3, 3]] + [[1, 1]] * 3
    assert comm.recv(x).wait()[0] == 2 and EchoComm(3, rank=2).recv(x).wait()[0] == 0


def test_small_sums_are_one_message_and_a_full_one_does_not_wait():
    meter = Meter()
    comm = JoinedComm(MeteredComm(EchoComm(2), meter), limit_bytes=24)
    works = [comm.all_sum(torch.full((2,), 1.0)), comm.all_sum(torch.full((1, 1), 2.0, dtype=torch.float64))]
    assert meter.bytes_sent == 0
    works.append(comm.all_sum(torch.full((4, 1), 3.0)))
    assert meter.state_dict()["by_tag"]["sync"] == [24, 24, 1]
    works.append(comm.all_sum(torch.full((), 4.0)))
    comm.flush()
    assert meter.state_dict()["by_tag"]["sync"] == [36, 36, 3]
    totals = [works[i].wait() for i in (3, 1, 0, 2)]
    assert [(y.tolist(), y.dtype) for y in totals] == [
        (8.0, torch.float32),
        ([[4.0]], torch.float64),
        ([2.0, 2.0], torch.float32),
        ([[6.0]] * 4, torch.float32),
    ]


def test_pairs_have_nothing_to_do_with_ranks_outside_of_their_group():
    group, x = Pairwise(EchoComm(3), (1, 0)), torch.ones(1)
    for call in (group.broadcast, group.send, group.recv, group.exchange):
        with pytest.raises(ValueError, match="rank 2 is not among the members 0, 1"):
            call(x, 2)
    assert isinstance(group.sub((0,)), Pairwise), "which no process group is made for either"
