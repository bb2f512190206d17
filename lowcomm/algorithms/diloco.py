"""DiLoCo: many local steps, then one outer step on the mean delta (Douillard et al. 2023, arXiv:2311.08105, Alg. 1).

    every `every` inner steps:
        delta_i = anchor - local_i;   anchor <- outer(anchor, mean_i delta_i);   local_i <- anchor

Inner optimizer state stays with its replica: never averaged, never reset (section 6.1).

Differs from the paper in: the anchor is in float32 or better, and delta is measured from the value a replica was loaded
with, so bfloat16 replicas do not round the anchor. A partial last round is synced. Data parallel may come first
(`After`) in place of separate pretraining.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine
from lowcomm.outer.base import Outer
from lowcomm.outer.nesterov import Nesterov
from lowcomm.reduce import Reducer
from lowcomm.rounds.anchors import anchor_of, deltas
from lowcomm.rounds.base import Rounds, RoundsState
from lowcomm.rounds.exchanges import Exchange, Sending
from lowcomm.rounds.participation import DroppedRounds, check_number, check_participation, counted, factor
from lowcomm.rounds.qsr import QSR, check_every
from lowcomm.tensors import copy_


@dataclass
class DiLoCoState(RoundsState):
    """Attributes:
    anchor: parameters at the last round, float32 or better; equal on all replicas.
    outer: state of the outer optimizer; equal on all replicas.
    """

    anchor: list[Tensor]
    outer: Any


@dataclass(frozen=True)
class DiLoCo(Rounds[DiLoCoState]):
    """Local steps and an outer optimizer.

    Traffic of a round: one all-reduce of the parameters in float32 (less with a compressor), 2 (n - 1) / n x 4 bytes a
    parameter for each of n replicas; that over `every` for each step.

    Attributes:
        every: inner steps a round, H. The paper uses 500; loss rises slowly with it (+2.9 % perplexity at 1,000). With
            a `QSR` rounds grow as the learning rate falls; a round's length is fixed at its start.
        outer: the outer optimizer.
        reducer: how deltas are averaged.
        weights: how much each replica counts, in rank order, scaled to sum 1 (the paper's non-iid rule takes the sizes
            of their data). None: equally.
        dropped: simulate lost deltas.
        overlap: in the last inner step of a round, update parameters during backward and send their deltas at once, in
            groups of the reducer's `bucket_bytes` from the last parameter to the first. Excludes clipping by the
            gradient norm. A compressor's later messages follow after backward, and a partial last round after its last
            step.
    """

    every: int | QSR = 100
    outer: Outer = Nesterov()
    reducer: Reducer = Reducer()
    weights: list[float] | None = None
    dropped: DroppedRounds | None = None
    overlap: bool = False

    def __post_init__(self) -> None:
        check_every(self.every)
        check_participation(self.reducer, self.weights, self.dropped)

    def begin(self, engine: Engine, comm: Comm) -> DiLoCoState:
        check_number("weights", self.weights, comm.members)
        anchor, replicas = anchor_of(engine.slots()["param"]), counted(comm.members, self.weights, self.dropped)
        return DiLoCoState(anchor, self.outer.init(anchor), kept={"deltas": self.keep(anchor)}, replicas=replicas)

    def round(self, t: int, engine: Engine, state: DiLoCoState, comm: Comm) -> list[Sending]:
        """The deltas, unless all replicas' are dropped; the end of a run drops none."""
        dropped = self.dropped if self.is_due(t, state) else None
        mine = factor(state.round + 1, comm, state.replicas, self.weights, dropped)
        if mine is None or comm.share is None:
            return []
        return deltas(self.reducer, state.anchor, engine.slots()["param"], mine, share=comm.share)

    def commit(self, t: int, engine: Engine, state: DiLoCoState, sent: Exchange, means: list[Tensor]) -> None:
        """Take the outer step; replicas that took part load the new anchor."""
        self.outer.apply(state.anchor, means, state.outer)
        if sent.memo > 0:
            copy_(engine.slots()["param"], state.anchor)

    def stands(self, engine: Engine, state: DiLoCoState) -> list[Tensor]:
        return state.anchor

    def shared(self, state: DiLoCoState) -> list[Tensor]:
        return [*state.anchor, *self.outer.tensors(state.outer)]
