"""Dynamic backup workers: the estimates, and what is chosen by them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.backup_workers import Row, run, seconds
from lowcomm.participation.base import Arrival, Measured, RoundReport, Take, Wait
from lowcomm.participation.dbw import DynamicBackup, Seen, Times, _bend, _estimates, fitted_times, published
from lowcomm.participation.rules import FirstK

NUM = 8


def after(rule, times_s, num_rounds, noise, later_s=None, num_later=0, curvature=1.0):
    """The state after rounds on a slope whose gradient has a mean square of 1.

    Args:
        times_s: of each replica, from a decision; in `num_later` more rounds `later_s`.
        noise: V.
        curvature: L.
    """
    state, loss = rule.init(NUM), 100.0
    for round in range(1, num_rounds + num_later + 1):
        k = state.k
        state = rule.observe(state, RoundReport(round, round - 1.0, float(round), k, NUM))
        fall = rule.lr - curvature * rule.lr**2 / 2 * (1 + noise / k)
        for _ in range(k):
            state = rule.learn(state, Measured(round, loss, 1 + noise / k, noise * (k - 1) / k))
        loss -= fall
        for replica, at_s in enumerate(times_s if round <= num_rounds else later_s):
            state = rule.hear(state, Arrival(replica, round + at_s, round, 0, 1.0))
    return state


@pytest.mark.parametrize("rule", [DynamicBackup(0.1), published(0.1)], ids=["ours", "published"])
def test_awaits_those_who_are_quick(rule):
    times_s = [1.0] * 5 + [9.0] * 3
    assert after(rule, times_s, 20, noise=2.0).k == 5


@pytest.mark.parametrize("rule", [DynamicBackup(0.1), published(0.1)], ids=["ours", "published"])
def test_awaits_all_when_times_are_equal_and_when_only_noise_is_left(rule):
    assert after(rule, [1.0] * NUM, 20, noise=2.0).k == NUM
    slow_last = [1.0] * 7 + [1.2]
    assert after(rule, slow_last, 20, noise=1e4).k == NUM


def test_forgets_old_times_and_the_published_one_does_not():
    quick, slow = [1.0] * NUM, [1.0] * 4 + [3.0] * 4
    rules = {"ours": DynamicBackup(0.1), "published": published(0.1)}
    chosen = {name: after(rule, quick, 60, 40.0, slow, 6).k for name, rule in rules.items()}
    assert chosen["ours"] == 4
    assert chosen["published"] > 4


def test_starts_with_half_or_with_all():
    assert DynamicBackup().init(NUM).k == 4
    assert published().init(NUM).k == NUM
    assert after(DynamicBackup(0.1, num_start=6), [1.0] * NUM, 5, noise=1.0).k == 4


def test_nothing_told_keeps_the_start():
    rule, state = DynamicBackup(), DynamicBackup().init(NUM)
    for round in range(1, 30):
        state = rule.observe(state, RoundReport(round, round - 1.0, float(round), 4, NUM))
    assert state.k == 4


def test_waits_for_no_more_than_are_present():
    rule, state = DynamicBackup(), replace(DynamicBackup().init(NUM), k=6)
    came = [Arrival(i, 1.0, 0, 0, 1.0) for i in range(3)]
    assert rule.decide(state, came, range(4), 0.0, 1.0) == Wait()
    assert rule.decide(state, came, range(3), 0.0, 1.0) == Take((0, 1, 2))


def test_estimates_are_unbiased():
    random, k, dimension, noise = np.random.default_rng(0), 4, 10, 3.0
    gradient = np.full(dimension, 0.5)
    found = []
    for _ in range(4000):
        drawn = gradient + random.normal(size=(k, dimension)) * (noise / dimension) ** 0.5
        mean = drawn.mean(0)
        found.append(_estimates(Seen(1, k, k, 0.0, k * float(mean @ mean), float(((drawn - mean) ** 2).sum()))))
    variance, square = np.mean(found, 0)
    assert variance == pytest.approx(noise, rel=0.03)
    assert square == pytest.approx(float(gradient @ gradient), rel=0.05)


def test_curvature_of_a_parabola():
    lr, curvature, loss, w = 0.1, 2.0, 0.0, 1.0
    seen = []
    for round in range(1, 4):
        loss, gradient = curvature * w * w / 2, curvature * w
        seen.append(Seen(round, 2, 1, loss, gradient**2, 0.0))
        w -= lr * gradient
    for pairs in ([(seen[0], seen[1])], [(seen[0], seen[1]), (seen[1], seen[2])]):
        assert _bend(pairs, lr) == pytest.approx(curvature * lr**2 / 2)


def test_times_are_pooled_over_orders():
    """T grows in k and falls in h, so what one number awaited has not seen is bounded by what others have."""
    times = [Times(1, 2, 0.0, (1.0, 2.0, 3.0)), Times(2, 3, 0.0, (1.0, 4.0)), Times(3, 3, 0.0, (1.0, 4.0))]
    assert fitted_times(times, 4) == pytest.approx([1, 3.25, 3.25, 3.25], abs=0.01)


def test_close_to_the_best_static_number_and_quick_to_notice_a_slowdown():
    rule = DynamicBackup(0.095)
    usual = Row(0.2, 0.25)
    assert seconds(rule, usual, 3) <= 1.15 * min(seconds(FirstK(k), usual, 3) for k in (4, 7, 9, 16))
    slow = Row(0.2, 0.25, 20.0)
    assert seconds(rule, slow, 2) <= 1.15 * seconds(FirstK(5), slow, 2)
    assert max(k for at_s, k in run(rule, slow, 0).awaited if at_s > 30) <= NUM


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DynamicBackup(k_min=1), "no variance"),
        (lambda: DynamicBackup(start=0.0), "share of replicas"),
        (lambda: DynamicBackup(lr=0.0), "positive"),
        (lambda: DynamicBackup(window=0), "at least 1"),
    ],
)
def test_refuses_options_that_mean_nothing(make, said):
    with pytest.raises(ValueError, match=said):
        make()
