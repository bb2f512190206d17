"""Ready clusters: uniform, data centre, LAN, homes, and the published tables of AWS regions.

The tables are those of DT-FM (Yuan et al. 2022, arXiv:2206.01288), `scheduler/generate_sim_com_matrices.py` of its
code: rates are what NCCL reached between two p3.2xlarge over four sockets and a VPN, not what the links can carry.

Differs from the paper in: its delays were measured by ping, so they are round trips, although its scheduler takes them
for one way; here half of each is the one-way latency. Rates hold between two hosts, as there. A host's own links, of
which the paper says nothing, carry 10 Gbit/s over all its flows: "up to 10 Gbit/s" is what AWS lists for the network of
a p3.2xlarge.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lowcomm.sim.cluster.cluster import Cluster, Hosts, Layout

_HOST_BITS_PER_S = 10e9

_WITHIN_REGION = (10.0, 2.0)  # round trip in ms and Gbit/s that DT-FM assumes within a region

_AWS = ("Oregon", "Virginia", "Ohio", "Tokyo", "Seoul", "Singapore", "Sydney", "London", "Frankfurt", "Ireland")
# Row i: from region i to those after it.
_AWS_ROUND_TRIP_MS = (
    (67, 49, 96, 124, 163, 139, 136, 143, 124),
    (11, 143, 172, 230, 197, 76, 90, 67),
    (130, 159, 197, 185, 86, 99, 77),
    (34, 73, 100, 210, 223, 199),
    (74, 148, 238, 235, 228),
    (92, 169, 155, 179),
    (262, 265, 254),
    (14, 12),
    (24,),
    (),
)
_AWS_GBIT_PER_S = (
    (0.79, 1.10, 0.523, 0.46, 0.341, 0.36, 0.42, 0.404, 0.482),
    (1.12, 0.524, 0.50, 0.364, 0.383, 1.16, 1.02, 1.05),
    (0.694, 0.529, 0.452, 0.484, 1.05, 0.799, 1.14),
    (1.10, 1.01, 0.761, 0.366, 0.36, 0.465),
    (1.14, 0.58, 0.342, 0.358, 0.335),
    (0.816, 0.50, 0.535, 0.492),
    (0.326, 0.328, 0.344),
    (1.14, 1.09),
    (1.08,),
    (),
)
# DT-FM's regional scenario: with California, and another rate between Virginia and Oregon.
_STATES = ("Virginia", "Oregon", "California", "Ohio")
_STATES_ROUND_TRIP_MS = ((67, 59, 11), (12, 49), (52,), ())
_STATES_GBIT_PER_S = ((1.15, 1.05, 1.12), (1.25, 1.10), (1.02,), ())


@dataclass(frozen=True)
class _Even(Cluster, ABC):
    """Equal hosts, each as far from every other.

    Attributes:
        bits_per_s: up and down.
        latency_s: one way.
    """

    num_hosts: int = 8
    bits_per_s: float = 1e9
    latency_s: float = 0.01

    def layout(self) -> Layout:
        return _one_region(self.num_hosts, self.bits_per_s, self.bits_per_s, self.latency_s)


@dataclass(frozen=True)
class Uniform(_Even):
    """Equal hosts, each as far from every other."""


@dataclass(frozen=True)
class DataCentre(_Even):
    """Hosts on a fast fabric; as `Uniform` with 100 Gbit/s and 10 microseconds."""

    bits_per_s: float = 100e9
    latency_s: float = 10e-6


@dataclass(frozen=True)
class LAN(_Even):
    """Hosts in one building; as `Uniform` with 1 Gbit/s and 0.2 ms."""

    latency_s: float = 0.2e-3


@dataclass(frozen=True)
class Home(Cluster):
    """Machines at home, with slower up-links than down-links.

    Attributes:
        latency_s: one way, from one home to another.
    """

    num_hosts: int = 8
    up_bits_per_s: float = 20e6
    down_bits_per_s: float = 100e6
    latency_s: float = 0.02

    def layout(self) -> Layout:
        return _one_region(self.num_hosts, self.up_bits_per_s, self.down_bits_per_s, self.latency_s)


@dataclass(frozen=True)
class AWS10(Cluster):
    """Hosts in ten AWS regions, or in some of them.

    Attributes:
        hosts_per_region: how many in each.
        regions_used: their names, in the order of ranks.
    """

    hosts_per_region: int = 1
    regions_used: Sequence[str] = _AWS

    def layout(self) -> Layout:
        """The table's regions; ValueError for another."""
        return _aws(self.regions_used, self.hosts_per_region)


