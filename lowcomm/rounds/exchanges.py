"""Averages over replicas: what is sent (`Sending`), and its state until it is due (`Exchange`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowcomm.comm.base import Comm, Late, PeerLost, Task, Work
from lowcomm.feedback.none import NoFeedback
from lowcomm.reduce import ALL_SENT, BUCKET_BYTES, Arrived, NonFinite, Reducer, ReducerState
from lowcomm.tensors import are_finite, buckets, valueless

# What to average of the tensors at these places of a list.
Values = Callable[[Sequence[int]], list[Tensor]]
# Starts an average of values as `Reducer.mean` does.
Averaged = tuple[list[Tensor], ReducerState]
Average = Callable[[list[Tensor], ReducerState, Comm], Task[Averaged]]


@dataclass(frozen=True)
class Sending:
    """Something to average over replicas.

    Attributes:
        slot: names the average within the method; the reducer's state is kept per slot.
        reducer: how it is averaged.
        like: shapes and dtypes of the values; without ``values``, the values themselves.
        values: computes the values at the given places when they are sent, each once; fresh tensors.
        numbers: the parameter index of each value, so that it may be sent during backward; None: not per parameter.
        delay: steps until the means are needed; 0: now.
        pace: steps over which successive messages are spread, equal on all ranks; None: ``delay``.
        memo: returned to the method with the means: tensors, numbers, lists of them.
        average: averages ``like``, in place of the reducer's mean over all members.
        has_prelude: whether the first message may be a preliminary exchange, waited for one step later.
        is_watched: whether means that are not finite are refused.
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
    is_watched: bool = True

    def cut(self, overlap: bool) -> list[list[int]]:
        """The places that are sent together, in order: with ``overlap`` groups of the reducer's ``bucket_bytes`` from
        the last parameter to the first, otherwise one group.
        """
        if not overlap or self.numbers is None:
            return [list(range(len(self.like)))]
        return cut_backwards(self.like, self.reducer.bucket_bytes or BUCKET_BYTES)

    def start(self, places: Sequence[int], kept: ReducerState, comm: Comm) -> UnderWay:
        """Start averaging the values at these places."""
        like, values = [self.like[i] for i in places], self.values
        if self.average is not None:
            task: Task[Any] = self.average(like, kept, comm)
        else:
            made = None if values is None else lambda some: values([places[k] for k in some])
            task = self.reducer.arrival(like, kept, comm, made)
        has_asked = self.average is None and not isinstance(self.reducer.feedback, NoFeedback)
        if self.is_watched and self.reducer.compressor.passes_nonfinite and not has_asked and not valueless(like):
            task = Task(self._refusing(task, lambda: like if values is None else values(places), comm))
        return UnderWay(task)

    def _refusing(
        self, task: Task[Any], own: Callable[[], list[Tensor]], comm: Comm
    ) -> Generator[Work[Any], Any, Averaged]:
        """The task, but means that are not finite raise `NonFinite`: on all ranks, as their means are equal."""
        found = yield from task.steps()
        means, kept = found.commit() if isinstance(found, Arrived) else found
        if not are_finite(means):
            spoils = not are_finite(own())
            ranks = [comm.rank] if spoils else []
            if self.average is None and not self.delay and not self.pace:  # all ranks are here, with all others
                told = yield comm.all_gather(torch.tensor([spoils]))
                ranks = [rank for rank, flag in zip(comm.members, told.flatten().tolist(), strict=True) if flag]
            raise NonFinite(ranks)
        return means, kept

    def exchange(self, t: int) -> Exchange:
        """The `Exchange` for step ``t``, still without parts."""
        pace = self.delay if self.pace is None else self.pace
        ages = [1] if self.has_prelude and self.delay else []
        num_messages = 1 if self.delay == 0 and self.pace is None else self.reducer.compressor.num_messages()
        ages += [-(-j * pace // num_messages) for j in range(1, num_messages)]
        return Exchange(self.slot, t, t + self.delay, ages, self.has_prelude, self.memo)


def cut_backwards(like: Sequence[Tensor], bucket_bytes: int) -> list[list[int]]:
    """Groups of at most ``bucket_bytes``, from the last place to the first."""
    last = len(like) - 1
    groups = [[last - i for i in group] for group in buckets(like[::-1], bucket_bytes)]
    return sorted(groups, key=min, reverse=True)  # by who is complete first, where dtypes differ


@dataclass
class UnderWay:
    """A started average.

    Attributes:
        task: the pending computation, of an `Arrived` or of means and state; None once settled.
        means: the result, once settled.
        reducer: the reducer's new state, once settled.
    """

    task: Any
    means: list[Tensor] | None = None
    reducer: ReducerState | None = None

    def advance(self) -> None:
        """Wait for one message of each bucket and send the next ones. Does nothing when none are left.

        All ranks must call it at the same point in their message order.
        """
        while self.task is not None and self.task.pending is not None:
            self.task.advance()
            if self.task.pending is ALL_SENT:
                return

    def settle(self, in_place: bool = False) -> None:
        """Wait for the result, and keep it as plain tensors for checkpoints. See `Arrived.commit` for ``in_place``."""
        if self.task is not None:
            found = self.task.result()
            self.means, self.reducer = found.commit(in_place) if isinstance(found, Arrived) else found
            self.task = None

    def is_between_messages(self) -> bool:
        """Whether nothing more can be sent without waiting."""
        return self.task is None or self.task.pending is ALL_SENT


@dataclass(eq=False)
class Exchange:
    """A `Sending` that has been sent.

    Attributes:
        slot, memo, has_prelude: the Sending's.
        sent_t: the step at which it was sent.
        due_t: the step at which this replica needs it.
        ages: steps after ``sent_t`` at which later messages are sent; a repeated age sends two.
        groups: places that were sent together.
        parts: the average of each group.
        failure: the error that stopped it during backward.
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
        """Record a group that was sent."""
        self.groups.append(group)
        self.parts.append(part)

    def advance(self, t: int) -> None:
        """Send the messages due at step ``t``."""
        for k, age in enumerate(self.ages):
            if t == self.sent_t + age:
                for part in self.parts:
                    if not (self.has_prelude and k == 0 and part.is_between_messages()):
                        part.advance()

    def arrive(self) -> None:
        """Wait for all messages, and change nothing; raises `failure`."""
        if self.failure is not None:
            raise self.failure
        for part in self.parts:
            if part.task is not None:
                part.task.result()

    def settle(self, in_place: bool = False) -> None:
        """Wait for all parts and keep their results; raises `failure`. With ``in_place`` it is the commit."""
        self.arrive()
        for part in self.parts:
            part.settle(in_place)

    def means(self) -> list[Tensor]:
        """The means in the order of places."""
        found: dict[int, Tensor] = {}
        for group, part in zip(self.groups, self.parts, strict=True):
            assert part.means is not None, "settle first"
            found.update(zip(group, part.means, strict=True))
        return [found[i] for i in range(len(found))]

    def kept(self) -> list[ReducerState]:
        """The reducer's state of each group."""
        kept = [part.reducer for part in self.parts]
        return [state for state in kept if state is not None]


# Parameters, and what to do once they and those of all turns before are final.
Turn = tuple[Sequence[int], Callable[[], None]]


def in_turn(turns: Sequence[Turn], failed: Callable[[Exception], None]) -> Callable[[int], None]:
    """A callback for final parameters that starts the turns in order.

    Call it once with the index of each parameter whose gradient is final. A turn starts when its parameters and those
    of all earlier turns are final. Parameters of no turn are ignored. `PeerLost` or `Late` goes to ``failed`` and
    cancels the remaining turns, so that backward continues.
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
