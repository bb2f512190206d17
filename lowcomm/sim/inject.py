"""Schedules faults on the clock.

A `Notice` changes nothing by itself, and a step through a `Pause` or a `SlowDown` of compute takes longer by
`lowcomm.sim.cluster.hindered`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from lowcomm.sim.cluster.faults import Crash, Event, Partition, Pause, SlowDown
from lowcomm.sim.cluster.hindered import slowness
from lowcomm.sim.wire.clock import Clock
from lowcomm.sim.wire.comm import World
from lowcomm.sim.wire.network import Network


def schedule_faults(events: Sequence[Event], clock: Clock, world: World, network: Network) -> None:
    """Put crashes, pauses, partitions and slow links on the clock.

    Slow-downs of one link that overlap multiply; a pair of ranks is apart as long as any partition parts it. Returns
    need a program, see `World.rejoin`.
    """
    for event in events:
        if isinstance(event, Crash):
            clock.at(event.at_s, partial(world.crash, event.rank))
        elif isinstance(event, Pause):
            clock.at(event.at_s, partial(clock.pause, event.rank, event.at_s + event.seconds))
    slow = [event for event in events if isinstance(event, SlowDown) and event.what == "network"]
    for rank in sorted({event.rank for event in slow}):
        up, down = network.links.up_bits_per_s[rank], network.links.down_bits_per_s[rank]
        windows = [(event.at_s, event.at_s + event.seconds, event.factor) for event in slow if event.rank == rank]
        for moment, factor in zip(*slowness(windows), strict=True):
            clock.at(moment, partial(network.set_rate, rank, up / factor, down / factor))
    _schedule_partitions([event for event in events if isinstance(event, Partition)], clock, network)


def _schedule_partitions(partitions: Sequence[Partition], clock: Clock, network: Network) -> None:
    apart: set[tuple[int, int]] = set()
    for moment in sorted({moment for event in partitions for moment in (event.at_s, event.at_s + event.seconds)}):
        lasting = [event for event in partitions if event.at_s <= moment < event.at_s + event.seconds]
        now = {pair for event in lasting for pair in event.pairs(network.links.num_ranks)}
        for pairs, change in ((now - apart, network.block), (apart - now, network.unblock)):
            for source, to in sorted(pairs):
                clock.at(moment, partial(change, source, to))
        apart = now
