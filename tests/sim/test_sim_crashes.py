"""What a crash does to those who wait: before, while and after the others call, and on every kind of wait."""

from functools import partial

import pytest
import torch

from lowcomm.comm.base import PeerLost
from lowcomm.sim.wire.clock import Clock
from lowcomm.sim.wire.collectives import Ring
from lowcomm.sim.wire.comm import World
from tests.sim.slow import SlowNetwork, byte, simulate

KINDS = {
    "all_sum": lambda c: c.all_sum(torch.zeros(6, dtype=torch.uint8)),
    "all_gather": lambda c: c.all_gather(torch.zeros(4, dtype=torch.uint8)),
    "all_to_all": lambda c: c.all_to_all(torch.zeros(3, 8, dtype=torch.uint8)),
    "broadcast": lambda c: c.broadcast(torch.zeros(8, dtype=torch.uint8), 0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("crash_s", [1.0, 3.0, 6.0, 9.0])
def test_a_crash_reaches_all_who_wait(kind, crash_s):
    """Ranks call at 2 s, 4 s (the one that crashes) and 5 s, and the bytes take 8 s: over at 13 s."""

    def program(comm, clock):
        clock.sleep([2.0, 4.0, 5.0][comm.rank])
        work = KINDS[kind](comm)
        with pytest.raises(PeerLost, match=f"{kind} of .*: ranks 1 are gone") as caught:
            work.wait()
        lost_s = clock.now
        with pytest.raises(PeerLost):
            comm.all_sum(byte(1)).wait()  # of the whole view nothing is left
        assert clock.now == lost_s
        survivors = comm.sub([0, 2])
        return caught.value.ranks, lost_s, survivors.all_sum(byte(comm.rank + 1)).wait().item(), clock.now

    results = simulate(*[program] * 3, crashes=[(1, crash_s)])
    first, last = max(2.0, crash_s), max(5.0, crash_s)
    assert results == [((1,), first, 4, last + 1.0), None, ((1,), last, 4, last + 1.0)]


@pytest.mark.parametrize("call_s", [2.0, 3.0, 4.0])
def test_who_crashes_at_one_moment_is_named_together_and_to_all_alike(call_s):
    """Ranks 1 and 2 crash at 3 s: while the others wait, as they call, or before. Rank 3 crashes later: no cause."""

    def program(comm, clock):
        clock.sleep(call_s)
        work = comm.all_sum(torch.zeros(6, dtype=torch.uint8))
        if comm.rank == 4:
            clock.sleep(7.0)
        with pytest.raises(PeerLost, match="ranks 1, 2 are gone") as caught:
            work.wait()
        return caught.value.ranks, clock.now

    first, late = ((1, 2), max(call_s, 3.0)), ((1, 2), call_s + 7.0)
    assert simulate(*[program] * 5, crashes=[(1, 3.0), (2, 3.0), (3, 6.0)]) == [first, None, None, first, late]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_over_survives_a_crash(kind):
    def program(comm, clock):
        work = KINDS[kind](comm)
        clock.sleep(9.0)  # a byte a second: over at 8 s
        work.wait()
        return clock.now

    assert simulate(*[program] * 3, crashes=[(1, 8.5)]) == [9.0, None, 9.0]


def test_who_is_through_survives_a_crash_of_the_rest():
    """Of a direct broadcast rank 2 has its bytes at 4 s; rank 1's are under way until 12 s."""

    def program(comm, clock):
        work = comm.broadcast(torch.zeros(4, dtype=torch.uint8), 0)
        clock.sleep(6.0 if comm.rank == 2 else 0.0)
        try:
            work.wait()
        except PeerLost:
            return "lost", clock.now
        return "received", clock.now

    results = simulate(*[program] * 3, slow_path=(0, 1), crashes=[(1, 5.0)])
    assert results == [("lost", 5.0), None, ("received", 6.0)]


def test_a_crash_frees_the_wire():
    clock = Clock(isolate_torch=False)
    network = SlowNetwork(clock)
    world = World(clock, network, Ring())

    def program(rank):
        comm = world.comm(rank, range(3))
        comm.all_sum(torch.zeros(3, dtype=torch.uint8))  # 4 bytes along each edge
        comm.all_gather(torch.zeros(5, dtype=torch.uint8))  # 10 bytes
        comm.send(torch.zeros(6 + rank, dtype=torch.uint8), (rank + 1) % 3)
        clock.sleep(50.0)

    for rank in range(3):
        clock.spawn(rank, partial(program, rank))
    clock.at(5.0, lambda: world.crash(1))
    clock.run()
    assert network.ended == [(4.0, 0, 1), (4.0, 1, 2), (4.0, 2, 0), (8.0, 2, 0)]


def test_a_view_made_after_the_crash_knows_of_it():
    def program(comm, clock):
        clock.sleep(3.0)
        for members in ([0, 1], [0, 1, 2]):
            with pytest.raises(PeerLost) as caught:
                comm.sub(members).all_sum(byte(1)).wait()
            assert caught.value.ranks == (1,) and clock.now == 3.0
            with pytest.raises(PeerLost):
                comm.sub(members).recv(byte(1), 1).wait()

    simulate(program, lambda comm, clock: clock.sleep(9.0), lambda comm, clock: None, crashes=[(1, 1.0)])


def test_a_rank_may_crash_itself_and_before_it_starts():
    clock = Clock(isolate_torch=False)
    world = World(clock)

    def waits(rank):
        with pytest.raises(PeerLost) as caught:
            world.comm(rank, [0, 1, 2]).all_sum(byte(1)).wait()
        return caught.value.ranks, clock.now

    def crashes():
        clock.sleep(2.0)
        world.crash(1)
        raise AssertionError("it is gone")

    clock.spawn(0, partial(waits, 0))
    clock.spawn(1, crashes)
    clock.spawn(2, partial(waits, 2), at=5.0)
    clock.at(3.0, lambda: world.crash(2))
    assert clock.run() == [((1,), 2.0), None, None]
    assert world.lost == {1, 2}


def test_messages_and_crashes():
    log = {}

    def lost(work, clock):
        with pytest.raises(PeerLost) as caught:
            work.wait()
        return caught.value.ranks, clock.now

    def victim(comm, clock):
        comm.send(byte(1), 0).wait()  # there at 1 s
        comm.send(torch.zeros(9, dtype=torch.uint8), 0)  # under way when it crashes at 3 s
        comm.recv(byte(0), 0).wait()
        log["victim"] = "went on"

    def survivor(comm, clock):
        under_way = comm.send(torch.zeros(9, dtype=torch.uint8), 1)
        assert lost(comm.recv(torch.zeros(1, dtype=torch.uint8), 2), clock) == ((2,), 2.0)
        anyone = comm.recv(byte(0))
        assert anyone.wait()[0] == 1  # it came before the crash
        from_victim, from_anyone = comm.recv(byte(0), 1), comm.recv(byte(0))
        assert lost(from_victim, clock) == ((1,), 3.0)
        assert lost(under_way, clock) == ((1,), 3.0)
        assert lost(comm.send(byte(0), 1), clock) == ((1,), 3.0)
        assert lost(comm.recv(byte(0), 2), clock) == ((2,), 3.0)
        assert lost(from_anyone, clock) == ((1, 2), 3.0)  # nobody is left
        return "survived"

    results = simulate(survivor, victim, lambda comm, clock: clock.sleep(50.0), crashes=[(2, 2.0), (1, 3.0)])
    assert results == ["survived", None, None] and not log


def test_a_message_that_overtook_another_was_there_before_the_crash():
    def sender(comm, clock):
        long, short = comm.send(torch.zeros(9, dtype=torch.uint8), 1), comm.send(byte(1), 1)
        with pytest.raises(PeerLost):
            long.wait()
        short.wait()
        return clock.now

    assert simulate(sender, lambda comm, clock: clock.sleep(50.0), crashes=[(1, 3.0)])[0] == 3.0
