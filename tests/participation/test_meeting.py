"""Whatever comes in whatever order: one line of results, and every token in it once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lowcomm.participation.base import Arrival, Wait
from lowcomm.participation.meeting import Meeting, View
from lowcomm.participation.rules import All, Deadline, FirstK, Quorum

REPLICAS = st.integers(0, 3)
Work = frozenset[tuple[int, int]]  # (process, token)


@dataclass
class Process:
    """A replica's process; `holds` is the newest result that it got, as its round and all work that is in it."""

    id: int
    tokens_done: int = 0
    holds: tuple[int, Work] = (0, frozenset())
    came: Work | None = None  # what it had done when it arrived, until it is in a view
    view: View | None = None  # under way
    result: tuple[int, Work] = (0, frozenset())  # that the view would bring
    lost: Work = frozenset()  # done on top of a result that is void

    def work(self) -> Work:
        return frozenset((self.id, i) for i in range(self.tokens_done))


@dataclass
class Ledger:
    """What views were handed out, and what the results hold."""

    last: View | None = None
    held_by: dict[int, tuple[int, ...]] = field(default_factory=dict)  # epoch: processes


class Replicas(RuleBasedStateMachine):
    """Replicas join, work, arrive, go and come back; exchanges end or break on any of them; restarts."""

    @initialize(
        rule=st.sampled_from([All(), FirstK(2), Deadline(3.0), Quorum(0.5, 2.0)]),
        late=st.sampled_from(["carry", "drop"]),
    )
    def begin(self, rule, late):
        self.away = None
        self.now_s, self.ids, self.make = 0.0, 0, lambda: Meeting(rule, 4, late)
        self.meeting = self.make()
        self.kept = json.dumps(self.meeting.state_dict())
        self.live: dict[int, Process] = {}
        self.seen = Ledger()
        for replica in range(4):
            self.start(replica)

    def some(self, data, able):
        """One of the replicas of whose process this is true."""
        found = sorted(replica for replica, process in self.live.items() if able(process))
        assert found
        return data.draw(st.sampled_from(found))

    @rule(replica=REPLICAS)
    def start(self, replica):
        if replica in self.live:  # its process dies first
            self.meeting.leave(replica)
        self.ids += 1
        self.live[replica] = Process(self.ids)
        self.meeting.join(replica, self.now_s)
        self.kept = json.dumps(self.meeting.state_dict())

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def die(self, data):
        replica = self.some(data, lambda p: True)
        self.meeting.leave(replica)
        del self.live[replica]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def seem_dead_and_return(self, data):
        replica = self.some(data, lambda p: True)
        self.meeting.leave(replica)
        self.away = replica
        self.poll()
        self.away = None
        process = self.live[replica]
        process.came = None
        self.meeting.join(replica, self.now_s, process.view.round if process.view else process.holds[0], fresh=False)

    @precondition(lambda self: any(p.view is None for p in self.live.values()))
    @rule(data=st.data(), num_tokens=st.integers(0, 5))
    def arrive(self, data, num_tokens):
        replica = self.some(data, lambda p: p.view is None)
        process = self.live[replica]
        process.tokens_done += num_tokens
        process.came = process.work()
        if self.meeting._standing(process.holds[0]) < 0:  # what it did since is on top of what nobody else has
            process.lost = process.came
        self.meeting.arrive(Arrival(replica, self.now_s, process.holds[0], 0, process.tokens_done))

    @precondition(lambda self: any(p.view is not None for p in self.live.values()))
    @rule(data=st.data(), ends=st.booleans())
    def exchange(self, data, ends):
        replica = self.some(data, lambda p: p.view is not None)
        process = self.live[replica]
        process.view = None
        if ends:
            process.holds = process.result

    def breakable(self):
        """Whether members of the last view are left, and nobody has its result."""
        last = self.seen.last
        left = last and any(r in self.live and self.live[r].id == id for r, id, _ in self.brought)
        return left and all(process.holds[0] < last.round for process in self.live.values())

    @precondition(lambda self: self.breakable())
    @rule(num_lost=st.integers(0, 2))
    def break_everywhere(self, num_lost):
        view = self.seen.last
        members = [r for r, id, _ in self.brought if r in self.live and self.live[r].id == id]
        for replica in members[:num_lost]:
            del self.live[replica]
        again = [self.live[replica] for replica in members[num_lost:]]
        as_they_came = not any(process.came is not None for process in again)
        self.meeting.fail(view.round, members[:num_lost])
        for process in again:
            process.view = None
        if not as_they_came or self.meeting._standing(view.round) < 0:
            return
        for replica, _, work in self.brought:
            if replica in members[num_lost:]:
                self.live[replica].came = work
        taken = self.poll()
        if again and taken:
            assert set(members[num_lost:]) <= set(taken.members)
            assert taken.epoch > view.epoch

    @rule()
    def restart(self):
        self.meeting = self.make()
        self.meeting.load_state_dict(json.loads(self.kept), self.now_s)
        for replica in self.meeting.present:
            if replica not in self.live:
                self.meeting.leave(replica)
        for replica, process in self.live.items():
            process.came = None
            held = process.view.round if process.view else process.holds[0]
            self.meeting.join(replica, self.now_s, held, fresh=False)

    @rule(seconds=st.floats(0, 4))
    def wait(self, seconds):
        self.now_s += seconds
        self.poll()

    def poll(self):
        view = self.meeting.poll(self.now_s)
        if isinstance(view, Wait):
            return None
        self.kept = json.dumps(self.meeting.state_dict())
        last, self.seen.last = self.seen.last, view
        assert list(view.members) == sorted(set(view.members))
        assert all(self.live[r].came is not None for r in view.members), "a member has not arrived"
        donor = self.live[view.donor]
        held = {r: self.meeting._standing(p.holds[0]) for r, p in self.live.items() if r != self.away}
        assert held[view.donor] == max(held.values()), "someone holds a newer result"
        assert view.versions == tuple(held[r] for r in view.members)
        assert view.round > max(held.values())
        assert last is None or (view.round > last.round and view.epoch >= last.epoch)
        processes = tuple(self.live[r].id for r in view.members)
        assert self.seen.held_by.setdefault(view.epoch, processes) == processes, "an epoch is of one group"
        result = donor.holds[1]
        for replica, tokens in zip(view.members, view.tokens, strict=True):
            new = self.live[replica].came - donor.holds[1] - self.live[replica].lost
            assert tokens == len(new), "a token counts twice, or not at all"
            result |= new
        self.brought = [(r, self.live[r].id, self.live[r].came) for r in view.members]
        for replica in view.members:
            process = self.live[replica]
            process.view, process.came, process.result = view, None, (view.round, result)
        return view

    @invariant()
    def nobody_waits_for_nobody(self):
        """When everyone has arrived, the round goes on."""
        if self.live and all(p.came is not None for p in self.live.values()):
            assert self.poll() is not None


