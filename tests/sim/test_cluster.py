"""Clusters: presets against their published tables, YAML, and what cannot be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from lowcomm.config import describe
from lowcomm.sim.cluster.cluster import Cluster, Custom, Hosts, Layout
from lowcomm.sim.cluster.compute import ComputeModel, Constant, Diurnal, Measured, Product, Replay, Scaled
from lowcomm.sim.cluster.drawn import LogNormal, Markov
from lowcomm.sim.cluster.faults import Crash, Pause, RegionShock
from lowcomm.sim.cluster.lifetimes import Weibull
from lowcomm.sim.cluster.presets import AWS10, DTFM, LAN, DataCentre, Home, Uniform
from lowcomm.sim.wire.collectives import Hierarchical, Schedule, Star, Tree
from lowcomm.sim.wire.gloo import Gloo
from lowcomm.sim.wire.links import Transport
from tests.refusals import refused

TWO_SITES = Layout(
    hosts=[Hosts(2, 1e9, 2e9, "eu"), Hosts(1, 3e6, 4e6, "us", speed=0.5)],
    regions=["us", "eu"],
    latency_s=[[0.001, 0.05], [0.06, 0.002]],
    path_bits_per_s=[[5e9, 1e6], [2e6, 6e9]],
)


def test_custom_numbers_ranks_group_by_group() -> None:
    cluster = Custom(TWO_SITES, transport=Transport(streams=4, window_bytes=1.25e6, latency_factor=1.0))
    links = cluster.links()
    assert cluster.num_ranks == links.num_ranks == 3
    assert cluster.regions() == ["eu", "eu", "us"]
    assert (list(links.up_bits_per_s), list(links.down_bits_per_s)) == ([1e9, 1e9, 3e6], [2e9, 2e9, 4e6])
    assert [links.latency(*pair) for pair in ((0, 1), (0, 2), (2, 0), (2, 2))] == [0.002, 0.06, 0.05, 0.001]
    assert [links.path(*pair) for pair in ((0, 1), (1, 2), (2, 1))] == [6e9, 2e6, 1e6]
    assert links.window_bytes() == 4 * 1.25e6
    assert links.transport == cluster.transport


def test_compute_by_speed_and_through_faults() -> None:
    cluster = Custom(TWO_SITES, compute=Constant(2.0), faults=[Pause(1, 1.0, 5.0)])
    model = cluster.compute_model()
    assert [model.seconds(rank, 1, 0.0) for rank in range(3)] == [2.0, 7.0, 4.0]
    assert LAN(compute=LogNormal()).compute_model() == LogNormal()


def test_faults_know_the_regions() -> None:
    cluster = Custom(TWO_SITES, faults=[RegionShock("eu", 3.0)])
    assert cluster.fault_events() == [Crash(0, 3.0), Crash(1, 3.0)]


@pytest.mark.parametrize(
    ("cluster", "num_ranks", "up", "down", "latency_s"),
    [
        (Uniform(5, 3e8, 0.03), 5, 3e8, 3e8, 0.03),
        (DataCentre(), 8, 100e9, 100e9, 10e-6),
        (LAN(), 8, 1e9, 1e9, 0.2e-3),
        (Home(4), 4, 20e6, 100e6, 0.02),
    ],
)
def test_one_region(cluster: Cluster, num_ranks: int, up: float, down: float, latency_s: float) -> None:
    links = cluster.links()
    assert list(links.up_bits_per_s) == [up] * num_ranks
    assert list(links.down_bits_per_s) == [down] * num_ranks
    assert links.latency(0, 1) == links.latency(num_ranks - 1, 0) == latency_s
    assert links.path(0, 1) == math.inf


PUBLISHED = """
Or-Va 67/.79, Or-Oh 49/1.10, Or-Tok 96/.523, Or-Seo 124/.46, Or-Sin 163/.341, Or-Syd 139/.36, Or-Lon 136/.42,
Or-Fra 143/.404, Or-Ire 124/.482, Va-Oh 11/1.12, Va-Tok 143/.524, Va-Seo 172/.50, Va-Sin 230/.364, Va-Syd 197/.383,
Va-Lon 76/1.16, Va-Fra 90/1.02, Va-Ire 67/1.05, Oh-Tok 130/.694, Oh-Seo 159/.529, Oh-Sin 197/.452, Oh-Syd 185/.484,
Oh-Lon 86/1.05, Oh-Fra 99/.799, Oh-Ire 77/1.14, Tok-Seo 34/1.10, Tok-Sin 73/1.01, Tok-Syd 100/.761, Tok-Lon 210/.366,
Tok-Fra 223/.36, Tok-Ire 199/.465, Seo-Sin 74/1.14, Seo-Syd 148/.58, Seo-Lon 238/.342, Seo-Fra 235/.358,
Seo-Ire 228/.335, Sin-Syd 92/.816, Sin-Lon 169/.50, Sin-Fra 155/.535, Sin-Ire 179/.492, Syd-Lon 262/.326,
Syd-Fra 265/.328, Syd-Ire 254/.344, Lon-Fra 14/1.14, Lon-Ire 12/1.09, Fra-Ire 24/1.08
"""


def test_aws() -> None:
    """Every pair as published, in ms of a round trip and Gbit/s."""
    cluster = AWS10()
    regions, links = cluster.regions(), cluster.links()
    short = {"Va": "Virginia"} | {region[:n]: region for region in regions for n in (2, 3)}
    published = [pair.split() for pair in PUBLISHED.strip().replace("\n", " ").split(", ")]
    assert cluster.num_ranks == 10 and len(published) == 45
    for pair, numbers in published:
        i, j = (regions.index(short[name]) for name in pair.split("-"))
        ms, gbit = map(float, numbers.split("/"))
        assert links.latency(i, j) == links.latency(j, i) == pytest.approx(ms / 2 * 1e-3)
        assert links.path(i, j) == links.path(j, i) == pytest.approx(gbit * 1e9)


def test_some_aws_regions() -> None:
    cluster = AWS10(2, ["Ireland", "Ohio"])
    assert cluster.regions() == ["Ireland", "Ireland", "Ohio", "Ohio"]
    assert cluster.links().latency(0, 2) == pytest.approx(0.0385)
    assert [cluster.links().latency(0, 1), cluster.links().path(2, 3)] == pytest.approx([0.005, 2e9])


@pytest.mark.parametrize(
    ("scenario", "near", "far"),
    [
        ("on_demand", (0, 7, 0.0, 100e9), (7, 8, 0.0, 3.125e9)),
        ("spot", (0, 3, 0.0, 100e9), (62, 63, 0.0, 1.25e9)),
        ("universities", (0, 31, 0.0005, 5e9), (31, 32, 0.0055, 1.12e9)),
        ("regional", (0, 15, 0.005, 2e9), (16, 32, 0.006, 1.25e9)),
        ("worldwide", (0, 7, 0.005, 2e9), (0, 63, 0.062, 0.482e9)),
    ],
)
def test_dtfm(scenario: Any, near: tuple[int, int, float, float], far: tuple[int, int, float, float]) -> None:
    cluster = DTFM(scenario)
    links = cluster.links()
    assert cluster.num_ranks == 64
    for a, b, latency_s, bits_per_s in (near, far):
        assert links.latency(a, b) == pytest.approx(latency_s)
        assert links.path(a, b) == pytest.approx(bits_per_s)


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (Scaled(Constant(), [1.0]), "speeds has 1 values, none for rank 1"),
        (Diurnal(shift_s=[0.0, 1.0]), "shift_s has 2 values, none for rank 2"),
        (Diurnal(peak_s=math.nan), "step 5 of rank 0 would take nan s"),
        (Product([Measured(), Scaled(LogNormal(), [1.0])]), "speeds has 1 values, none for rank 1"),
    ],
)
def test_compute_models_that_lack_a_rank_or_give_no_time(compute: ComputeModel, message: str) -> None:
    cluster = LAN(num_hosts=3, compute=compute)
    with pytest.raises(ValueError, match=message):
        cluster.check_steps(5)


def test_compute_models_that_lack_a_step(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    path.write_text("rank,t,seconds\n0,1,2.0\n1,1,2.0\n0,2,2.0\n")
    LAN(num_hosts=2, compute=Replay(str(path))).check_steps(1)
    LAN(num_hosts=2, compute=Product([Measured(), Replay(str(path), repeat=True)])).check_steps(9)
    for num_hosts, num_steps, message in ((2, 2, "ends at step 1 of rank 1, before 2"), (3, 1, "has no rank 2")):
        with pytest.raises(ValueError, match=message):
            LAN(num_hosts=num_hosts, compute=Replay(str(path))).check_steps(num_steps)


def parse(text: str) -> Cluster:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--cluster", type=Cluster)
    cluster = parser.instantiate(parser.parse_string(text)).cluster
    assert isinstance(cluster, Cluster)
    return cluster


def test_yaml() -> None:
    cluster = parse("""
        cluster:
          class_path: Home
          init_args:
            num_hosts: 4
            compute:
              class_path: Scaled
              init_args:
                model:
                  class_path: Product
                  init_args: {factors: [LogNormal, {class_path: Markov, init_args: {slow_share: 0.2}}]}
                speeds: [1.0, 2.0, 1.0, 0.5]
            faults:
              - {class_path: Crash, init_args: {rank: 1, at_s: 5}}
              - {class_path: Weibull, init_args: {mtbf_s: 1e9, until_s: 100}}
            transport: {window_bytes: 1.25e6}
    """)
    assert cluster == Home(
        4,
        compute=Scaled(Product([LogNormal(), Markov(slow_share=0.2)]), [1.0, 2.0, 1.0, 0.5]),
        faults=[Crash(1, 5.0), Weibull(1e9, 100.0)],
        transport=Transport(window_bytes=1.25e6),
    )
    described = describe(cluster)
    assert described["init_args"]["compute"]["init_args"]["model"]["init_args"]["factors"][0]["init_args"] == {
        "mean_s": 1.0,
        "sigma": 0.6,
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("Tree", Tree()),
        ("{class_path: Star, init_args: {center: 3}}", Star(3)),
        (
            "{class_path: Hierarchical, init_args: {islands: [[0, 1], [2, 3, 4, 5, 6, 7]]}}",
            Hierarchical(((0, 1), (2, 3, 4, 5, 6, 7))),
        ),
    ],
)
def test_yaml_of_a_schedule(text: str, schedule: Schedule) -> None:
    assert LAN().schedule == Gloo()
    cluster = parse(f"cluster: {{class_path: LAN, init_args: {{schedule: {text}}}}}")
    assert cluster.schedule == schedule
    assert parse(yaml.safe_dump({"cluster": describe(cluster)})) == cluster


HOST = Hosts(1, 1e9, 1e9)


test_clusters_that_cannot_be = refused(
    (lambda: Hosts(1, 0.0, 1e9), "up_bits_per_s is 0.0"),
    (lambda: Hosts(1, 1e9, 1e9, speed=0.0), "speed is 0.0"),
    (lambda: Hosts(0, 1e9, 1e9), "count is 0"),
    (lambda: Layout([]), "hosts is empty"),
    (lambda: Layout([HOST], ["here", "here"], [[0, 0], [0, 0]]), "each name may stand there once"),
    (lambda: Layout([HOST], ["eu"]), r"hosts stand in 'here', but regions are \['eu'\]"),
    (lambda: Layout([HOST], latency_s=[[0.0, 0.1]]), r"latency_s has 1 rows of lengths \[2\]; 1 regions"),
    (lambda: Layout([HOST], ["here", "eu"]), r"latency_s has 1 rows of lengths \[1\]; 2 regions"),
    (lambda: Layout([HOST], path_bits_per_s=[[1e9], [1e9]]), "path_bits_per_s has 2 rows"),
    (lambda: Layout([HOST], latency_s=[[-0.1]]), "latency_s from here to here is -0.1"),
    (lambda: Layout([HOST], path_bits_per_s=[[0.0]]), "path_bits_per_s from here to here is 0.0"),
    (lambda: Home(transport=Transport(half_duplex=True)), "half_duplex needs equal"),
    (lambda: LAN(num_hosts=2, schedule=Star(2)), "Star's center is rank 2"),
    (lambda: LAN(num_hosts=2, schedule=Hierarchical(((0,),))), r"ranks \[1\] are in none of Hierarchical's 1"),
    (lambda: AWS10(regions_used=["Oregon", "Mars"]), r"regions are \['Oregon', 'Mars'\]; take each at most once"),
    (lambda: DTFM("worldwide", 63), "num_hosts is 63; worldwide needs a multiple of 8"),
    (lambda: DTFM("local"), "scenario is 'local'"),  # type: ignore[arg-type]
    (lambda: LAN(faults=[Crash(0, 2.0), Crash(1, 1.0)]), "happens before it"),
)
