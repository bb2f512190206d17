"""Faults on the clock, by hand-written programs: frozen ranks, slow links, partitions, alone and overlapping."""

from functools import partial

import pytest
import torch

from lowcomm.sim.cluster.faults import Crash, FaultPlan, Partition, Pause, SlowDown
from lowcomm.sim.inject import schedule_faults
from lowcomm.sim.wire.clock import Clock
from lowcomm.sim.wire.comm import World
from lowcomm.sim.wire.links import BARE, Links
from lowcomm.sim.wire.network import Network
from tests.sim.slow import byte


def run(programs, faults):
    """What program(comm, clock) returns on each rank; up-links carry a byte a second, down-links two."""
    clock = Clock(isolate_torch=False)
    n = len(programs)
    links = Links([8.0] * n, [16.0] * n, lambda source, to: 0.0, transport=BARE)
    network = Network(clock, links)
    world = World(clock, network)
    schedule_faults(FaultPlan(faults).events(["here"] * n), clock, world, network)
    for rank, program in enumerate(programs):
        clock.spawn(rank, partial(program, world.comm(rank, range(n)), clock))
    return clock.run()


def sends(num_bytes):
    def program(comm, clock):
        comm.send(torch.zeros(num_bytes, dtype=torch.uint8), 1)
        clock.sleep(60.0)

    return program


def receives(num_bytes):
    def program(comm, clock):
        comm.recv(torch.zeros(num_bytes, dtype=torch.uint8), 0).wait()
        return clock.now

    return program


@pytest.mark.parametrize(
    ("faults", "arrival_s"),
    [
        ([], 12.0),
        ([SlowDown(0, 4.0, 2.0, 8.0, "network")], 18.0),  # 2 bytes, 2 in the window, 8 from 10 s on
        ([SlowDown(1, 4.0, 2.0, 8.0, "network")], 16.0),  # 2 bytes, 4 in the window, 6
        ([SlowDown(0, 4.0, 2.0, 8.0)], 12.0),  # of compute
        # 2 bytes, 1 at half, 1 at a quarter until 8 s, 2 at half until 12 s, 6
        ([SlowDown(0, 2.0, 2.0, 10.0, "network"), SlowDown(0, 2.0, 4.0, 4.0, "network")], 18.0),
        ([Partition([[0]], 3.0, 5.0)], 17.0),
        ([Partition([[0], [1]], 3.0, 5.0), Partition([[1]], 6.0, 5.0)], 20.0),
        ([Partition([[0], [1]], 3.0, 9.0), Partition([[1]], 6.0, 2.0)], 21.0),
        ([Partition([[0, 1]], 3.0, 5.0)], 12.0),
        ([Pause(0, 1.0, 50.0)], 12.0),  # a frozen sender's system goes on sending
        ([Pause(1, 1.0, 50.0)], 51.0),  # and who is frozen cannot read what has come
        ([Pause(1, 1.0, 5.0)], 12.0),
        ([Pause(1, 1.0, 20.0), Pause(1, 5.0, 4.0)], 21.0),
        ([Pause(1, 1.0, 15.0), Pause(1, 5.0, 20.0)], 25.0),
    ],
    ids=str,
)
def test_a_message_of_twelve_bytes(faults, arrival_s):
    assert run([sends(12), receives(12), lambda comm, clock: None], faults)[1] == pytest.approx(arrival_s)


def test_a_frozen_rank_says_nothing_new():
    """Both exchanges take a second; rank 1 is frozen when the first ends, so the second starts when it goes on."""

    def program(comm, clock):
        comm.all_sum(byte(1)).wait()
        first_s = clock.now
        comm.all_sum(byte(1)).wait()
        return first_s, clock.now

    assert run([program] * 2, []) == [(1.0, 2.0)] * 2
    assert run([program] * 2, [Pause(1, 0.5, 9.5)]) == [(1.0, 11.0), (10.0, 11.0)]


def test_a_frozen_rank_can_crash_and_its_messages_with_it():
    def program(comm, clock):
        clock.sleep(5.0)
        raise AssertionError("it is gone")

    faults = [Pause(0, 2.0, 20.0), Crash(0, 8.0)]
    assert run([program, lambda comm, clock: clock.sleep(30.0)], faults) == [None, None]


def test_a_rank_that_comes_back_is_not_frozen():
    clock = Clock(isolate_torch=False)
    world = World(clock)

    def second():
        clock.sleep(1.0)
        return clock.now

    clock.spawn(0, lambda: clock.sleep(50.0))
    clock.at(1.0, partial(clock.pause, 0, 100.0))
    clock.at(2.0, partial(world.crash, 0))
    clock.spawn(1, lambda: clock.sleep(9.0))
    clock.at(3.0, partial(world.rejoin, 0, second))
    assert clock.run() == [4.0, None]
