"""Averages over replicas in groups of parameters, which may set out one after the other while backward goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowcomm.comm.base import Comm
from lowcomm.reduce import Reducer, ReducerState
from lowcomm.tensors import buckets

# What to average of the parameters with these numbers; it is asked once for each group, when the group sets out.
Values = Callable[[Sequence[int]], list[Tensor]]


@dataclass
class GroupsState:
    """Attributes:
    reducers: what averaging keeps between rounds, for each group of parameters.
    tasks: averages under way, of the first groups; there are some between the start of backward and `Groups.mean` only.
    """

    reducers: list[ReducerState]
    tasks: list[Any] = field(default_factory=list)


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
        return GroupsState([self.reducer.init([like[i] for i in group]) for group in self._groups(like)])

    def in_turn(self, like: Sequence[Tensor], state: GroupsState, comm: Comm, values: Values) -> Callable[[int], None]:
        """What is told the number of each parameter once, as soon as ``values`` may be asked for it.

        It starts each group's average when its turn has come, and waits for nothing: that is for `mean`. A compressor's
        second and later messages follow there too.
        """
        groups = self._groups(like)
        group_of = {i: k for k, group in enumerate(groups) for i in group}
        missing = Counter(group_of.values())

        def final(i: int) -> None:
            missing[group_of[i]] -= 1
            while (k := len(state.tasks)) < len(groups) and missing[k] == 0:
                self._start(groups[k], state, comm, values)

        return final

    def mean(self, like: Sequence[Tensor], state: GroupsState, comm: Comm, values: Values) -> list[Tensor]:
        """The means over replicas of all parameters' values, in order: starts the groups that have not set out yet, and
        waits for all.
        """
        groups = self._groups(like)
        for group in groups[len(state.tasks) :]:
            self._start(group, state, comm, values)
        tasks, state.tasks = state.tasks, []
        results = [task.result() for task in tasks]
        means = list(like)
        for group, (group_means, _) in zip(groups, results, strict=True):
            for i, mean in zip(group, group_means, strict=True):
                means[i] = mean
        state.reducers = [reducer for _, reducer in results]
        return means

    def _start(self, group: list[int], state: GroupsState, comm: Comm, values: Values) -> None:
        """Send off the next group."""
        state.tasks.append(self.reducer.mean(values(group), state.reducers[len(state.tasks)], comm))

    def _groups(self, like: Sequence[Tensor]) -> list[list[int]]:
        """The groups in the order in which they set out."""
        if not self.overlap:
            return [list(range(len(like)))]
        last = len(like) - 1
        groups = [[last - i for i in group] for group in buckets(like[::-1], self.reducer.bucket_bytes)]
        return sorted(groups, key=min, reverse=True)  # by who is complete first, where dtypes differ


def average_gradients(groups: Groups, gradients: list[Tensor], state: GroupsState, comm: Comm) -> None:
    """Put the means over replicas in the place of the gradients, of which some groups may be under way."""
    torch._foreach_copy_(gradients, groups.mean(gradients, state, comm, lambda group: [gradients[i] for i in group]))
