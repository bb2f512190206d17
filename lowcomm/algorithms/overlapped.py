"""Averages over replicas in groups of parameters, which may set out one after the other while backward goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from lowcomm.algorithms.under_way import UnderWay, send
from lowcomm.comm.base import Comm
from lowcomm.reduce import Reducer, ReducerState
from lowcomm.tensors import buckets, copy_

# What to average of the parameters with these numbers; it is asked once for each group, when the group sets out.
Values = Callable[[Sequence[int]], list[Tensor]]


@dataclass
class GroupsState:
    """Attributes:
    reducers: what averaging keeps between rounds, for each group of parameters.
    under_way: the averages that have set out and were not asked for yet, by the number of their group.
    """

    reducers: list[ReducerState]
    under_way: dict[int, UnderWay] = field(default_factory=dict)

    def advance(self) -> None:
        """Let the next messages of all that is under way follow; see `UnderWay.advance`."""
        for average in self.under_way.values():
            average.advance()

    def settle(self) -> None:
        """Wait for what is under way, and hold plain tensors that a checkpoint can take."""
        for average in self.under_way.values():
            average.settle()

    def arrived(self, k: int) -> list[Tensor]:
        """The means of the k-th group, waited for; it is under way no more."""
        means, self.reducers[k] = self.under_way.pop(k).result()
        return means


# Parameters, and what to do once they and those of all turns before are final.
Turn = tuple[Sequence[int], Callable[[], None]]


def in_turn(turns: Sequence[Turn]) -> Callable[[int], None]:
    """What is told the number of each parameter once, as soon as it is final, and takes each turn when it has come.

    Parameters of no turn are none of its business, though it may be told of them.
    """
    turn_of = {i: k for k, (numbers, _) in enumerate(turns) for i in numbers}
    missing = [len(numbers) for numbers, _ in turns]
    waiting = deque(range(len(turns)))

    def final(i: int) -> None:
        if i in turn_of:
            missing[turn_of[i]] -= 1
        while waiting and missing[waiting[0]] == 0:
            _, start = turns[waiting.popleft()]
            start()

    return final


@dataclass(frozen=True)
class Groups:
    """Which parameters are averaged together, and when.

    Attributes:
        reducer: how each group is averaged.
        overlap: cut the parameters into groups from the last to the first, by the reducer's `bucket_bytes`. A group
            sets out once it and all groups before it are final, so the order is that of the parameters on every rank.
            Without it, one group holds all of them.
    """

    reducer: Reducer
    overlap: bool

    def init(self, like: Sequence[Tensor]) -> GroupsState:
        """Nothing averaged yet, of tensors shaped like ``like``, one for each parameter."""
        return GroupsState([self.reducer.init([like[i] for i in group]) for group in self.cut(like)])

    def in_turn(self, like: Sequence[Tensor], state: GroupsState, comm: Comm, values: Values) -> Callable[[int], None]:
        """What is told the number of each parameter once, as soon as ``values`` may be asked for it.

        It starts each group's average when its turn has come, and waits for nothing: that is for `mean`. A compressor's
        second and later messages follow there too.
        """
        return in_turn(self.turns(like, state, comm, values))

    def turns(self, like: Sequence[Tensor], state: GroupsState, comm: Comm, values: Values) -> list[Turn]:
        """Each group in the order in which they must set out, and how it does."""
        return [(group, partial(self._start, k, group, state, comm, values)) for k, group in enumerate(self.cut(like))]

    def start(self, like: Sequence[Tensor], state: GroupsState, comm: Comm, values: Values) -> None:
        """Start the groups that have not set out yet."""
        for _, start in self.turns(like, state, comm, values)[len(state.under_way) :]:
            start()

    def arrived(self, like: Sequence[Tensor], state: GroupsState) -> list[Tensor]:
        """The means over replicas of all parameters' values, in order: waits for all groups, which have set out."""
        under_way, state.under_way = state.under_way, {}
        results = [average.result() for average in under_way.values()]
        means = list(like)
        for group, (group_means, _) in zip(self.cut(like), results, strict=True):
            for i, mean in zip(group, group_means, strict=True):
                means[i] = mean
        state.reducers = [reducer for _, reducer in results]
        return means

    def mean(self, like: Sequence[Tensor], state: GroupsState, comm: Comm, values: Values) -> list[Tensor]:
        """`start` what has not set out, and wait until all has `arrived`."""
        self.start(like, state, comm, values)
        return self.arrived(like, state)

    def cut(self, like: Sequence[Tensor]) -> list[list[int]]:
        """The groups in the order in which they set out, as places in ``like``."""
        if not self.overlap:
            return [list(range(len(like)))]
        last = len(like) - 1
        groups = [[last - i for i in group] for group in buckets(like[::-1], self.reducer.bucket_bytes)]
        return sorted(groups, key=min, reverse=True)  # by who is complete first, where dtypes differ

    def _start(self, k: int, group: list[int], state: GroupsState, comm: Comm, values: Values) -> None:
        """Send off the k-th group, whose turn it is."""
        assert k == len(state.under_way), "groups set out in their order, once all of the last average have arrived"
        state.under_way[k] = send(self.reducer, values(group), state.reducers[k], comm)


def average_gradients(groups: Groups, gradients: list[Tensor], state: GroupsState, comm: Comm) -> None:
    """Put the means over replicas in the place of the gradients, of which some groups may be under way."""
    copy_(gradients, groups.mean(gradients, state, comm, lambda group: [gradients[i] for i in group]))
