"""Compute-time models: their distributions in closed form, and that nothing but (seed, rank, t) matters."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

from lowcomm.sim.cluster.compute import ComputeModel, Constant, Diurnal, Measured, Product, Replay, Scaled
from lowcomm.sim.cluster.drawn import Bimodal, Drawn, LogNormal, Markov, Pareto, ShiftedExponential
from lowcomm.sim.cluster.faults import Crash, Pause, SlowDown
from lowcomm.sim.cluster.hindered import Hindered
from tests.refusals import refused

DRAWN: list[type[Drawn]] = [LogNormal, ShiftedExponential, Pareto, Bimodal, Markov]


def sample(model: ComputeModel, num_ranks: int = 200, num_steps: int = 128) -> list[float]:
    return [model.seconds(rank, t, 0.0) for rank in range(num_ranks) for t in range(1, num_steps + 1)]


def at(values: list[float], share: float) -> float:
    return sorted(values)[int(share * len(values))]


def test_log_normal() -> None:
    values = sample(LogNormal(2.0, 0.6))
    assert sum(values) / len(values) == pytest.approx(2.0, rel=0.02)
    median = 2.0 * math.exp(-(0.6**2) / 2)
    assert at(values, 0.5) == pytest.approx(median, rel=0.03)
    assert at(values, 0.975) == pytest.approx(median * math.exp(0.6 * 1.959964), rel=0.03)


@pytest.mark.parametrize("a", [0.2, 0.5, 1.0])
def test_shifted_exponential(a: float) -> None:
    values = sample(ShiftedExponential(3.0, a))
    assert sum(values) / len(values) == pytest.approx(3.0, rel=0.03)
    assert min(values) == pytest.approx(3.0 * (1 - a), abs=1e-3)
    assert at(values, 0.9) == pytest.approx(3.0 * ((1 - a) + a * math.log(10)), rel=0.04)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0])
def test_pareto(alpha: float) -> None:
    values = sample(Pareto(1.0, alpha))
    shortest = (alpha - 1) / alpha
    assert min(values) == pytest.approx(shortest, rel=1e-3)
    for share in (0.5, 0.9, 0.99):
        assert at(values, share) == pytest.approx(shortest * (1 - share) ** (-1 / alpha), rel=0.08)
    if alpha == 3.0:  # the means of the others converge too slowly to be seen
        assert sum(values) / len(values) == pytest.approx(1.0, rel=0.03)


def test_bimodal_ranks_stay_slow() -> None:
    model = Bimodal(0.5, probability=0.25, factor=4.0)
    by_rank = [{model.seconds(rank, t, 0.0) for t in (1, 64, 65, 1000)} for rank in range(1000)]
    assert all(times in ({0.5}, {2.0}) for times in by_rank)
    assert sum(times == {2.0} for times in by_rank) / 1000 == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize(("share", "burst"), [(0.1, 1.5), (0.1, 1.0), (0.3, 20.0), (0.7, 3.0)])
def test_markov_share_and_length_of_bursts(share: float, burst: float) -> None:
    model = Markov(1.0, 5.0, share, burst)
    rows = [[model.seconds(rank, t, 0.0) for t in range(1, 513)] for rank in range(100)]
    assert {x for row in rows for x in row} == {1.0, 5.0}
    assert sum(x == 5.0 for row in rows for x in row) / 51200 == pytest.approx(share, rel=0.15)
    # from the first step on, not only in the long run
    assert sum(model.seconds(rank, 1, 0.0) == 5.0 for rank in range(1000)) / 1000 == pytest.approx(share, abs=0.05)
    # bursts that end where a block of draws ends would be too short
    for border in (range(1, 512), range(64, 512, 64)):
        stays = [row[i] == 5.0 for row in rows for i in border if row[i - 1] == 5.0]
        assert sum(stays) / len(stays) == pytest.approx(1 - 1 / burst, abs=0.12)


def test_markov_is_one_chain_across_blocks() -> None:
    model, num_blocks = Markov(slow_share=0.3, mean_burst=20.0), 6
    us = [u for block in range(-20, num_blocks) for u in model.uniforms(3, block).tolist()]
    start, is_slow, slow = 0.3 / 0.7 / 20, False, []
    for u in us:
        is_slow = u < (1 - 1 / 20 if is_slow else start)
        slow.append(5.0 if is_slow else 1.0)
    assert [model.seconds(3, t, 0.0) for t in range(1, num_blocks * 64 + 1)] == slow[20 * 64 :]


@pytest.mark.parametrize("kind", DRAWN)
def test_order_of_calls_does_not_matter(kind: type[Drawn]) -> None:
    asked = list(itertools.product(range(5), range(1, 200)))
    first = kind(seed=3)
    expected = {(rank, t): first.seconds(rank, t, 0.0) for rank, t in asked}
    random.Random(0).shuffle(asked)
    second = kind(seed=3)
    with torch.device("meta"):
        assert {(rank, t): second.seconds(rank, t, 9.0) for rank, t in asked} == expected
    assert first == second
    other = kind(seed=4)
    assert any(other.seconds(rank, t, 0.0) != x for (rank, t), x in expected.items())


def test_ranks_and_steps_are_independent() -> None:
    model = LogNormal()
    logs = torch.tensor([[math.log(model.seconds(rank, t, 0.0)) for t in range(1, 1025)] for rank in range(2)])
    assert abs(torch.corrcoef(logs)[0, 1].item()) < 0.1
    assert abs(torch.corrcoef(torch.stack([logs[0, :-64], logs[0, 64:]]))[0, 1].item()) < 0.1
    # and so are models of different classes, though their seeds are equal
    other = torch.tensor([math.log(Pareto().seconds(0, t, 0.0)) for t in range(1, 1025)])
    assert abs(torch.corrcoef(torch.stack([logs[0], other]))[0, 1].item()) < 0.1


def test_diurnal() -> None:
    model = Diurnal(2.0, swing=0.5, peak_s=100.0, period_s=1000.0, shift_s=[0.0, 250.0])
    assert model.seconds(0, 1, 100.0) == pytest.approx(3.0)
    assert model.seconds(0, 7, 1600.0) == pytest.approx(1.0)
    assert model.seconds(1, 1, 350.0) == pytest.approx(3.0)
    assert sum(model.seconds(0, 1, float(x)) for x in range(1000)) / 1000 == pytest.approx(2.0)
    with pytest.raises(ValueError, match="shift_s has 2 values, none for rank 2"):
        model.seconds(2, 1, 0.0)


def test_replay(tmp_path: Path) -> None:
    path = tmp_path / "times.csv"
    path.write_text("rank,t,seconds\n0,2,0.25\n0,1,0.5\n1,1,2\n")
    model = Replay(str(path))
    assert [model.seconds(0, 1, 0.0), model.seconds(0, 2, 0.0), model.seconds(1, 1, 0.0)] == [0.5, 0.25, 2.0]
    with pytest.raises(ValueError, match="ends at step 2 of rank 0, before 3"):
        model.seconds(0, 3, 0.0)
    with pytest.raises(ValueError, match="no rank 2"):
        model.seconds(2, 1, 0.0)
    repeated = Replay(str(path), repeat=True)
    assert [repeated.seconds(0, t, 0.0) for t in range(1, 6)] == [0.5, 0.25, 0.5, 0.25, 0.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "header must be rank,t,seconds"),
        ("rank,seconds\n", "header must be rank,t,seconds, not rank,seconds"),
        ("rank,t,seconds\n0,1,fast\n", ":2: 'fast' is not a number"),
        ("rank,t,seconds\n0,1,0\n", ":2: seconds is 0.0; it must be positive"),
        ("rank,t,seconds\n0,1,1\n0,1,2\n", ":3: step 1 of rank 0 stands there a second time"),
        ("rank,t,seconds\n0,1,1\n0,3,2\n", "the 2 steps of rank 0 are not 1 to 2"),
    ],
)
def test_replay_of_a_bad_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "times.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Replay(str(path))


def test_measured_waits_for_its_time() -> None:
    model = Scaled(Product([Measured(), Constant(3.0)]), [1.0, 2.0])
    assert model.needs_calibration()
    with pytest.raises(ValueError, match="no time yet"):
        model.seconds(0, 1, 0.0)
    ready = model.calibrated(0.5)
    assert not ready.needs_calibration()
    assert [ready.seconds(rank, 1, 0.0) for rank in (0, 1)] == [1.5, 0.75]
    assert Measured(0.2).calibrated(0.5) == Measured(0.2)
    assert not Constant().needs_calibration()
    with pytest.raises(ValueError, match="speeds has 2 values, none for rank 2"):
        ready.seconds(2, 1, 0.0)


def test_types_of_fields_can_be_read() -> None:
    for kind in (*DRAWN, Constant, Diurnal, Replay, Measured, Scaled, Product, Hindered):
        assert get_type_hints(kind)  # as the command line does


def test_factors_must_not_draw_the_same_numbers() -> None:
    with pytest.raises(ValueError, match="LogNormal with seed 0"):
        Product([LogNormal(sigma=0.1), Product([Scaled(LogNormal(sigma=0.3), [1.0])])])
    Product([LogNormal(), LogNormal(seed=1), Markov()])


def test_hindered() -> None:
    events = [
        SlowDown(0, 4.0, 10.0, 8.0),
        Pause(0, 14.0, 2.0),
        SlowDown(0, 2.0, 30.0, 5.0),
        SlowDown(0, 3.0, 0.0, 99.0, "network"),
        Crash(1, 50.0),
    ]
    model = Hindered(Constant(3.0), events)

    def reference(start: float) -> float:
        """Worked off in small steps of time."""
        work, now, dt = 3.0, start, 1e-3
        while work > 1e-9:
            now += dt
            paused, slow = 14 <= now < 16, 4.0 if 10 <= now < 18 else 2.0 if 30 <= now < 35 else 1.0
            work -= 0.0 if paused else dt / slow
        return now - start

    for start in (0.0, 7.0, 8.5, 10.0, 12.0, 14.5, 17.0, 18.0, 29.0, 33.0, 35.0, 100.0):
        assert model.seconds(0, 1, start) == pytest.approx(reference(start), abs=0.02)
    assert model.seconds(1, 1, 12.0) == 3.0
    assert Hindered(LogNormal(sigma=50.0), events).seconds(0, 1, 14.5) == 0.0  # drawn so small that it is no time
    assert Hindered(Measured(), events).calibrated(3.0).seconds(0, 1, 14.0) == pytest.approx(6.5)


test_bad_models = refused(
    (lambda: Constant(0.0), "mean_s is 0.0"),
    (lambda: LogNormal(sigma=0.0), "sigma is 0.0"),
    (lambda: ShiftedExponential(a=1.2), "a is 1.2"),
    (lambda: Pareto(alpha=1.0), "alpha is 1.0"),
    (lambda: Bimodal(probability=-0.1), "probability is -0.1"),
    (lambda: Bimodal(factor=0.0), "factor is 0.0"),
    (lambda: Markov(mean_burst=0.5), "mean_burst is 0.5"),
    (lambda: Markov(slow_share=0.5, mean_burst=1.0), "slow_share is 0.5; it must lie between 0 and 0.5"),
    (lambda: Diurnal(swing=1.0), "swing is 1.0"),
    (lambda: Measured(0.0), "step_s is 0.0"),
    (lambda: Scaled(Constant(), [1.0, 0.0]), r"speeds\[1\] is 0.0"),
    (lambda: Product([]), "factors is empty"),
)
