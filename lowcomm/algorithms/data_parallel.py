"""Data parallel: average the gradients at every step. The baseline that talks most.

Differs from the paper in: nothing; with an exact reducer it is synchronous large-batch training.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowcomm.algorithms.base import Algorithm
from lowcomm.algorithms.overlapped import Groups, GroupsState, average_gradients
from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine, Ready
from lowcomm.reduce import Reducer


@dataclass
class DataParallelState:
    """Attributes:
    gradients: what averaging them keeps between steps.
    round: steps synced so far.
    """

    gradients: GroupsState
    round: int = 0


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
        return DataParallelState(self._groups().init(engine.slots()["param"]))

    def sends_in_backward(self) -> bool:
        """With `overlap`."""
        return self.overlap

    def during_backward(self, t: int, engine: Engine, state: DataParallelState, comm: Comm) -> Ready | None:
        """With `overlap`, start each group's average as soon as its turn has come."""
        if not self.overlap:
            return None
        gradients: dict[int, Tensor] = {}
        params = engine.slots()["param"]
        final = self._groups().in_turn(params, state.gradients, comm, lambda group: [gradients[i] for i in group])

        def ready(i: int, gradient: Tensor) -> None:
            gradients[i] = gradient
            final(i)

        return ready

    def before_update(self, t: int, engine: Engine, state: DataParallelState, comm: Comm) -> None:
        """Replace the gradients by their mean over replicas."""
        average_gradients(self._groups(), engine.slots()["grad"], state.gradients, comm)

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

    def _groups(self) -> Groups:
        return Groups(self.reducer, self.overlap)
