"""A rank that crashed comes back: who must notice, who may talk to it, and what never reaches it."""

from functools import partial

import pytest
import torch

from lowcomm.comm.base import PeerLost
from lowcomm.sim.wire.clock import Clock
from lowcomm.sim.wire.comm import World
from tests.sim.slow import SlowNetwork, byte


def world_of(programs, slow=True):
    """A world whose rank i runs programs[i](world, rank)."""
    clock = Clock(isolate_torch=False)
    world = World(clock, SlowNetwork(clock) if slow else None)
    for rank, program in enumerate(programs):
        clock.spawn(rank, partial(program, world, rank))
    return world


def crash_and_return(world, rank, outages, program):
    for crash_s, return_s in outages:
        world.clock.at(crash_s, partial(world.crash, rank))
        world.clock.at(return_s, partial(world.rejoin, rank, partial(program, world, rank)))


def test_a_view_from_before_stays_over_and_a_fresh_one_is_shared():
    def survivor(world, rank):
        clock, before = world.clock, world.comm(rank, [0, 1, 2])
        with pytest.raises(PeerLost):
            before.all_sum(byte(1)).wait()  # rank 1 is lost at 5 s, and back at 10 s
        during = world.comm(rank, [0, 1, 2])
        assert clock.now == 5.0 and not world.present(1) and world.incarnation(1) == 0
        clock.sleep(7.0 + rank)
        assert world.present(1) and world.incarnation(1) == 1
        for comm in (before, during):
            for work in (comm.all_sum(byte(1)), comm.broadcast(byte(1), 1), comm.send(byte(1), 1)):
                with pytest.raises(PeerLost) as caught:
                    work.wait()
                assert caught.value.ranks == (1,)
            with pytest.raises(PeerLost):
                comm.recv(byte(0), 1).wait()
        fresh = before.sub([0, 1, 2]) if rank == 0 else world.comm(rank, (2, 1, 0))
        return fresh.all_sum(byte(rank)).wait().item(), fresh.all_gather(byte(rank)).wait()[1].item(), clock.now

    def first(world, rank):
        world.clock.sleep(50.0)

    def second(world, rank):
        comm = world.comm(rank, [0, 1, 2])
        return comm.all_sum(byte(rank)).wait().item(), comm.all_gather(byte(rank)).wait()[1].item(), world.clock.now

    world = world_of([survivor, first, survivor])
    crash_and_return(world, 1, [(5.0, 10.0)], second)
    assert world.clock.run() == [(3, 1, 17.0)] * 3  # together from 14 s on: a byte, then two


def test_what_was_sent_to_the_dead_does_not_reach_the_returned():
    def survivor(world, rank):
        comm = world.comm(0, [0, 1])
        arrived = comm.send(byte(1), 1)  # there at 1 s, and never received
        under_way = comm.send(torch.zeros(6, dtype=torch.uint8), 1)  # until 6 s
        world.clock.sleep(10.0)
        arrived.wait()
        late = comm.send(byte(2), 1)  # to rank 1 as it was known
        for work in (under_way, late):
            with pytest.raises(PeerLost):
                work.wait()
        world.comm(0, [0, 1]).send(byte(3), 1).wait()

    def first(world, rank):
        world.clock.sleep(50.0)

    def second(world, rank):
        source, x = world.comm(1, [0, 1]).recv(byte(0)).wait()
        return source, x.item(), world.clock.now

    world = world_of([survivor, first])
    crash_and_return(world, 1, [(3.0, 8.0)], second)
    assert world.clock.run() == [None, (0, 3, 11.0)]


def test_a_message_from_the_dead_is_lost_even_if_sent_while_it_unwinds():
    def victim(world, rank):
        comm = world.comm(1, [0, 1])
        comm.send(torch.zeros(6, dtype=torch.uint8), 0)
        try:
            world.clock.sleep(50.0)
        finally:
            comm.send(byte(9), 0)

    def survivor(world, rank):
        work = world.comm(0, [0, 1]).recv(byte(0))
        with pytest.raises(PeerLost):
            work.wait()
        world.clock.sleep(7.0)
        with pytest.raises(PeerLost):
            work.wait()
        return world.comm(0, [0, 1]).recv(byte(0), 1).wait()[1].item()

    def second(world, rank):
        world.comm(1, [0, 1]).send(byte(4), 0).wait()

    world = world_of([survivor, victim])
    crash_and_return(world, 1, [(3.0, 8.0)], second)
    assert world.clock.run()[0] == 4


def test_views_from_before_a_return_learn_of_later_crashes():
    """Of the view that lost rank 1, rank 0 still awaits rank 2, which crashes after rank 1 is back."""

    def waits(world, rank):
        comm = world.comm(0, [0, 1, 2])
        with pytest.raises(PeerLost) as caught:
            comm.recv(byte(0), 2).wait()
        return caught.value.ranks, world.clock.now

    def sleeps(world, rank):
        world.clock.sleep(20.0)

    world = world_of([waits, sleeps, sleeps])
    crash_and_return(world, 1, [(2.0, 4.0)], sleeps)
    world.clock.at(6.0, partial(world.crash, 2))
    assert world.clock.run()[0] == ((2,), 6.0)


def test_only_who_is_gone_can_come_back():
    world = world_of([lambda world, rank: world.clock.sleep(9.0)] * 2)
    world.clock.at(1.0, partial(world.rejoin, 1, lambda: None))
    with pytest.raises(ValueError, match="rank 1 cannot come back: it is there; let it crash before"):
        world.clock.run()