# how long it takes to draw depends on who else uses the machine
Replicas.TestCase.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestReplicas = Replicas.TestCase


def meeting_of(rule, num, late="carry"):
    meeting = Meeting(rule, num, late)
    for replica in range(num):
        meeting.join(replica, 0.0)
    return meeting


def come(meeting, replica, at_s, version=0, tokens_done=8):
    meeting.arrive(Arrival(replica, at_s, version, 0, tokens_done))
    return meeting.poll(at_s)


def test_the_late_come_along_in_the_next_round():
    meeting = meeting_of(FirstK(2), 3)
    assert come(meeting, 0, 1.0) == Wait()
    assert come(meeting, 1, 2.0) == View(1, 1, (0, 1), (8, 8), (0, 0))
    assert come(meeting, 2, 3.0) == Wait()
    view = come(meeting, 0, 4.0, version=1, tokens_done=16)
    assert view == View(2, 2, (0, 2), (8, 8), (1, 0))
    assert view.donor == 0
    assert view.shares(0.5, "carry") == (2 / 3, 1 / 3)
    assert view.shares(0.5, "drop") == (1, 0)


def test_who_missed_a_round_does_not_count_where_the_late_are_dropped():
    meeting = meeting_of(FirstK(2), 3, "drop")
    come(meeting, 0, 1.0)
    come(meeting, 1, 2.0)
    come(meeting, 2, 3.0)
    assert come(meeting, 0, 4.0, version=1, tokens_done=16) == Wait()
    assert come(meeting, 1, 5.0, version=1, tokens_done=16) == View(2, 2, (0, 1, 2), (8, 8, 8), (1, 1, 0))


def test_no_round_without_someone_who_may_hold_the_newest_result():
    meeting = meeting_of(FirstK(2), 4)
    come(meeting, 0, 1.0)
    come(meeting, 1, 2.0)
    come(meeting, 2, 3.0)
    assert come(meeting, 3, 4.0) == Wait()
    meeting.leave(0)
    assert meeting.poll(5.0) == Wait()
    meeting.leave(1)
    assert meeting.poll(6.0) == View(2, 2, (2, 3), (8, 8), (0, 0))


def test_a_broken_round_is_taken_again_without_the_lost_and_without_the_late():
    meeting = meeting_of(FirstK(3), 4)
    for replica in range(3):
        view = come(meeting, replica, 1.0 + replica)
    assert view == View(1, 1, (0, 1, 2), (8, 8, 8), (0, 0, 0))
    meeting.fail(1, [1])
    assert meeting.poll(4.0) == View(2, 2, (0, 2), (8, 8), (0, 0))


def test_a_new_process_of_an_old_number_gets_a_new_epoch_and_counts_afresh():
    meeting = meeting_of(All(), 2)
    come(meeting, 0, 1.0)
    assert come(meeting, 1, 1.0).epoch == 1
    come(meeting, 0, 2.0, 1, 16)
    meeting.leave(1)
    meeting.join(1, 2.5)
    assert come(meeting, 1, 3.0, 0, 3) == View(2, 2, (0, 1), (8, 3), (1, 0))


