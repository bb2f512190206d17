"""A cluster as a config: hosts in regions, their links, compute times and faults.

`lowcomm.sim.cluster.presets` has ready ones. One rank runs on each host; ranks are numbered group by group.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowcomm.sim.cluster.compute import ComputeModel, Constant, Scaled
from lowcomm.sim.cluster.faults import Event, Fault, FaultPlan, Pause, SlowDown
from lowcomm.sim.cluster.hindered import Hindered
from lowcomm.sim.cluster.inputs import check_positive
from lowcomm.sim.wire.collectives import Schedule
from lowcomm.sim.wire.gloo import Gloo
from lowcomm.sim.wire.links import Links, Pairs, Transport


@dataclass(frozen=True)
class Hosts:
    """Equal hosts.

    Attributes:
        count: how many.
        up_bits_per_s: upload rate of each, over all its flows.
        down_bits_per_s: download rate of each.
        region: their region, one of `Layout.regions`.
        speed: of computing; twice the speed takes half the time.
    """

    count: int
    up_bits_per_s: float
    down_bits_per_s: float
    region: str = "here"
    speed: float = 1.0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count is {self.count}; a group needs at least 1 host")
        for name in ("up_bits_per_s", "down_bits_per_s", "speed"):
            check_positive(name, getattr(self, name))


@dataclass(frozen=True)
class Layout:
    """Hosts in regions, and the links between regions.

    Attributes:
        hosts: groups of equal ones.
        regions: names, in the order of the matrices' rows and columns.
        latency_s: [regions, regions], one way, from row to column; on the diagonal between hosts of one region.
        path_bits_per_s: [regions, regions]; the limit between one pair of hosts, beside their own links; None: no
            limit.
    """

    hosts: Sequence[Hosts]
    regions: Sequence[str] = ("here",)
    latency_s: Sequence[Sequence[float]] = ((0.0,),)
    path_bits_per_s: Sequence[Sequence[float]] | None = None

    def __post_init__(self) -> None:
        if not self.hosts:
            raise ValueError("hosts is empty; a cluster needs at least one")
        if len(set(self.regions)) != len(self.regions):
            raise ValueError(f"regions is {list(self.regions)}; each name may stand there once")
        for group in self.hosts:
            if group.region not in self.regions:
                raise ValueError(f"hosts stand in {group.region!r}, but regions are {list(self.regions)}; add it there")
        self._check_matrix("latency_s", self.latency_s)
        if self.path_bits_per_s is not None:
            self._check_matrix("path_bits_per_s", self.path_bits_per_s)
        for i, a in enumerate(self.regions):
            for j, b in enumerate(self.regions):
                if not 0 <= self.latency_s[i][j] < math.inf:
                    raise ValueError(
                        f"latency_s from {a} to {b} is {self.latency_s[i][j]}; it must be 0 or more, finite"
                    )
                if self.path_bits_per_s is not None:
                    check_positive(f"path_bits_per_s from {a} to {b}", self.path_bits_per_s[i][j])

    def _check_matrix(self, name: str, matrix: Sequence[Sequence[float]]) -> None:
        n = len(self.regions)
        if len(matrix) != n or any(len(row) != n for row in matrix):
            raise ValueError(
                f"{name} has {len(matrix)} rows of lengths {[len(row) for row in matrix]}; {n} regions "
                f"({', '.join(self.regions)}) need {n} rows of {n} numbers"
            )

    def of_ranks(self) -> list[Hosts]:
        """The group of each rank."""
        return [group for group in self.hosts for _ in range(group.count)]


@dataclass(frozen=True, kw_only=True)
class Cluster(ABC):
    """Machines to simulate a run on.

    Attributes:
        compute: the time of inner steps on a host of speed 1.
        faults: see `lowcomm.sim.cluster.faults.FaultPlan`.
        transport: how messages use the links.
        schedule: the messages of each collective. It determines seconds and the trace's flows; the bytes in the metrics
            are always a ring's, see `lowcomm.comm.metered`.
    """

    compute: ComputeModel = Constant()
    faults: Sequence[Fault] = ()
    transport: Transport = Transport()
    schedule: Schedule = Gloo()

    def __post_init__(self) -> None:
        FaultPlan(self.faults)
        self.links()
        self.schedule.check(tuple(range(self.num_ranks)))

    @abstractmethod
    def layout(self) -> Layout:
        """The hosts, and what joins them; ValueError for a cluster that cannot be."""

    @property
    def num_ranks(self) -> int:
        """One for each host."""
        return sum(group.count for group in self.layout().hosts)

    def regions(self) -> list[str]:
        """The region of each rank."""
        return [group.region for group in self.layout().of_ranks()]

    def links(self) -> Links:
        """The links of the ranks."""
        layout = self.layout()
        of_ranks = layout.of_ranks()
        number = {region: i for i, region in enumerate(layout.regions)}
        where = [number[group.region] for group in of_ranks]
        paths = layout.path_bits_per_s
        return Links(
            up_bits_per_s=[group.up_bits_per_s for group in of_ranks],
            down_bits_per_s=[group.down_bits_per_s for group in of_ranks],
            latency_s=_between(where, layout.latency_s),
            path_bits_per_s=None if paths is None else _between(where, paths),
            transport=self.transport,
        )

    def compute_model(self) -> ComputeModel:
        """The time of inner steps on each rank, with host speeds, pauses and slow-downs."""
        speeds, events = [group.speed for group in self.layout().of_ranks()], self.fault_events()
        model = self.compute if set(speeds) == {1.0} else Scaled(self.compute, speeds)
        return Hindered(model, events) if any(isinstance(event, Pause | SlowDown) for event in events) else model

    def check_steps(self, num_steps: int) -> None:
        """Check each rank's first and last step time, which a file or list may lack, before a run starts.

        Raises:
            ValueError: when one is missing, negative or not finite.
        """
        model = replace(self, compute=self.compute.calibrated(1.0)).compute_model()
        for rank in range(self.num_ranks):
            for t in (num_steps, 1):
                seconds = model.seconds(rank, t, 0.0)
                if not 0 <= seconds < math.inf:
                    raise ValueError(
                        f"step {t} of rank {rank} would take {seconds} s; check the numbers of cluster.compute, which "
                        "must give each step a finite time of 0 s or more"
                    )

    def fault_events(self) -> list[Event]:
        """Everything that goes wrong, by time; ValueErrors as `FaultPlan.events`."""
        return FaultPlan(self.faults).events(self.regions())


@dataclass(frozen=True)
class Custom(Cluster):
    """Any cluster.

    Attributes:
        hosts_and_paths: what there is.
    """

    hosts_and_paths: Layout

    def layout(self) -> Layout:
        """As given."""
        return self.hosts_and_paths


def _between(where: Sequence[int], matrix: Sequence[Sequence[float]]) -> Pairs:
    """A function of two ranks from a matrix of regions; a matrix of ranks would be quadratic in their number."""

    def between(source: int, to: int) -> float:
        return matrix[where[source]][where[to]]

    return between
