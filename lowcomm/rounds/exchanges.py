"""What methods send, and what is on its way: averages over replicas that set out at one step and are due at another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lowcomm.comm.base import Comm, Late, PeerLost, Task
from lowcomm.reduce import ALL_SENT, Reducer, ReducerState
from lowcomm.tensors import buckets

# What to average of the tensors at these places of a list.
Values = Callable[[Sequence[int]], list[Tensor]]
# Starts an average of values as `Reducer.mean` does.
Average = Callable[[list[Tensor], ReducerState, Comm], Task[tuple[list[Tensor], ReducerState]]]


@dataclass(frozen=True)
class Sending:
    """Something to average over replicas.

    Attributes:
        slot: which of the method's averages it is; what its reducer keeps goes from one to the next of its name.
        reducer: how it is averaged.
        like: shapes and dtypes of the values; without ``values``, the values themselves.
        values: makes them when they set out, some at a time and each once: fresh tensors, which nobody else holds.
        numbers: the parameter that each value is of, so that it may set out while backward goes on; None: of none.
        delay: steps until the means are needed; 0: now.
        pace: steps over which messages that follow on each other are spread, equal on all ranks; None: ``delay``.
        memo: what the method wants back with the means: tensors, numbers, lists of them.
        average: in place of the reducer's mean over all members; of ``like``.
        has_prelude: something else must be exchanged first, which is waited for one step later.
    """

    slot: str
    reducer: Reducer
    like: list[Tensor]
    values: Values | None = None
    numbers: Sequence[int] | None = None
    delay: int = 0
    pace: int | None = None
    memo: Any = None
    average: Average | None = None
    has_prelude: bool = False

    def cut(self, overlap: bool) -> list[list[int]]:
        """Places that travel together, in the order in which they set out: with ``overlap`` from the last parameter to
        the first in groups of the reducer's ``bucket_bytes``, otherwise all at once.
        """
        if not overlap or self.numbers is None:
            return [list(range(len(self.like)))]
        return cut_backwards(self.like, self.reducer.bucket_bytes)

    def start(self, places: Sequence[int], kept: ReducerState, comm: Comm) -> UnderWay:
        """Send these values off."""
        like, values = [self.like[i] for i in places], self.values
        if self.average is not None:
            return UnderWay(self.average(like, kept, comm))
        made = None if values is None else lambda some: values([places[k] for k in some])
        return UnderWay(self.reducer.mean(like, kept, comm, made))

    def exchange(self, t: int) -> Exchange:
        """The record of it, when it sets out at step ``t``, before any part has."""
        pace = self.delay if self.pace is None else self.pace
        ages = [1] if self.has_prelude and self.delay else []
        num_messages = 1 if self.delay == 0 and self.pace is None else self.reducer.compressor.num_messages()
        ages += [-(-j * pace // num_messages) for j in range(1, num_messages)]
        return Exchange(self.slot, t, t + self.delay, ages, self.has_prelude, self.memo)


def cut_backwards(like: Sequence[Tensor], bucket_bytes: int) -> list[list[int]]:
    """Groups of at most so many bytes, from the last place to the first."""
    last = len(like) - 1
    groups = [[last - i for i in group] for group in buckets(like[::-1], bucket_bytes)]
    return sorted(groups, key=min, reverse=True)  # by who is complete first, where dtypes differ


@dataclass
class UnderWay:
    """An average that has set out.

    Attributes:
        task: the exchange; None once it has been settled.
        means: what came of it, once it has.
        reducer: what averaging keeps, likewise.
    """

    task: Any
    means: list[Tensor] | None = None
    reducer: ReducerState | None = None

    def advance(self) -> None:
        """Wait for one message of each bucket and send those that follow; without any left, nothing.

        All ranks must call it at the same place among their other messages.
        """
        while self.task is not None and self.task.pending is not None:
            self.task.advance()
            if self.task.pending is ALL_SENT:
                return

    def settle(self) -> None:
        """Wait for it, and hold plain tensors that a checkpoint can take."""
        if self.task is not None:
            self.means, self.reducer = self.task.result()
            self.task = None

    def is_between_messages(self) -> bool:
        """Whether all that could be sent without waiting has been."""
        return self.task is None or self.task.pending is ALL_SENT


@dataclass(eq=False)
class Exchange:
    """A `Sending` that is on its way.

    Attributes:
        slot, memo, has_prelude: the Sending's.
        sent_t: the step at which it set out.
        due_t: the step at which this replica needs it.
        ages: steps after ``sent_t`` at which messages follow that depend on earlier ones; two, if it stands twice.
        groups: places that travel together, of those that have set out.
        parts: the average of each group.
        failure: what stopped it within backward.
    """

    slot: str
    sent_t: int
    due_t: int
    ages: list[int]
    has_prelude: bool = False
    memo: Any = None
    groups: list[list[int]] = field(default_factory=list)
    parts: list[UnderWay] = field(default_factory=list)
    failure: Any = None

    def add(self, group: list[int], part: UnderWay) -> None:
        """Another group has set out."""
        self.groups.append(group)
        self.parts.append(part)

    def advance(self, t: int) -> None:
        """Send what follows at step ``t``."""
        for k, age in enumerate(self.ages):
            if t == self.sent_t + age:
                for part in self.parts:
                    if not (self.has_prelude and k == 0 and part.is_between_messages()):
                        part.advance()

    def settle(self) -> None:
        """Wait for it; raises what stopped it."""
        if self.failure is not None:
            raise self.failure
        for part in self.parts:
            part.settle()

    def means(self) -> list[Tensor]:
        """What came, in the order of places."""
        found: dict[int, Tensor] = {}
        for group, part in zip(self.groups, self.parts, strict=True):
            assert part.means is not None, "settle first"
            found.update(zip(group, part.means, strict=True))
        return [found[i] for i in range(len(found))]

    def kept(self) -> list[ReducerState]:
        """What the reducer keeps of each group."""
        kept = [part.reducer for part in self.parts]
        return [state for state in kept if state is not None]


# Parameters, and what to do once they and those of all turns before are final.
Turn = tuple[Sequence[int], Callable[[], None]]


def in_turn(turns: Sequence[Turn], failed: Callable[[Exception], None]) -> Callable[[int], None]:
    """What is told the number of each parameter once, as soon as it is final, and takes each turn when it has come.

    Parameters of no turn are none of its business, though it may be told of them. After a peer is lost no turn is
    taken any more, and ``failed`` hears of it: backward goes on.
    """
    turn_of = {i: k for k, (numbers, _) in enumerate(turns) for i in numbers}
    missing = [len(numbers) for numbers, _ in turns]
    waiting = deque(range(len(turns)))

    def final(i: int) -> None:
        if i in turn_of:
            missing[turn_of[i]] -= 1
        while waiting and missing[waiting[0]] == 0:
            _, start = turns[waiting.popleft()]
            try:
                start()
            except (PeerLost, Late) as error:
                waiting.clear()
                failed(error)

    return final
