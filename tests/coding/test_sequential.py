"""Sequential codes: what they cost, and that every job is known in time under every pattern that they bear."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowcomm.coding.sequential import Multiplexed, Progress, Repeated, Schedule
from lowcomm.coding.stragglers import Bursts, end_round

SCHEDULES: list[Schedule] = [
    Repeated(4, Bursts(1, 1, 0)),
    Repeated(6, Bursts(1, 1, 2)),
    Repeated(5, Bursts(1, 2, 2)),
    Repeated(6, Bursts(2, 3, 3)),
    Repeated(8, Bursts(2, 5, 4)),
    Repeated(6, Bursts(1, 3, 6)),
    Multiplexed(5, Bursts(1, 2, 2)),
    Multiplexed(6, Bursts(2, 3, 3)),
    Multiplexed(6, Bursts(2, 4, 1)),
    Multiplexed(4, Bursts(1, 3, 4)),
]


def known_in_time(schedule: Schedule, patterns: list[frozenset[int]], num_jobs: int) -> bool:
    """Run all rounds; after its last one, each job must be known."""
    progress = Progress()
    for round in range(1, num_jobs + schedule.delay + 1):
        stragglers = patterns[round - 1]
        for worker, parts in enumerate(schedule.parts(round, num_jobs, progress)):
            if worker not in stragglers:
                progress.deliver(worker, parts)
        due = round - schedule.delay
        if due >= 1 and not schedule.is_known(due, progress):
            return False
        progress.forget(due)
    return True


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_job_is_known_in_time_under_patterns_that_are_borne(schedule):
    @given(st.data())
    def check(data):
        num_jobs, past = 8, []
        workers = st.frozensets(st.integers(0, schedule.num_workers - 1))
        for _ in range(num_jobs + schedule.delay):
            now = data.draw(workers)
            while not schedule.bursts.bears(past, now):
                now = frozenset(sorted(now)[1:])
            past.append(now)
        assert known_in_time(schedule, past, num_jobs)

    check()


@pytest.mark.parametrize("schedule", [Repeated(3, Bursts(1, 2, 2)), Multiplexed(3, Bursts(1, 2, 2))], ids=str)
def test_every_job_is_known_in_time_exhaustively(schedule):
    sets = [frozenset(some) for num in range(3) for some in combinations(range(3), num)]
    num_borne = 0
    for patterns in product(sets, repeat=4):
        if all(schedule.bursts.bears(patterns[:r], patterns[r]) for r in range(4)):
            num_borne += 1
            assert known_in_time(schedule, list(patterns), 4 - schedule.delay)
    assert num_borne > 20


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s.bursts.num_stragglers < s.num_workers], ids=str)
def test_more_stragglers_than_are_borne_can_leave_a_job_unknown(schedule):
    everyone = frozenset(range(schedule.num_workers))
    num_rounds = 8 + schedule.delay
    assert not schedule.bursts.bears([], everyone)
    assert not known_in_time(schedule, [everyone] * num_rounds, 8)


@pytest.mark.parametrize(
    ("schedule", "load"),
    [
        (Multiplexed(256, Bursts(1, 2, 27)), 0.00754),
        (Repeated(256, Bursts(2, 3, 23)), 0.05078),
        (Repeated(256, Bursts(1, 1, 15)), 0.0625),
        (Repeated(256, Bursts(1, 1, 0)), 0.00391),
    ],
    ids=str,
)
def test_published_loads(schedule, load):
    assert round(schedule.load, 5) == load


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_no_worker_does_more_than_its_load(schedule):
    """Parts are of equal size: a worker does at most W - 1 + B of `Multiplexed` in a round, or one of `Repeated`."""
    progress = Progress()
    most = schedule.delay + 1 if isinstance(schedule, Multiplexed) else 1
    for round in range(1, 8):
        for worker, parts in enumerate(schedule.parts(round, 8, progress)):
            assert len(parts) <= most
            progress.deliver(worker, parts if (worker + round) % 3 else [])


def test_all_stragglers_that_may_be_are_borne_only_where_nobody_shares_chunks():
    n, own = 4, 2
    assert Multiplexed(n, Bursts(1, 3, n)).load == pytest.approx((own + 1) / (n * own))


def test_patterns():
    two, three = frozenset({0, 1}), frozenset({0, 1, 2})
    bursts = Bursts(length=1, window=3, num_stragglers=2)
    assert bursts.bears([], two)
    assert not bursts.bears([], three)
    assert not bursts.bears([two], frozenset({2}))  # a third within the window
    assert not bursts.bears([two], frozenset({0}))  # a burst of two rounds
    assert not bursts.bears([frozenset({0}), frozenset()], frozenset({0}))
    assert bursts.bears([two, frozenset(), frozenset()], frozenset({0, 2}))
    assert Bursts(2, 3, 2).bears([two], two)
    assert not Bursts(2, 3, 2).bears([two, two], two)


def test_the_master_waits_for_everyone_when_it_must():
    seconds, bursts = [1.0, 1.5, 2.0, 5.0], Bursts(1, 2, 1)
    first = end_round(seconds, bursts, [])
    assert (first.seconds, first.stragglers, first.waited_out) == (2.0, frozenset({3}), False)
    again = end_round(seconds, bursts, [first.stragglers])
    assert (again.seconds, again.stragglers, again.waited_out) == (5.0, frozenset(), True)
    assert end_round(seconds[:3], bursts, []).seconds == 2.0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Repeated(8, Bursts(2, 4, 2)), "must divide"),
        (lambda: Multiplexed(8, Bursts(2, 2, 2)), "shorter than their window"),
        (lambda: Multiplexed(8, Bursts(1, 2, 9)), "0 to 8 workers"),
    ],
)
def test_impossible_schedules_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
