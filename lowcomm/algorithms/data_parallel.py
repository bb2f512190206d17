"""Data parallel: average the gradients at every step. The baseline that talks most.

Differs from the paper in: nothing; with an exact reducer it is synchronous large-batch training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowcomm.algorithms.base import Algorithm
from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine, Ready
from lowcomm.reduce import Reducer, ReducerState
from lowcomm.tensors import buckets


@dataclass
class DataParallelState:
    """Attributes:
    reducers: what averaging gradients keeps between steps, for each group of parameters.
    round: steps synced so far.
    tasks: averages under way, of the first groups; there are some between the start of backward and the update only.
    """

    reducers: list[ReducerState]
    round: int = 0
    tasks: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class DataParallel(Algorithm[DataParallelState]):
    """One round a step: the mean gradient, then the same inner update everywhere.

    Traffic of a round: one all-reduce of the gradients, 2 (n - 1) / n x their bytes for each of n replicas.

    Attributes:
        reducer: how gradients are averaged.
        overlap: send gradients while backward computes others. Parameters are grouped from the last to the first, by
            the reducer's `bucket_bytes`; a group sets out once it and all groups before it are final, so the order is
            that of the parameters on every rank. A compressor's second and later messages follow after backward.
    """

    reducer: Reducer = Reducer()
    overlap: bool = False

    def init(self, engine: Engine, comm: Comm) -> DataParallelState:
        """Nothing averaged yet."""
        params = engine.slots()["param"]
        return DataParallelState([self.reducer.init([params[i] for i in group]) for group in self._groups(params)])

    def during_backward(self, t: int, engine: Engine, state: DataParallelState, comm: Comm) -> Ready | None:
        """With `overlap`, start each group's average as soon as its turn has come."""
        if not self.overlap:
            return None
        groups = self._groups(engine.slots()["param"])
        group_of = {i: k for k, group in enumerate(groups) for i in group}
        missing = Counter(group_of.values())
        gradients: dict[int, Tensor] = {}

        def ready(i: int, gradient: Tensor) -> None:
            gradients[i] = gradient
            missing[group_of[i]] -= 1
            while (k := len(state.tasks)) < len(groups) and missing[k] == 0:
                self._start([gradients[j] for j in groups[k]], state, comm)

        return ready

    def before_update(self, t: int, engine: Engine, state: DataParallelState, comm: Comm) -> None:
        """Replace the gradients by their mean over replicas."""
        gradients = engine.slots()["grad"]
        groups = self._groups(gradients)
        for group in groups[len(state.tasks) :]:
            self._start([gradients[i] for i in group], state, comm)
        tasks, state.tasks = state.tasks, []
        results = [task.result() for task in tasks]
        for k, (group, (means, reducer)) in enumerate(zip(groups, results, strict=True)):
            torch._foreach_copy_([gradients[i] for i in group], means)
            state.reducers[k] = reducer

    def after_update(self, t: int, engine: Engine, state: DataParallelState, comm: Comm) -> None:
        """Count the round."""
        state.round += 1

    def finish(self, t: int, engine: Engine, state: DataParallelState, comm: Comm) -> None:
        """Nothing is in flight and the replicas are equal."""

    def num_rounds(self, state: DataParallelState) -> int:
        """Steps synced so far."""
        return state.round

    def consensus(self, engine: Engine, state: DataParallelState) -> list[Tensor]:
        """The live parameters: they are equal on all replicas."""
        return engine.slots()["param"]

    def _start(self, gradients: list[Tensor], state: DataParallelState, comm: Comm) -> None:
        """Send off the next group."""
        k = len(state.tasks)
        state.tasks.append(self.reducer.mean(gradients, state.reducers[k], comm))

    def _groups(self, xs: Sequence[Tensor]) -> list[list[int]]:
        """Parameters that are averaged together, in the order in which groups set out."""
        if not self.overlap:
            return [list(range(len(xs)))]
        last = len(xs) - 1
        groups = [[last - i for i in group] for group in buckets(xs[::-1], self.reducer.bucket_bytes)]
        return sorted(groups, key=min, reverse=True)  # by who is complete first, where dtypes differ


def average_gradients(reducer: Reducer, engine: Engine, state: ReducerState, comm: Comm) -> ReducerState:
    """Put the mean over replicas in the place of the engine's gradients; returns the reducer's new state."""
    gradients = engine.slots()["grad"]
    means, state = reducer.mean(gradients, state, comm).result()
    torch._foreach_copy_(gradients, means)
    return state
