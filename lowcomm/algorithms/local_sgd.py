"""Local SGD: local steps, then average the parameters (Stich 2018, arXiv:1805.09767; FedAvg: McMahan et al. 2017,
arXiv:1602.05629).

    every `every` inner steps:   local_i <- sum_j w_j local_j

It is DiLoCo with outer SGD(lr=1): the anchor minus the mean delta is the replicas' mean. With `After` it is post-local
SGD (Lin et al. 2018, arXiv:1808.07217).

Differs from the paper in: any inner optimizer, whose state stays local. Differences to the last average are sent, so a
lossy reducer never rounds the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine
from lowcomm.reduce import Reducer
from lowcomm.rounds.anchors import anchor_of, deltas
from lowcomm.rounds.base import Rounds, RoundsState
from lowcomm.rounds.exchanges import Exchange, Sending
from lowcomm.rounds.participation import DroppedRounds, check_number, check_participation, counted, factor
from lowcomm.rounds.qsr import QSR, check_every
from lowcomm.tensors import add_, copy_


@dataclass
class LocalSGDState(RoundsState):
    """Attributes:
    anchor: the last average, float32 or better; equal on all replicas.
    """

    anchor: list[Tensor]


@dataclass(frozen=True)
class LocalSGD(Rounds[LocalSGDState]):
    """Periodic parameter averaging.

    Traffic of a round: as DiLoCo.

    Attributes:
        every: inner steps a round; 1 with inner SGD is data parallel. With a `QSR` rounds grow as the learning rate
            falls.
        reducer: how differences to the last average are averaged.
        weights: how much each replica counts, in rank order; FedAvg takes the sizes of their data. None: equally.
        dropped: simulate lost rounds.
        overlap: as DiLoCo's.
    """

    every: int | QSR = 16
    reducer: Reducer = Reducer()
    weights: list[float] | None = None
    dropped: DroppedRounds | None = None
    overlap: bool = False

    def __post_init__(self) -> None:
        check_every(self.every)
        check_participation(self.reducer, self.weights, self.dropped)

    def begin(self, engine: Engine, comm: Comm) -> LocalSGDState:
        check_number("weights", self.weights, comm.members)
        anchor, replicas = anchor_of(engine.slots()["param"]), counted(comm.members, self.weights, self.dropped)
        return LocalSGDState(anchor, kept={"deltas": self.keep(anchor)}, replicas=replicas)

    def round(self, t: int, engine: Engine, state: LocalSGDState, comm: Comm) -> list[Sending]:
        """Differences to the last average, unless all replicas' are dropped; the end of a run drops none."""
        dropped = self.dropped if self.is_due(t, state) else None
        mine = factor(state.round + 1, comm, state.replicas, self.weights, dropped)
        if mine is None or comm.share is None:
            return []
        return deltas(self.reducer, state.anchor, engine.slots()["param"], mine, share=comm.share)

    def commit(self, t: int, engine: Engine, state: LocalSGDState, sent: Exchange, means: list[Tensor]) -> None:
        """Compute the new average; replicas that took part load it."""
        add_(state.anchor, means, alpha=-1.0)
        if sent.memo > 0:
            copy_(engine.slots()["param"], state.anchor)

    def stands(self, engine: Engine, state: LocalSGDState) -> list[Tensor]:
        return state.anchor

    def shared(self, state: LocalSGDState) -> list[Tensor]:
        return state.anchor
