"""Data parallel: average the gradients at every step. The baseline that talks most.

Differs from the paper in: nothing; with an exact reducer it is synchronous large-batch training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowcomm.algorithms.base import Algorithm
from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine
from lowcomm.reduce import Reducer, ReducerState


@dataclass
class DataParallelState:
    """Attributes:
    reducer: what averaging gradients keeps between steps.
    round: steps synced so far.
    """

    reducer: ReducerState
    round: int = 0


@dataclass(frozen=True)
class DataParallel(Algorithm[DataParallelState]):
    """One round a step: the mean gradient, then the same inner update everywhere.

    Traffic of a round: one all-reduce of the gradients, 2 (n - 1) / n x their bytes for each of n replicas.
    """

    reducer: Reducer = Reducer()

    def init(self, engine: Engine, comm: Comm) -> DataParallelState:
        """Nothing averaged yet."""
        return DataParallelState(self.reducer.init(engine.slots()["param"]))

    def before_update(self, t: int, engine: Engine, state: DataParallelState, comm: Comm) -> None:
        """Replace the gradients by their mean over replicas."""
        state.reducer = average_gradients(self.reducer, engine, state.reducer, comm)

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


def average_gradients(reducer: Reducer, engine: Engine, state: ReducerState, comm: Comm) -> ReducerState:
    """Put the mean over replicas in the place of the engine's gradients; returns the reducer's new state."""
    gradients = engine.slots()["grad"]
    means, state = reducer.mean(gradients, state, comm).result()
    torch._foreach_copy_(gradients, means)
    return state
