"""A compute model with pauses and slow-downs, and the product of overlapping slow-downs."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from lowcomm.sim.cluster.compute import Around
from lowcomm.sim.cluster.faults import Event, Pause, SlowDown


def slowness(windows: Sequence[tuple[float, float, float]]) -> tuple[list[float], list[float]]:
    """Windows of time as (begin, end, factor): the moments of change, and the factors' product from each on."""
    moments = sorted({moment for begin, end, _ in windows for moment in (begin, end)})
    return moments, [math.prod(f for begin, end, f in windows if begin <= moment < end) for moment in moments]


@dataclass(frozen=True)
class Hindered(Around):
    """A step's work proceeds at the current speed: slower in a slow-down, not at all in a pause.

    Slow-downs that overlap multiply. ``model`` has the times without faults.

    Attributes:
        plan: its `Pause` and compute `SlowDown` events matter.
    """

    plan: Sequence[Event]
    # for each rank the moments at which its slowness changes, and the slowness from each on
    _changes: dict[int, tuple[list[float], list[float]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        windows: dict[int, list[tuple[float, float, float]]] = {}
        for event in self.plan:
            if isinstance(event, Pause):
                windows.setdefault(event.rank, []).append((event.at_s, event.at_s + event.seconds, math.inf))
            elif isinstance(event, SlowDown) and event.what == "compute":
                windows.setdefault(event.rank, []).append((event.at_s, event.at_s + event.seconds, event.factor))
        self._changes.update({rank: slowness(of_rank) for rank, of_rank in windows.items()})

    def seconds(self, rank: int, t: int, start: float) -> float:
        """Seconds until the model's step time has been worked off."""
        work = self.model.seconds(rank, t, start)
        if work == 0 or rank not in self._changes:
            return work
        moments, slowness = self._changes[rank]
        next_change = bisect_right(moments, start)
        now, slow = start, slowness[next_change - 1] if next_change else 1.0
        for moment, next_slow in zip(moments[next_change:], slowness[next_change:], strict=True):
            done = (moment - now) / slow
            if done >= work:
                break
            work, now, slow = work - done, moment, next_slow
        return now + work * slow - start
