"""Swaps of two ranks in virtual time: when they start and end, mistakes, and ranks that are lost."""

import pytest
import torch

from lowcomm.comm.base import PeerLost
from lowcomm.pairwise import Pairwise
from lowcomm.sim.wire.collectives import Hierarchical, Ring, Star, Transfer, Tree, TwoShot
from lowcomm.sim.wire.collectives import Pairwise as EverybodyToEverybody
from tests.sim.slow import byte, simulate

SCHEDULES = [Ring(), Tree(), TwoShot(), Star(0), EverybodyToEverybody(), Hierarchical(((0, 1), (2, 3)))]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_both_directions_go_at_once_from_when_both_are_there(schedule):
    def program(comm, clock):
        clock.sleep(2.0 * (comm.rank % 2))
        x = torch.full((5,), comm.rank, dtype=torch.uint8)
        got = comm.exchange(x, comm.rank ^ 1).wait()  # 0 with 1, 2 with 3
        assert (got == comm.rank ^ 1).all()
        return clock.now

    assert schedule.transfers("exchange", (2, 3), 7) == [Transfer(2, 3, 7, 1), Transfer(3, 2, 7, 1)]
    assert simulate(*[program] * 4, schedule=schedule) == [7.0] * 4
    assert simulate(*[program] * 4, schedule=schedule, slow_path=(1, 0)) == [17.0, 17.0, 7.0, 7.0]


def test_it_moves_while_ranks_compute_and_values_are_those_of_the_call():
    def program(comm, clock):
        x = torch.full((8,), 1.0 + comm.rank)
        work = comm.exchange(x, 1 - comm.rank)
        x.zero_()
        clock.sleep(40.0)
        got = work.wait()
        got.add_(5.0)
        again = comm.exchange(got, comm.rank).wait()
        assert torch.equal(again, got) and again.data_ptr() != got.data_ptr()
        return got[0].item(), clock.now

    assert simulate(program, program) == [(7.0, 40.0), (6.0, 40.0)]


def test_pairs_count_for_themselves():
    """Whatever else the two call, in this view or in one of their own, and in whatever order they wait."""

    def program(comm, clock):
        peers = [rank for rank in range(3) if rank != comm.rank]
        swaps = {peer: [comm.exchange(byte(10 * comm.rank + k), peer) for k in range(2)] for peer in peers}
        total = comm.all_sum(byte(1))
        if comm.rank < 2:
            pair = comm.sub([0, 1])
            other = pair.exchange(byte(100 + comm.rank), 1 - comm.rank)
            assert pair.all_sum(byte(2)).wait().item() == 4
            assert other.wait().item() == 101 - comm.rank
        for peer in reversed(peers):
            assert [work.wait().item() for work in reversed(swaps[peer])] == [10 * peer + 1, 10 * peer]
        assert total.wait().item() == 3

    simulate(*[program] * 3)
    simulate(*[program] * 3, slow=False)


def test_bad_ranks():
    def program(comm, clock):
        with pytest.raises(ValueError, match="rank 5 is not among"):
            comm.exchange(torch.ones(1), 5)
        with pytest.raises(ValueError, match=r"must hold this rank, 0, and be among \(0,\)"):
            Pairwise(comm, [0, 5])
        alone = Pairwise(comm, [0])
        for call in (
            lambda: alone.send(byte(1), 5),
            lambda: alone.recv(byte(1), 5),
            lambda: alone.exchange(byte(1), 5),
        ):
            with pytest.raises(ValueError, match="rank 5 is not among"):
                call()
        with pytest.raises(ValueError, match="name the source"):
            alone.recv(byte(1))
        with pytest.raises(ValueError, match="not all among"):
            alone.sub([0, 5])
        with pytest.raises(ValueError, match="for 1 members; give one row for each"):
            alone.all_to_all(torch.ones(2))

    simulate(program)


def test_a_crash_ends_the_swaps_of_the_lost_rank_alone():
    def program(comm, clock):
        if comm.rank == 2:
            clock.sleep(100.0)
        x = torch.zeros(10, dtype=torch.uint8)
        early, other = comm.exchange(x, 2), comm.exchange(x, 1 - comm.rank)
        with pytest.raises(PeerLost) as caught:
            early.wait()
        assert caught.value.ranks == (2,) and clock.now == 5.0
        assert torch.equal(other.wait(), x) and clock.now == 10.0  # what the other two began
        assert torch.equal(comm.exchange(x, 1 - comm.rank).wait(), x)  # and begin
        with pytest.raises(PeerLost):
            comm.exchange(x, 2).wait()
        pair = Pairwise(comm, [0, 1])
        assert pair.all_sum(byte(3)).wait().item() == 6
        return clock.now

    assert simulate(*[program] * 3, crashes=[(2, 5.0)])[:2] == [21.0, 21.0]