@dataclass(frozen=True)
class DTFM(Cluster):
    """The five scenarios of DT-FM; theirs have 64 hosts, each one GPU.

    Attributes:
        scenario: "on_demand": machines of eight GPUs, 100 Gbit/s within and 25 Gbit/s, in eight equal parts, between.
            "spot": half of the GPUs on machines of four with 100 Gbit/s within, half alone; 1.25 Gbit/s between all.
            "universities": Ohio and Virginia, 5 Gbit/s within and 1.12 Gbit/s between.
            "regional": four regions of the United States.
            "worldwide": eight of the ten AWS regions, without Singapore and Sydney.
        num_hosts: a multiple of the number of machines or regions.
    """

    scenario: Literal["on_demand", "spot", "universities", "regional", "worldwide"] = "worldwide"
    num_hosts: int = 64

    def layout(self) -> Layout:
        """Machines are regions in the first two scenarios."""
        if self.scenario == "on_demand":
            return _machines([8] * self._share(8), 3.125e9)
        if self.scenario == "spot":
            return _machines([4] * self._share(8) + [1] * (self.num_hosts // 2), 1.25e9)
        if self.scenario == "universities":
            return _geographic(("Ohio", "Virginia"), self._share(2), ((11,), ()), ((1.12,), ()), (1.0, 5.0))
        if self.scenario == "regional":
            share = self._share(len(_STATES))
            return _geographic(_STATES, share, _STATES_ROUND_TRIP_MS, _STATES_GBIT_PER_S, _WITHIN_REGION)
        if self.scenario == "worldwide":
            return _aws([region for region in _AWS if region not in ("Singapore", "Sydney")], self._share(8))
        raise ValueError(
            f"scenario is {self.scenario!r}; DT-FM has on_demand, spot, universities, regional and worldwide"
        )

    def _share(self, num_parts: int) -> int:
        share, rest = divmod(self.num_hosts, num_parts)
        if rest or share < 1:
            raise ValueError(f"num_hosts is {self.num_hosts}; {self.scenario} needs a multiple of {num_parts}")
        return share


def _one_region(num_hosts: int, up_bits_per_s: float, down_bits_per_s: float, latency_s: float) -> Layout:
    return Layout([Hosts(num_hosts, up_bits_per_s, down_bits_per_s)], latency_s=[[latency_s]])


def _machines(sizes: Sequence[int], between_bits_per_s: float) -> Layout:
    """GPUs on machines without delay; 100 Gbit/s between those of one machine."""
    within_bits_per_s = 100e9
    names = [f"machine_{i}" for i in range(len(sizes))]
    hosts = [Hosts(size, within_bits_per_s, within_bits_per_s, name) for size, name in zip(sizes, names, strict=True)]
    paths = [[within_bits_per_s if a == b else between_bits_per_s for b in names] for a in names]
    return Layout(hosts, names, [[0.0] * len(names)] * len(names), paths)


def _aws(regions: Sequence[str], hosts_per_region: int) -> Layout:
    unknown = [region for region in regions if region not in _AWS]
    if unknown or len(set(regions)) != len(regions):
        raise ValueError(f"regions are {list(regions)}; take each at most once, from {', '.join(_AWS)}")
    whole = _geographic(_AWS, hosts_per_region, _AWS_ROUND_TRIP_MS, _AWS_GBIT_PER_S, _WITHIN_REGION)
    at = [_AWS.index(region) for region in regions]
    assert whole.path_bits_per_s is not None
    latency_s = [[whole.latency_s[i][j] for j in at] for i in at]
    return Layout(
        [whole.hosts[i] for i in at], regions, latency_s, [[whole.path_bits_per_s[i][j] for j in at] for i in at]
    )


def _geographic(
    regions: Sequence[str],
    hosts_per_region: int,
    round_trip_ms: Sequence[Sequence[float]],
    gbit_per_s: Sequence[Sequence[float]],
    within: tuple[float, float],
) -> Layout:
    """Regions with a triangle of distances and one of rates; ``within`` holds inside each region, in (ms, Gbit/s)."""
    return Layout(
        [Hosts(hosts_per_region, _HOST_BITS_PER_S, _HOST_BITS_PER_S, region) for region in regions],
        regions,
        _square(round_trip_ms, within[0], 1e-3 / 2),
        _square(gbit_per_s, within[1], 1e9),
    )


def _square(triangle: Sequence[Sequence[float]], diagonal: float, unit: float) -> list[list[float]]:
    """A symmetric matrix in another unit, from the rows above its diagonal."""
    n = len(triangle)
    return [[unit * (diagonal if i == j else triangle[min(i, j)][abs(i - j) - 1]) for j in range(n)] for i in range(n)]
