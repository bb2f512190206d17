"""Simulations for tests: a network that is easily computed by hand, and a program on each rank."""

from functools import partial

import torch

from lowcomm.sim.wire.clock import Clock
from lowcomm.sim.wire.collectives import Ring
from lowcomm.sim.wire.comm import World
from lowcomm.sim.wire.links import BARE, Links
from lowcomm.sim.wire.network import Network


class SlowNetwork:
    """Each transfer takes a second per byte, on one path three seconds, whatever else is under way."""

    def __init__(self, clock, slow_path=None):
        self.clock, self.slow_path, self.ended = clock, slow_path, []

    def send(self, source, to, num_bytes, on_end, num_latencies=1.0, turns=None):
        assert source != to
        seconds = num_bytes * (3 if (source, to) == self.slow_path else 1)

        def end():
            self.ended.append((self.clock.now, source, to))
            on_end()

        return self.clock.at(self.clock.now + seconds, end)

    def cancel(self, flow):
        flow.cancel()


def simulate(*programs, schedule=Ring(), slow=True, slow_path=None, isolate_torch=False, crashes=()):  # noqa: B008
    """Run program(comm, clock) on each rank; crashes are (rank, time)."""
    clock = Clock(isolate_torch)
    world = World(clock, SlowNetwork(clock, slow_path) if slow else None, schedule)
    members = range(len(programs))
    for rank, program in enumerate(programs):
        clock.spawn(rank, partial(program, world.comm(rank, members), clock))
    for rank, time in crashes:
        clock.at(time, partial(world.crash, rank))
    return clock.run()


def on_links(program, bytes_per_s):
    """The results of program(comm, clock) on two ranks that bare links of a rate join, and when they end."""
    clock, rates = Clock(), [8 * bytes_per_s] * 2
    world = World(clock, Network(clock, Links(rates, rates, lambda a, b: 0.0, transport=BARE)))
    for rank in (0, 1):
        clock.spawn(rank, partial(program, world.comm(rank, (0, 1)), clock))
    return clock.run(), clock.now


def byte(value):
    return torch.tensor([value], dtype=torch.uint8)
