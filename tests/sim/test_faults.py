"""Fault plans: order, merging, what they refuse; lifetimes against closed forms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from lowcomm.sim.cluster.faults import (
    Availability,
    Crash,
    Event,
    Fault,
    FaultPlan,
    Notice,
    Partition,
    Pause,
    Preempt,
    RegionShock,
    Rejoin,
    SlowDown,
)
from lowcomm.sim.cluster.lifetimes import Poisson, Preemptions, RegionShocks, Weibull
from tests.refusals import refused

REGIONS = ["eu", "eu", "us", "us"]


def events(faults: Sequence[Fault], regions: Sequence[str] = REGIONS) -> list[Event]:
    return FaultPlan(faults).events(regions)


def test_events_are_merged_by_time() -> None:
    plan = [Pause(1, 5.0, 2.0), SlowDown(2, 3.0, 6.0, 1.0), Partition([[0, 1]], 9.0, 1.0)]
    shock = RegionShock("us", 5.5, repair_s=3.5)
    assert events([*plan, shock]) == [
        plan[0],
        Crash(2, 5.5),
        Crash(3, 5.5),
        plan[1],
        Rejoin(2, 9.0),
        Rejoin(3, 9.0),
        plan[2],
    ]


def test_overlapping_outages_are_one() -> None:
    faults = [RegionShock("eu", 10.0, 5.0), Preempt(0, 6.0, 6.0, 20.0), RegionShock("eu", 20.0, 2.0)]
    assert events(faults) == [
        Notice(0, 6.0, 12.0),
        Crash(0, 10.0),
        Crash(1, 10.0),
        Rejoin(1, 15.0),
        Crash(1, 20.0),
        Rejoin(1, 22.0),
        Rejoin(0, 32.0),
    ]


def test_return_before_crash_at_one_moment() -> None:
    handover = [Crash(0, 1.0), Rejoin(0, 2.0), Crash(1, 2.0)]
    assert events(handover, ["eu", "eu"]) == handover


def test_preemption() -> None:
    assert events([Preempt(2, 100.0, 30.0)]) == [Notice(2, 100.0, 130.0), Crash(2, 130.0)]
    assert events([Preempt(2, 100.0, 30.0, 10.0)])[-1] == Rejoin(2, 140.0)


def test_partition_pairs() -> None:
    assert Partition([[0], [2]], 0.0, 1.0).pairs(4) == [
        *[(0, 1), (0, 2), (0, 3), (1, 0), (1, 2)],
        *[(2, 0), (2, 1), (2, 3), (3, 0), (3, 2)],
    ]
    assert Partition([[0, 1]], 0.0, 1.0).pairs(3) == [(0, 2), (1, 2), (2, 0), (2, 1)]


def lifetimes(found: Sequence[Event], num_ranks: int, repair_s: float) -> list[float]:
    """From each start or return to the next crash."""
    born = dict.fromkeys(range(num_ranks), 0.0)
    lived = []
    for event in found:
        if isinstance(event, Crash):
            lived.append(event.at_s - born[event.rank])
            born[event.rank] = event.at_s + repair_s
        elif isinstance(event, Rejoin):
            assert event.at_s == pytest.approx(born[event.rank])
    return sorted(lived)


@pytest.mark.parametrize(
    ("fault", "shape"),
    [(Poisson(100.0, 20_000.0, repair_s=5.0), 1.0), (Weibull(100.0, 20_000.0, repair_s=5.0), 0.7)],
)
def test_lifetimes(fault: Fault, shape: float) -> None:
    lived = lifetimes(events([fault], ["eu"] * 50), 50, 5.0)
    assert sum(lived) / len(lived) == pytest.approx(100.0, rel=0.05)
    scale = 100.0 / math.gamma(1 + 1 / shape)
    for share in (0.25, 0.5, 0.9):
        assert lived[int(share * len(lived))] == pytest.approx(scale * (-math.log(1 - share)) ** (1 / shape), rel=0.08)


def test_crash_for_good() -> None:
    found = events([Poisson(50.0, 200.0, seed=1)], ["eu"] * 400)
    assert {type(event) for event in found} == {Crash}
    assert len({event.ranks()[0] for event in found}) == len(found)
    assert len(found) / 400 == pytest.approx(1 - math.exp(-4), abs=0.03)
    assert max(event.at_s for event in found) <= 200.0


def test_poisson_is_weibull_of_shape_one() -> None:
    assert events([Poisson(50.0, 300.0, 5.0)]) == events([Weibull(50.0, 300.0, 1.0, 5.0)])


def test_region_shocks_hit_all_of_a_region() -> None:
    found = events([RegionShocks(1000.0, 50_000.0, repair_s=1.0)], [*REGIONS, "asia"])
    crashes = [(event.at_s, event.rank) for event in found if isinstance(event, Crash)]
    by_time: dict[float, list[int]] = {}
    for at_s, rank in crashes:
        by_time.setdefault(at_s, []).append(rank)
    assert set(map(tuple, by_time.values())) == {(0, 1), (2, 3), (4,)}
    assert len(by_time) == pytest.approx(150, abs=45)


def test_preemptions() -> None:
    found = events([Preemptions(3000.0, 100_000.0, repair_s=60.0)], ["eu"] * 20)
    notices = [event for event in found if isinstance(event, Notice)]
    lengths = [event.crash_at_s - event.at_s for event in notices]
    assert min(lengths) >= 30.0 and max(lengths) <= 120.0
    assert sum(lengths) / len(lengths) == pytest.approx(75.0, rel=0.05)
    assert len(notices) == pytest.approx(20 * 100_000 / (3000 + 75 + 60), rel=0.1)
    assert sum(isinstance(event, Crash) for event in found) == len(notices)


@pytest.mark.parametrize(
    "fault",
    [
        Poisson(500.0, 900.0, 5.0, seed=2),
        Weibull(500.0, 900.0, 0.7, 5.0, seed=2),
        RegionShocks(500.0, 900.0, 5.0, seed=2),
        Preemptions(500.0, 900.0, repair_s=5.0, seed=2),
    ],
)
def test_same_seed_same_faults_sorted(fault: Fault) -> None:
    regions = ["eu", "us"] * 20
    found = events([fault], regions)
    assert found == events([fault], regions) and found
    assert [event.at_s for event in found] == sorted(event.at_s for event in found)
    # a rank's faults are its own: more ranks do not change them
    of_rank_0 = [event for event in found if event.ranks() == (0,)]
    assert of_rank_0 == [event for event in events([fault], [*regions, "eu"]) if event.ranks() == (0,)]


def csv(tmp_path: Path, rows: str) -> Availability:
    path = tmp_path / "availability.csv"
    path.write_text("worker,t_up,t_down\n" + rows)
    return Availability(str(path))


def test_availability(tmp_path: Path) -> None:
    fault = csv(tmp_path, "0,0,\n2,5,10\n1,0,4.5\n1,6,8\n2,12,\n")
    assert events([fault], ["eu"] * 3) == [
        Crash(2, 0.0),
        Crash(1, 4.5),
        Rejoin(2, 5.0),
        Rejoin(1, 6.0),
        Crash(1, 8.0),
        Crash(2, 10.0),
        Rejoin(2, 12.0),
    ]
    assert events([csv(tmp_path, "0,0,5\n0,5,\n")], ["eu"]) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0,0,\n", "no line for rank 1"),
        ("0,0,\n1,0,\n2,0,\n", ":4: there is no rank 2; the cluster has ranks 0 to 1"),
        ("0,0,\n1,5,4\n", ":3: rank 1 is there from 5.0 to 4.0 s.*must not go back"),
        ("0,0,\n1,0,6\n1,5,8\n", ":4: rank 1 is there from 5.0 to 8.0 s, after its interval that ended at 6.0"),
        ("0,0,\n1,-1,\n", ":3: rank 1 is there from -1.0"),
        ("0,0,\none,0,\n", ":3: 'one' is not a number"),
        ("0,0,5\n1,0,6\n", "at 6.0 s all 2 ranks are down"),
        ("0,0,\n1,0," + 200_000 * "9", "cannot be read .field larger than"),
    ],
)
def test_bad_availability(tmp_path: Path, rows: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        events([csv(tmp_path, rows)], ["eu"] * 2)


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([Crash(4, 1.0)], "there is no rank 4; the cluster has ranks 0 to 3"),
        ([Pause(-1, 1.0, 1.0)], "there is no rank -1"),
        ([Partition([[0], [7]], 1.0, 1.0)], "there is no rank 7"),
        ([RegionShock("mars", 1.0)], r"no region 'mars'; the cluster has \['eu', 'us'\]"),
        ([Crash(0, -1.0)], "at_s is -1.0"),
        ([Rejoin(0, 1.0)], "rank 0 is not down then"),
        ([Crash(i, 1.0 + i) for i in range(4)], "at 4.0 s all 4 ranks are down"),
        ([RegionShock("eu", 1.0, 5.0), RegionShock("us", 5.0)], "at 5.0 s all 4 ranks are down"),
        ([Poisson(1.0, 100.0)], "all 4 ranks are down"),
    ],
)
def test_bad_plans_for_this_cluster(faults: Sequence[Fault], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        events(faults)


@pytest.mark.parametrize(
    ("one", "other", "kinds"),
    [
        (Poisson(10.0, 1.0), Weibull(30.0, 1.0), "Weibull or Poisson"),
        (RegionShocks(10.0, 1.0), RegionShocks(20.0, 1.0), "RegionShocks"),
        (Preemptions(10.0, 1.0), Preemptions(20.0, 1.0), "Preemptions"),
    ],
)
def test_two_faults_must_not_draw_the_same_numbers(one: Fault, other: Fault, kinds: str) -> None:
    with pytest.raises(ValueError, match=f"two faults are {kinds} with seed 0 and would draw the same.*change a seed"):
        FaultPlan([one, Crash(0, 1.0), other])
    FaultPlan([one, replace(other, seed=1)])  # type: ignore[type-var]


def test_causes_of_different_kinds_may_share_a_seed() -> None:
    causes = [Poisson(10.0, 1e3), RegionShocks(10.0, 1e3), Preemptions(10.0, 1e3)]
    FaultPlan(causes)
    assert len({cause.events(["eu"])[0].at_s for cause in causes}) == 3, "they draw numbers of their own"


test_bad_faults = refused(
    (lambda: Pause(0, 1.0, 0.0), "seconds is 0.0"),
    (lambda: SlowDown(0, 0.0, 1.0, 1.0), "factor is 0.0"),
    (lambda: SlowDown(0, 2.0, 1.0, 1.0, "disk"), "what is 'disk'"),  # type: ignore[arg-type]
    (lambda: Partition([], 1.0, 1.0), "needs at least one group"),
    (lambda: Partition([[0], [0, 1]], 1.0, 1.0), "one group only"),
    (lambda: Notice(0, 5.0, 4.0), "crash_at_s is 4.0, before"),
    (lambda: Preempt(0, 1.0, -1.0), "notice_s is -1.0"),
    (lambda: Poisson(0.0, 1.0), "mtbf_s is 0.0"),
    (lambda: Weibull(1.0, 1.0, shape=0.0), "shape is 0.0"),
    (lambda: Weibull(1.0, 1.0, shape=0.005), "shape is 0.005; it must be at least 0.01"),
    (lambda: Weibull(1.0, math.inf), "until_s is inf"),
    (lambda: RegionShocks(1.0, 1.0, repair_s=0.0), "repair_s is 0.0"),
    (lambda: Preemptions(1.0, 1.0, 50.0, 40.0), "notices last from 50.0 to 40.0"),
)
