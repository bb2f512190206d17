"""A clock without ranks: only alarms, for tests of what needs no more."""

from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any


@dataclass
class FakeAlarm:
    """One action that is due, or was."""

    action: Callable[[], None] | None

    def cancel(self) -> None:
        """It will not happen."""
        self.action = None


@dataclass
class FakeClock:
    """Acts in the order of (time, call); ``watch`` is called with the time that is about to pass."""

    watch: Callable[[float], None] = lambda seconds: None
    now: float = 0.0
    num_events: int = 0
    due: list[tuple[float, int, FakeAlarm]] = field(default_factory=list)
    num_alarms: int = 0

    def at(self, time: float, action: Callable[[], None]) -> Any:
        """Act then; never before now."""
        assert time >= self.now
        alarm = FakeAlarm(action)
        self.num_alarms += 1
        heappush(self.due, (time, self.num_alarms, alarm))
        return alarm

    def run(self) -> float:
        """Until nothing is due; the time of the last event."""
        while self.due:
            time, _, alarm = heappop(self.due)
            if alarm.action is not None:
                if time > self.now:
                    self.watch(time - self.now)
                self.now, self.num_events = time, self.num_events + 1
                alarm.action()
        return self.now
