"""The machines of a cluster in virtual time: one rank's program runs on each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.sim.cluster.cluster import Cluster
from lowcomm.sim.inject import schedule_faults
from lowcomm.sim.pace import Pace
from lowcomm.sim.record.trace import Trace
from lowcomm.sim.wire.clock import Clock
from lowcomm.sim.wire.comm import World
from lowcomm.sim.wire.network import Network

T = TypeVar("T")


class Machines:
    """A clock, a wire and a timeline for all ranks, with the cluster's links, steps and faults.

    Args:
        isolate_torch, before_turn: see `Clock`.
    """

    def __init__(self, cluster: Cluster, isolate_torch: bool, before_turn: Callable[[int], None] | None = None) -> None:
        self.clock, self.trace = Clock(isolate_torch, before_turn), Trace()
        self._compute, self._members = cluster.compute_model(), tuple(range(cluster.num_ranks))
        network = Network(self.clock, cluster.links(), self.trace.add_flow)
        self._world = World(self.clock, network, cluster.schedule)
        schedule_faults(cluster.fault_events(), self.clock, self._world, network)

    def comm(self, rank: int, on_timely: Callable[[str], None] | None = None) -> MeteredComm:
        """A rank's view of all ranks, with its waits in the timeline; see `Meter` for ``on_timely``."""
        meter = Meter(
            on_timely=on_timely,
            on_wait=lambda tag, start_s, end_s: self.trace.add(rank, "wait", start_s, end_s, tag),
        )
        return MeteredComm(self._world.comm(rank, self._members), meter)

    def pace(self, rank: int) -> Pace:
        """The time of a rank's steps."""
        return Pace(self.clock, self._compute, self.trace, rank)

    def run(self, program: Callable[[int], T]) -> list[Any]:
        """Let every rank run its program to the end; see `Clock.run`."""
        stopped_s: dict[int, float] = {}  # when ranks ended by an exception

        def noted(rank: int) -> T:
            try:
                return program(rank)
            except BaseException:
                stopped_s[rank] = self.clock.now
                raise

        for rank in self._members:
            self.clock.spawn(rank, partial(noted, rank))
        try:
            return self.clock.run()
        finally:
            self.trace.stop(stopped_s)