@given(
    tokens=st.lists(st.integers(0, 100), min_size=1, max_size=6),
    data=st.data(),
    discount=st.floats(0, 1),
    late=st.sampled_from(["carry", "drop"]),
)
def test_shares_sum_to_one_and_are_zero_for_nothing(tokens, data, discount, late):
    versions = tuple(data.draw(st.integers(0, 5)) for _ in tokens)
    shares = View(1, 9, tuple(range(len(tokens))), tuple(map(float, tokens)), versions).shares(discount, late)
    current = [n for n, v in zip(tokens, versions, strict=True) if v == max(versions)]
    if any(current):
        assert sum(shares) == pytest.approx(1)
    assert all(share == 0 for n, share in zip(tokens, shares, strict=True) if n == 0)
    if late == "drop":
        assert all(s == 0 for s, v in zip(shares, versions, strict=True) if v < max(versions))


def void_round(num=3):
    """A meeting after round 1, of all, broke for all but replica 0, who seemed dead; the others then took round 2."""
    meeting = meeting_of(FirstK(2), num)
    for replica in range(num):
        meeting.arrive(Arrival(replica, 1.0, 0, 0, 8))
    assert meeting.poll(1.0).round == 1
    meeting.fail(1, [0])
    assert meeting.poll(2.0) == View(2, 2, tuple(range(1, num)), (8,) * (num - 1), (0,) * (num - 1))
    return meeting


def test_who_returns_with_a_void_result_comes_along_without_its_work():
    meeting = void_round()
    meeting.join(0, 3.0, version=1, fresh=False)
    come(meeting, 0, 4.0, version=1, tokens_done=20)
    come(meeting, 1, 4.0, version=2, tokens_done=16)
    view = come(meeting, 2, 4.0, version=2, tokens_done=16)
    assert view == View(3, 3, (0, 1, 2), (0, 8, 8), (-1, 2, 2))
    assert view.donor == 1


def test_results_of_two_void_rounds_are_not_the_same():
    meeting = void_round()
    for replica in (1, 2):
        meeting.leave(replica)
    meeting.join(3, 3.0, version=0)
    come(meeting, 3, 3.0)
    meeting.leave(3)
    meeting.join(0, 4.0, version=1, fresh=False)
    meeting.join(1, 4.0, version=2, fresh=False)
    come(meeting, 0, 5.0, version=1, tokens_done=8)
    assert come(meeting, 1, 5.0, version=2, tokens_done=8).versions == (-1, -2)


def test_what_a_lost_result_held_is_brought_again():
    meeting = meeting_of(All(), 2)
    come(meeting, 0, 1.0)
    come(meeting, 1, 1.0)
    come(meeting, 0, 2.0, version=1)  # has the result
    come(meeting, 1, 2.0, version=0)  # has not
    meeting.leave(0)  # in round 2, whose base was the result
    assert come(meeting, 1, 3.0, version=0).tokens == (8,)


def test_connections_that_broke_are_never_used_again():
    meeting = meeting_of(All(), 2)
    come(meeting, 0, 1.0)
    assert come(meeting, 1, 1.0).epoch == 1
    come(meeting, 0, 2.0, version=1)
    assert come(meeting, 1, 2.0, version=0).epoch == 2  # the same members, of whom one broke away
    other = Meeting(All(), 2)
    other.load_state_dict(json.loads(json.dumps(meeting.state_dict())), 3.0)
    come(other, 0, 3.0, version=2)
    assert come(other, 1, 3.0, version=2).epoch == 3  # after a restart


def test_void_rounds_outlive_a_restart():
    meeting = void_round()
    other = Meeting(FirstK(2), 3)
    other.load_state_dict(json.loads(json.dumps(meeting.state_dict())), 3.0)
    other.join(0, 3.0, version=1, fresh=False)
    come(other, 0, 4.0, version=1)
    come(other, 1, 4.0, version=2)
    assert come(other, 2, 4.0, version=2).versions == (-1, 2, 2)


def test_a_new_process_does_not_take_a_broken_round_again():
    meeting = meeting_of(All(), 2)
    come(meeting, 0, 1.0)
    come(meeting, 1, 1.0)
    meeting.leave(1)
    meeting.join(1, 2.0)
    meeting.fail(1, [])
    assert meeting.poll(3.0).members == (0,)


def test_what_was_brought_to_a_void_round_is_brought_again():
    meeting = meeting_of(FirstK(2), 3)
    come(meeting, 0, 1.0)
    come(meeting, 1, 1.0)
    meeting.leave(1)
    come(meeting, 0, 2.0, version=0)
    assert come(meeting, 2, 2.0).members == (0, 2)
    meeting.join(1, 3.0, version=1, fresh=False)
    come(meeting, 1, 3.0, version=0)
    assert come(meeting, 0, 4.0, version=2, tokens_done=16).tokens == (8, 8)


def test_nobody_waits_for_who_may_hold_a_void_result():
    meeting = void_round()
    meeting.join(0, 3.0, version=1, fresh=False)
    meeting.fail(2, [])
    assert meeting.poll(4.0).members == (1, 2)
