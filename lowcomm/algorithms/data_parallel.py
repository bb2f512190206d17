"""Data parallel: average the gradients at every step, the baseline with the most traffic.

    every step:   g_i <- sum_j w_j g_j;   then the same inner update everywhere

Differs from the paper in: nothing; with an exact reducer it is synchronous large-batch training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine
from lowcomm.reduce import Reducer
from lowcomm.rounds.base import GradientRounds, GradientsState
from lowcomm.rounds.exchanges import Exchange, Sending
from lowcomm.rounds.participation import check_number, check_participation, counted, factor
from lowcomm.tensors import copy_, mul_


@dataclass(frozen=True)
class DataParallel(GradientRounds):
    """Average gradients at every step, then take the same inner update on every replica.

    Traffic of a round: one all-reduce of the gradients, 2 (n - 1) / n x their bytes for each of n replicas.

    Attributes:
        reducer: how gradients are averaged.
        overlap: send gradients during backward, in groups of the reducer's `bucket_bytes` from the last parameter to
            the first. A group is sent once it and all groups before it are final, so all ranks send in one order. A
            compressor's later messages follow after backward.
        weights: how much each replica counts, in rank order. None: equally.
    """

    reducer: Reducer = Reducer()
    overlap: bool = False
    weights: list[float] | None = None

    def __post_init__(self) -> None:
        check_participation(self.reducer, self.weights, None)

    def begin(self, engine: Engine, comm: Comm) -> GradientsState:
        check_number("weights", self.weights, comm.members)
        kept = {"gradients": self.keep(engine.slots()["param"])}
        return GradientsState(kept=kept, replicas=counted(comm.members, self.weights))

    def round(self, t: int, engine: Engine, state: GradientsState, comm: Comm) -> list[Sending]:
        params, share = engine.slots()["param"], factor(t, comm, state.replicas, self.weights, None)

        def values(places: Sequence[int]) -> list[Tensor]:
            gradients = [g.clone() for g in engine.gradients(places)]
            if share is not None and share != 1:
                mul_(gradients, share)
            return gradients

        # on a GPU a look at each step's means would wait for it; NaN reaches all parameters alike
        is_watched = not params[0].is_cuda
        return [Sending("gradients", self.reducer, params, values, range(len(params)), is_watched=is_watched)]

    def commit(self, t: int, engine: Engine, state: GradientsState, sent: Exchange, means: list[Tensor]) -> None:
        """Replace the gradients by their mean over replicas."""
        copy_(engine.slots()["grad"], means)
