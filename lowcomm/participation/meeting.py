"""Where replicas meet between rounds: arrivals come in, views go out.

Each view has a member who holds the newest result that anybody present may hold, so that there is one line of results.
A round that broke is void if nobody came back with its result, and stands if someone did; either way what a replica
brought counts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lowcomm.participation.base import Arrival, Late, RoundReport, Rule, Wait


@dataclass(frozen=True)
class View:
    """Who takes part in one round.

    Attributes:
        epoch: grows whenever the members are others than before, after a failure and after a restart; never reused.
        round: from 1; none comes twice.
        members: sorted.
        tokens: that each of them brings.
        versions: of each, the last round whose result it holds, negative if that round is void. Those below the largest
            first get the result from `donor`.
    """

    epoch: int
    round: int
    members: tuple[int, ...]
    tokens: tuple[float, ...]
    versions: tuple[int, ...]

    @property
    def donor(self) -> int:
        """The first member who holds the newest result."""
        return self.members[self.versions.index(max(self.versions))]

    def shares(self, discount: float, late: Late) -> tuple[float, ...]:
        """The weight of each member's contribution: tokens times discount to the power of rounds missed, summing to 1.

        All are 0 where nobody brings anything; the round then only spreads the newest result.

        Args:
            discount: in [0, 1].
            late: "drop" gives those who missed a round 0.
        """
        newest, kept = max(self.versions), discount if late == "carry" else 0.0
        weights = [n * kept ** (newest - v) for n, v in zip(self.tokens, self.versions, strict=True)]
        total = sum(weights)
        return tuple(weight / total if total else 0.0 for weight in weights)


@dataclass
class Meeting:
    """The replicas between rounds, single-threaded; times are the caller's.

    The caller calls `poll` after other methods and when the last `poll` said so. It looks at everyone who is present,
    so of many arrivals that are there together it follows the last.

    Attributes:
        rule: when a round goes on.
        num_replicas: how many are expected; only the rule looks at it.
        late: whether those who missed a round count for the rule ("carry"), or only come along to get the newest
            result ("drop").
        epoch: of the last view.
        round: of the last view.
    """

    rule: Rule[Any]
    num_replicas: int = 1
    late: Late = "carry"
    epoch: int = 0
    round: int = 0
    _state: Any = field(init=False)
    _begun_s: float | None = field(default=None, init=False)
    _waiting: dict[int, Arrival] = field(default_factory=dict, init=False)  # in the order of coming
    _may_hold: dict[int, int] = field(default_factory=dict, init=False)  # of who is present: the newest round
    _took: dict[int, Arrival] = field(default_factory=dict, init=False)  # those of the last view
    # of each replica, rounds that it was in and the tokens that it had done by then, from its own version on
    _counted: dict[int, list[tuple[int, float]]] = field(default_factory=dict, init=False)
    _void: list[tuple[int, int]] = field(default_factory=list, init=False)  # rounds that are in no result, from and to
    _members: tuple[int, ...] = field(default=(), init=False)
    _fenced: bool = field(default=True, init=False)  # the next view must have a new epoch
    _again: bool = field(default=False, init=False)  # the last round broke and goes on without its lost

    def __post_init__(self) -> None:
        self._state = self.rule.init(self.num_replicas)

    @property
    def present(self) -> tuple[int, ...]:
        """Who is here, sorted."""
        return tuple(sorted(self._may_hold))

    @property
    def waiting(self) -> tuple[Arrival, ...]:
        """Who has arrived for the next round, in the order of coming."""
        return tuple(self._waiting.values())

    def join(self, replica: int, now_s: float, version: int = 0, fresh: bool = True) -> None:
        """A replica is here, or here again after a connection or the coordinator was lost.

        Args:
            version: the newest round whose result it may come to hold: of a round that it is exchanging, that one.
            fresh: its process has just started; else it is the one that was here before, and goes on counting tokens.
        """
        self._fenced |= fresh or replica not in self._may_hold
        self._may_hold[replica] = self._standing(version)
        self.round = max(self.round, version)
        self._begun_s = now_s if self._begun_s is None else self._begun_s
        if fresh:
            self._waiting.pop(replica, None)
            self._took.pop(replica, None)
            self._counted.pop(replica, None)

    def leave(self, replica: int) -> None:
        """A replica has gone, and nobody waits for it."""
        self._may_hold.pop(replica, None)
        self._waiting.pop(replica, None)

    def arrive(self, arrival: Arrival) -> None:
        """A replica that has joined is ready; a second arrival replaces one that waits, since it went on working.

        One that lacks the result of its last view says so by its version. One that holds the result of a round that is
        void, since everyone took it for lost, has lost what it did, and only comes along.
        """
        replica = arrival.replica
        assert replica in self._may_hold, f"replica {replica} arrives without having joined"
        self.round = max(self.round, arrival.version)
        version = self._standing(arrival.version)
        if version < arrival.version:
            arrival = replace(arrival, version=version)
            self._counted[replica] = [(version, arrival.tokens_done)]
        past = self._counted.get(replica, [])
        older, newer = ([pair for pair in past if (pair[0] > version) == is_newer] for is_newer in (False, True))
        self._counted[replica] = [*older[-1:], *newer]
        self._fenced |= version < self._may_hold[replica]  # its connections in the last view are broken
        self._may_hold[replica] = version
        self._waiting.pop(replica, None)
        self._waiting[replica] = arrival
        self._state = self.rule.hear(self._state, arrival)
        if arrival.measured is not None:
            self._state = self.rule.learn(self._state, arrival.measured)

    def poll(self, now_s: float) -> View | Wait:
        """The next round's view, if it goes on now; else until when to wait."""
        newest = max(self._may_hold.values(), default=0)
        if not any(arrival.version >= newest for arrival in self._waiting.values()):
            return Wait()  # who holds the newest result, or may, has to come or to leave first
        assert self._begun_s is not None, "someone waits, so someone joined"
        waiting = list(self._waiting.values())
        counted = [a for a in waiting if self._brings(a, newest) > 0 and (self.late == "carry" or a.version == newest)]
        if not (self._again or len(waiting) == len(self._may_hold)):
            idle = self._waiting.keys() - {arrival.replica for arrival in counted}
            able = [replica for replica in self.present if replica not in idle]
            decision = self.rule.decide(self._state, counted, able, self._begun_s, now_s)
            if isinstance(decision, Wait):
                return decision
            assert set(decision.replicas) <= self._waiting.keys(), "a rule took someone who has not arrived"
            left_out = {arrival.replica for arrival in counted} - set(decision.replicas)
            waiting = [arrival for arrival in waiting if arrival.replica not in left_out]
            assert any(arrival.version == newest for arrival in waiting), "a rule left out who holds the newest result"
        return self._view(waiting, newest, len(counted), now_s)

    def fail(self, round: int, lost: Sequence[int]) -> None:
        """A view's exchange broke: its other members take it again, as they came, without the lost.

        For when they all lack its result. Where one of them has it the round stands, and those who lack it arrive
        again instead.
        """
        for replica in lost:
            self.leave(replica)
        back = {replica: arrival for replica, arrival in self._took.items() if replica in self._may_hold}
        if round != self.round or any(replica in self._waiting for replica in back):
            return  # of a past round, or members say for themselves where they stand
        for replica, arrival in back.items():
            self._may_hold[replica] = arrival.version
            self._waiting[replica] = arrival
        self._fenced = True
        self._again = bool(back)

    def state_dict(self) -> dict[str, Any]:
        """What must outlive a restart, as JSON: to be kept before a view is handed out, and after a fresh join."""
        return {
            "epoch": self.epoch,
            "round": self.round,
            "may_hold": [list(pair) for pair in self._may_hold.items()],
            "void": [list(pair) for pair in self._void],
            "counted": [[replica, [list(pair) for pair in pairs]] for replica, pairs in self._counted.items()],
            "took": [[a.replica, a.version, a.step, a.tokens_done] for a in self._took.values()],
        }

    def load_state_dict(self, kept: dict[str, Any], now_s: float) -> None:
        """Go on after a restart: those who were present still are, until they arrive or leave.

        What the rule has learnt is lost, and who waited must arrive again.
        """
        self.epoch, self.round = kept["epoch"], kept["round"]
        self._may_hold = dict(kept["may_hold"])
        self._void = [(first, last) for first, last in kept["void"]]
        self._counted = {replica: [(at, done) for at, done in pairs] for replica, pairs in kept["counted"]}
        self._took = {r: Arrival(r, now_s, version, step, done) for r, version, step, done in kept["took"]}
        self._begun_s = now_s

    def _standing(self, version: int) -> int:
        """A version, negative if its round is void."""
        return -version if any(first <= version <= last for first, last in self._void) else version

    def _brings(self, arrival: Arrival, newest: int) -> float:
        """The tokens that the newest result lacks."""
        held = [done for at, done in self._counted.get(arrival.replica, []) if at <= newest]
        return max(0.0, arrival.tokens_done - max(held, default=0.0))

    def _view(self, taken: Sequence[Arrival], newest: int, num_counted: int, now_s: float) -> View:
        """Decide; what nobody present came back from is void from now on."""
        assert self._begun_s is not None
        taken = sorted(taken, key=lambda arrival: arrival.replica)
        members = tuple(arrival.replica for arrival in taken)
        tokens, versions = zip(*((self._brings(arrival, newest), arrival.version) for arrival in taken), strict=True)
        if newest < self.round:
            self._void.append((max(newest, 0) + 1, self.round))
            self._counted = {r: [pair for pair in pairs if pair[0] <= newest] for r, pairs in self._counted.items()}
        self.round += 1
        self.epoch += self._fenced or members != self._members
        ended = RoundReport(self.round, self._begun_s, now_s, num_counted, len(self._may_hold))
        self._state = self.rule.observe(self._state, ended)
        for arrival in taken:
            del self._waiting[arrival.replica]
            self._may_hold[arrival.replica] = self.round
            self._counted[arrival.replica].append((self.round, arrival.tokens_done))
        self._took = {arrival.replica: arrival for arrival in taken}
        self._members, self._begun_s, self._fenced, self._again = members, now_s, False, False
        return View(self.epoch, self.round, members, tokens, versions)
