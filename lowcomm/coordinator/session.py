"""Who is in, who may speak, what was decided: all of the coordinator but sockets, clocks and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowcomm.coordinator.messages import Arrive, Join, Leave, decode, encode
from lowcomm.participation.base import Arrival, Wait
from lowcomm.participation.meeting import Meeting, View


class Refusal(Exception):
    """Why a message is not accepted; for readers."""


@dataclass
class Member:
    """A process that was admitted as a replica.

    Attributes:
        epoch: at which it was; what it says with an older one is stale.
    """

    replica: int
    incarnation: str
    epoch: int
    name: str
    notices: bool


@dataclass
class Session:
    """One run, from its first round to its last, over restarts of the coordinator.

    What changes here must be saved (`state_dict`) before anybody is told of it.

    Attributes:
        num_replicas: the first round waits for so many.
        members: who is connected.
        changed: whether `state_dict` has changed since the caller last set this to False.
        view: the newest decision.
        done: who is known to hold its result.
    """

    meeting: Meeting
    num_replicas: int = 1
    members: dict[int, Member] = field(default_factory=dict)
    changed: bool = True
    view: View | None = None
    done: set[int] = field(default_factory=set)
    _incarnations: dict[int, str] = field(default_factory=dict)  # the newest of each replica, also of those gone
    _agree: dict[str, str] = field(default_factory=dict)
    _owed: set[int] = field(default_factory=set)  # members of the view who may not have been told
    _taken_for_lost: set[int] = field(default_factory=set)  # by others; they are back once they speak
    _broken: dict[int, Arrival] = field(default_factory=dict)  # who could not end the view's exchange

    def resume(self, saved: Mapping[str, Any] | None, now_s: float) -> None:
        """Begin, or go on from what was saved; in an epoch of its own."""
        if saved is not None:
            self.meeting.load_state_dict(saved["meeting"], now_s)
            self._incarnations = {int(replica): word for replica, word in saved["incarnations"].items()}
            self._agree = dict(saved["agree"])
            self._owed = set(saved["owed"])
            self.view = None if saved["view"] is None else decode(saved["view"], [View])
        self.meeting.epoch += 1
        self.changed = True

    def state_dict(self) -> dict[str, Any]:
        """What must outlive a restart, as JSON."""
        return {
            "meeting": self.meeting.state_dict(),
            "incarnations": self._incarnations,
            "agree": self._agree,
            "owed": sorted(self._owed),
            "view": self.view and encode(self.view),
        }

    @property
    def absent(self) -> list[int]:
        """Who counts as present and is not connected: members from before a restart."""
        return [replica for replica in self.meeting.present if replica not in self.members]

    def join(self, said: Join, now_s: float) -> Member:
        """Admit a process, in place of an older connection of its replica if there is one.

        Raises:
            Refusal: for a process that was replaced, that knows a newer epoch, or that disagrees with the others.
        """
        newest = self._incarnations.get(said.replica, said.incarnation)
        if said.incarnation != newest and said.epoch > 0:
            raise Refusal(f"another process has joined as replica {said.replica} after this one")
        if said.epoch > self.meeting.epoch:
            raise Refusal(
                f"this process has seen epoch {said.epoch} and the coordinator is at {self.meeting.epoch}, so it lost "
                "its memory: start it with the --state file of the one before, or start all replicas anew"
            )
        if said.epoch > 0:  # a new process may go on from a checkpoint
            self._check_version(said.replica, said.version)
        if set(self.meeting.present) <= {said.replica}:
            self._agree = dict(said.agree)
        names = self._agree.keys() | said.agree.keys()
        differing = sorted(name for name in names if self._agree.get(name) != said.agree.get(name))
        if differing:
            raise Refusal(
                f"replica {said.replica} ({said.name}) differs from those that are in, in its {', '.join(differing)}; "
                "start all replicas with the same config and the same version of lowcomm"
            )
        is_fresh = said.incarnation != self._incarnations.get(said.replica)
        if is_fresh:
            self.gone(said.replica)
        self._incarnations[said.replica] = said.incarnation
        owed = self.meeting.round if said.replica in self._owed else 0
        self.meeting.join(said.replica, now_s, max(said.version, owed), is_fresh)
        member = Member(said.replica, said.incarnation, self.meeting.epoch, said.name, said.notices)
        self.members[said.replica] = member
        self._taken_for_lost.discard(said.replica)
        self.changed = True
        return member

    def check(self, member: Member, said: Arrive | Leave) -> None:
        """Raise `Refusal` unless the message is from the newest process of its replica, and of its time."""
        if self.members.get(member.replica) is not member or said.incarnation != member.incarnation:
            raise Refusal(f"another process has joined as replica {member.replica} after this one")
        if not member.epoch <= said.epoch <= self.meeting.epoch:
            raise Refusal(
                f"a message of epoch {said.epoch} came from replica {member.replica}, which was admitted at epoch "
                f"{member.epoch}; now it is {self.meeting.epoch}"
            )

    def _check_version(self, replica: int, version: int) -> None:
        if version > self.meeting.round:
            raise Refusal(f"replica {replica} says that it holds round {version}; the newest is {self.meeting.round}")

    def arrive(self, member: Member, said: Arrive, now_s: float) -> View | None:
        """A replica is ready; the view, if that was decided before and it does not know."""
        self.ended(member, said)
        replica = member.replica
        self._check_version(replica, said.version)
        if self.view and replica in self._owed:
            if said.seen < self.view.round:
                return self.view
            self._owed.discard(replica)
        if replica in self._taken_for_lost:
            self._taken_for_lost.discard(replica)
            self.meeting.join(replica, now_s, said.version, fresh=False)
        arrival = Arrival(replica, now_s, said.version, said.step, said.tokens_done, said.seconds, said.measured)
        if self.view and said.version >= self.view.round:
            self.done.add(replica)
        if self.view and said.broke == self.view.round and replica in self.view.members and not self.done:
            self._broken[replica] = arrival
            for lost in self.lost(said):
                self.meeting.leave(lost)
                self._owed.discard(lost)
                self._taken_for_lost.add(lost)
        else:
            self.meeting.arrive(arrival)
        self._take_again()
        return None

    def lost(self, said: Arrive) -> list[int]:
        """Of those that a member found gone in the newest round, who is present and has not spoken since."""
        if self.view is None or said.broke != self.view.round:
            return []
        able = set(self.view.members) & set(self.meeting.present) - self._broken.keys()
        return sorted(able.intersection(said.lost))

    def ended(self, member: Member, said: Arrive | Leave) -> None:
        """Note that a member holds the result of the round, if it says so."""
        if self.view is not None and said.ended is not None and said.ended.round == self.view.round:
            self.done.add(member.replica)

    def gone(self, replica: int) -> None:
        """A replica has left, or is dead."""
        self.members.pop(replica, None)
        self._owed.discard(replica)
        self._broken.pop(replica, None)
        self._taken_for_lost.discard(replica)
        self.meeting.leave(replica)
        self._take_again()
        self.changed = True

    def poll(self, now_s: float) -> View | Wait:
        """The next decision, if there is one now; else until when to wait."""
        if self.view is None and len(self.meeting.present) < self.num_replicas:
            return Wait()
        decided = self.meeting.poll(now_s)
        if isinstance(decided, View):
            self.view, self._owed, self.done, self.changed = decided, set(decided.members), set(), True
            self._broken.clear()
        return decided

    def _take_again(self) -> None:
        """Once nobody can still end the broken exchange, or somebody has: let those that could not have a round."""
        if self.view is None or not self._broken:
            return
        if self.done:
            for arrival in self._broken.values():
                self.meeting.arrive(arrival)
            self._broken.clear()
        elif all(r in self._broken for r in self.view.members if r in self.meeting.present):
            self.meeting.fail(self.view.round, [r for r in self.view.members if r not in self._broken])
            self._broken.clear()
