"""Who may speak, what they are told again, and that a decided round outlives any restart."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest

from lowcomm.coordinator import messages as m
from lowcomm.coordinator.session import Member, Refusal, Session
from lowcomm.participation.base import Wait
from lowcomm.participation.meeting import Meeting, View
from lowcomm.participation.rules import All, FirstK
from tests.coordinator.ranks import ARRIVE, JOIN


def begun(rule: Any = None, num_replicas: int = 1, saved: Any = None) -> Session:
    session = Session(Meeting(rule or All()), num_replicas)
    session.resume(saved, 0.0)
    return session


def restarted(session: Session) -> Session:
    """Killed, and started again from what it would have saved."""
    return begun(session.meeting.rule, session.num_replicas, json.loads(json.dumps(session.state_dict())))


def join(session: Session, replica: int, **changes: Any) -> Member:
    said = replace(JOIN, replica=replica, incarnation=f"p{replica}")
    return session.join(replace(said, **changes), 1.0)


def arrive(session: Session, member: Member, version: int, **changes: Any) -> View | None:
    said = replace(ARRIVE, incarnation=member.incarnation, epoch=session.meeting.epoch, version=version, seen=version)
    said = replace(said, tokens_done=100.0 * (version + 1))
    session.check(member, replace(said, **changes))
    return session.arrive(member, replace(said, **changes), 2.0)


def view_of(session: Session) -> View:
    decided = session.poll(3.0)
    assert isinstance(decided, View)
    return decided


def test_a_zombie_does_not_get_in() -> None:
    session = begun()
    old = join(session, 0)
    new = join(session, 0, incarnation="another process")
    with pytest.raises(Refusal, match="another process has joined"):
        arrive(session, old, 0)
    for saved in (session, restarted(session)):  # a restart forgets nobody
        with pytest.raises(Refusal, match="another process has joined"):
            join(saved, 0, epoch=1)
    assert arrive(session, new, 0) is None


def test_messages_of_another_epoch_are_refused() -> None:
    session = begun()
    member = join(session, 0)
    session = restarted(session)
    with pytest.raises(Refusal, match="another process"):
        arrive(session, member, 0)
    member = join(session, 0, epoch=1)
    with pytest.raises(Refusal, match="admitted at epoch 2"):
        arrive(session, member, 0, epoch=1)
    with pytest.raises(Refusal, match="now it is 2"):
        arrive(session, member, 0, epoch=3)


def test_a_coordinator_without_memory_is_found_out() -> None:
    with pytest.raises(Refusal, match="lost its memory"):
        join(begun(), 0, epoch=7)


def test_a_round_that_was_never_decided_cannot_be_held() -> None:
    session = begun()
    member = join(session, 0)
    with pytest.raises(Refusal, match="the newest is 0"):
        arrive(session, member, 10**9)


def test_who_differs_is_told_in_what() -> None:
    session = begun()
    join(session, 0)
    with pytest.raises(Refusal, match=r"differs .* in its codecs, dtype"):
        join(session, 1, agree={"config": "c", "codecs": "other", "dtype": "bfloat16"})
    join(session, 0, incarnation="restarted", agree={"config": "new"})  # alone, it may change its mind
    with pytest.raises(Refusal, match="codecs, config"):
        join(session, 1)


def test_the_first_round_waits_for_all_that_are_expected() -> None:
    session = begun(num_replicas=2)
    arrive(session, join(session, 0), 0)
    assert session.poll(3.0) == Wait()
    arrive(session, join(session, 1), 0)
    assert view_of(session).members == (0, 1)


def test_a_decided_round_is_told_again_after_a_restart() -> None:
    session = begun(FirstK(2))
    for replica in range(2):
        arrive(session, join(session, replica), 0)
    view = view_of(session)
    session = restarted(session)  # nobody was told
    for late in (2, 3):
        assert arrive(session, join(session, late), 0) is None
    assert session.poll(3.0) == Wait()  # who holds round 1, or will, has not come back
    first, second = join(session, 0, epoch=1), join(session, 1, epoch=1)
    assert session.poll(3.0) == Wait()  # they have come, and do not know yet that they take part in it
    assert arrive(session, first, 0) == view
    assert arrive(session, second, 0) == view
    assert arrive(session, first, 1) is None
    assert arrive(session, second, 1) is None
    after = view_of(session)
    assert after.round == 2 and after.epoch > view.epoch and after.members == (0, 1, 2, 3)


def test_an_arrival_that_crosses_the_decision_does_not_count_twice() -> None:
    session = begun()
    member = join(session, 0)
    arrive(session, member, 0)
    view = view_of(session)
    assert arrive(session, member, 0, tokens_done=150.0) == view
    assert session.poll(3.0) == Wait()
    arrive(session, member, 1, tokens_done=200.0)
    assert view_of(session).tokens == (100.0,)


def broken_round() -> tuple[Session, list[Member]]:
    """Three replicas in a round."""
    session = begun(num_replicas=3)
    members = [join(session, replica) for replica in range(3)]
    for member in members:
        arrive(session, member, 0)
    assert view_of(session).members == (0, 1, 2)
    return session, members


def test_survivors_take_a_broken_round_again() -> None:
    session, members = broken_round()
    arrive(session, members[0], 0, seen=1, broke=1, lost=(2,))
    assert session.poll(3.0) == Wait()  # 1 may still end it
    arrive(session, members[1], 0, seen=1, broke=1)
    again = view_of(session)
    assert again.round == 2 and again.members == (0, 1) and again.tokens == (100.0, 100.0)
    arrive(session, members[2], 0, seen=1, broke=1)  # it lives after all, and comes along next time
    for replica in range(2):
        arrive(session, members[replica], 2)
    assert view_of(session).members == (0, 1, 2)


def test_survivors_take_it_again_when_the_last_who_could_end_it_dies() -> None:
    session, members = broken_round()
    for replica in range(2):
        arrive(session, members[replica], 0, seen=1, broke=1)
    assert session.poll(3.0) == Wait()
    session.gone(2)
    assert view_of(session).members == (0, 1)


@pytest.mark.parametrize("broken_first", [True, False])
def test_a_round_that_one_committed_stands(broken_first: bool) -> None:
    session, members = broken_round()
    ended = m.Ended(1, 0.0, 0.0, 0, None)
    order: list[tuple[int, dict[str, Any]]] = [
        (1, {"seen": 1, "broke": 1}),
        (2, {"seen": 1, "broke": 1}),
        (0, {"ended": ended}),
    ]
    for replica, changes in order if broken_first else order[::-1]:
        arrive(session, members[replica], 0 if "broke" in changes else 1, **changes)
    view = view_of(session)
    assert view.versions == (1, 0, 0)
    assert view.tokens == (100.0, 0.0, 0.0)  # the round holds what 1 and 2 brought


@pytest.mark.parametrize("seed", range(30))
def test_no_round_is_lost_or_decided_twice_over_any_restarts(seed: int) -> None:
    """Ranks arrive, the coordinator dies at any moment, before or after it has told somebody."""
    draw = random.Random(seed)
    session = begun(FirstK(2), num_replicas=3)
    members = {replica: join(session, replica) for replica in range(3)}
    told: dict[int, View] = {}
    held = dict.fromkeys(members, 0)
    for _ in range(200):
        replica = draw.randrange(3)
        if draw.random() < 0.2:
            epoch = session.meeting.epoch
            session = restarted(session)
            members = {r: join(session, r, epoch=epoch, version=held[r]) for r in members}
        known = arrive(session, members[replica], held[replica])
        decided = known or session.poll(3.0)
        if isinstance(decided, View):
            assert told.setdefault(decided.round, decided) == decided
            for member in decided.members:  # an exchange is all or nothing; some hear of it only after a restart
                if member == replica or draw.random() < 0.5:
                    held[member] = max(held[member], decided.round)
    assert sorted(told) == list(range(1, len(told) + 1)) and len(told) > 20
    epochs = [told[number].epoch for number in sorted(told)]
    assert epochs == sorted(epochs)
