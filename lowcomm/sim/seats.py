"""The meeting of a simulation: rules decide on virtual arrivals."""

from __future__ import annotations

from dataclasses import dataclass, field

from lowcomm.participation.base import Arrival, Wait
from lowcomm.participation.meeting import Meeting, View
from lowcomm.participation.options import Participation
from lowcomm.sim.wire.clock import Alarm, Clock


@dataclass
class Hall:
    """Where the ranks of a simulation meet; messages to and from it take no time.

    Attributes:
        views: of all rounds so far.
    """

    clock: Clock
    meeting: Meeting
    views: list[View] = field(default_factory=list)
    _parked: set[int] = field(default_factory=set, init=False)
    _is_over: bool = field(default=False, init=False)
    _alarm: Alarm | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for rank in range(self.meeting.num_replicas):
            self.meeting.join(rank, self.clock.now)

    def meet(self, rank: int, step: int, version: int, tokens_done: float) -> View | None:
        if self._is_over:
            return None
        self.meeting.arrive(Arrival(rank, self.clock.now, version, step, tokens_done))
        self._parked.add(rank)
        self._poll_at(self.clock.now)
        found: View | None = self.clock.park(lambda: "a round that takes it")
        return found

    def end(self) -> None:
        """Send away those who wait, and those who come."""
        self._is_over = True
        for rank in sorted(self._parked):
            self.clock.wake(rank, None)
        self._parked.clear()

    def _poll_at(self, time_s: float) -> None:
        """Ask the meeting then: not at once, as the rank that arrives has to park first."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = self.clock.at(time_s, self._poll)

    def _poll(self) -> None:
        if self._is_over:
            return
        found = self.meeting.poll(self.clock.now)
        if isinstance(found, Wait):
            if found.until_s is not None:
                self._poll_at(found.until_s)
            return
        self.views.append(found)
        for rank in found.members:
            self._parked.remove(rank)
            self.clock.wake(rank, found)
        self._poll()


@dataclass(frozen=True)
class SimSeat:
    """One rank's place in the `Hall`."""

    hall: Hall
    rank: int

    def meet(self, step: int, version: int, tokens_done: float) -> View | None:
        return self.hall.meet(self.rank, step, version, tokens_done)

    def end(self) -> None:
        self.hall.end()


def seats_of(options: Participation | None, clock: Clock, num_ranks: int) -> list[SimSeat] | list[None]:
    """Each rank's place in a run whose rounds a rule decides; else None for each."""
    if options is None:
        return [None] * num_ranks
    hall = Hall(clock, Meeting(options.rule, num_ranks, options.late))
    return [SimSeat(hall, rank) for rank in range(num_ranks)]
