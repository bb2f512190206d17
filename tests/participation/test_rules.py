"""What every rule promises, and what each of them waits for."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowcomm.participation.base import Arrival, Rule, Take, Wait
from lowcomm.participation.rules import All, Deadline, FirstK, Quorum

SECONDS = st.floats(0, 10, allow_nan=False)
RULES = st.one_of(
    st.just(All()),
    st.builds(FirstK, st.integers(1, 9)),
    st.builds(Deadline, SECONDS, st.integers(1, 9)),
    st.builds(Quorum, st.one_of(st.integers(1, 9), st.floats(0.01, 0.99)), SECONDS),
)


def arrivals_at(times: list[float]) -> list[Arrival]:
    return [Arrival(i, at_s, 0, 1, 8) for i, at_s in enumerate(times)]


def decide(rule: Rule, times: list[float], num_present: int, now_s: float, begun_s: float = 0.0) -> Take | Wait:
    return rule.decide(rule.init(num_present), arrivals_at(times), list(range(num_present)), begun_s, now_s)


@given(RULES, st.lists(SECONDS, max_size=8), st.integers(0, 4), SECONDS)
def test_takes_only_who_came_and_goes_on_when_everyone_is_there(rule, times, num_late, more_s):
    times = sorted(times)
    now_s = max(times, default=0.0) + more_s
    decision = decide(rule, times, len(times) + num_late, now_s)
    if isinstance(decision, Take):
        assert decision.replicas == tuple(range(len(times)))
        assert times
    else:
        assert decision.until_s is None or decision.until_s > now_s
        assert num_late or not times


@given(RULES, st.lists(SECONDS, min_size=1, max_size=8), st.integers(0, 4))
def test_asked_when_it_said_it_decides_or_waits_for_an_event(rule, times, num_late):
    times = sorted(times)
    decision = decide(rule, times, len(times) + num_late, times[-1])
    if isinstance(decision, Wait) and decision.until_s is not None:
        assert isinstance(decide(rule, times, len(times) + num_late, decision.until_s), Take)


@given(RULES, st.lists(SECONDS, min_size=1, max_size=8), st.integers(0, 4), SECONDS)
def test_a_departure_never_makes_it_wait_longer(rule, times, num_late, more_s):
    times = sorted(times)
    now_s = times[-1] + more_s
    if isinstance(decide(rule, times, len(times) + num_late + 1, now_s), Take):
        assert isinstance(decide(rule, times, len(times) + num_late, now_s), Take)


@pytest.mark.parametrize(
    ("rule", "times", "now_s", "expected"),
    [
        (All(), [1, 2, 3], 9, Wait()),
        (FirstK(3), [1, 2], 9, Wait()),
        (FirstK(2), [1, 2], 2, Take((0, 1))),
        (Deadline(5, at_least=2), [1], 9, Wait()),
        (Deadline(5, at_least=2), [1, 2], 3, Wait(5)),
        (Deadline(5, at_least=2), [1, 2], 5, Take((0, 1))),
        (Quorum(2, grace_s=1), [1], 9, Wait()),
        (Quorum(2, grace_s=1), [1, 2], 2.5, Wait(3)),
        (Quorum(2, grace_s=1), [1, 2, 2.7], 3, Take((0, 1, 2))),
        (Quorum(0.75, grace_s=1), [1, 2], 9, Wait()),
        (Quorum(0.75, grace_s=0), [1, 2, 3], 3, Take((0, 1, 2))),
    ],
)
def test_of_four_present(rule, times, now_s, expected):
    assert decide(rule, times, 4, now_s) == expected


def test_a_deadline_counts_from_the_last_decision():
    assert decide(Deadline(5), [11], 2, 12, begun_s=10) == Wait(15)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FirstK(0), "at least 1"),
        (lambda: Deadline(-1.0), "at least 0 seconds"),
        (lambda: Deadline(math.inf), "finite"),
        (lambda: Deadline(1.0, at_least=0), "at least 1"),
        (lambda: Quorum(1.5, 1.0), "whole number of replicas, or a share"),
        (lambda: Quorum(0, 1.0), "share between 0 and 1"),
        (lambda: Quorum(0.5, math.nan), "finite"),
    ],
)
def test_refuses_options_that_mean_nothing(make, said):
    with pytest.raises(ValueError, match=said):
        make()
