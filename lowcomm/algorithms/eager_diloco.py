"""DiLoCo with eager updates: the average is used one round late, a replica's own part of it at once (Kale, Douillard
and Donchev 2025, arXiv:2502.12996).

    after round r, with Delta_m what replica m of M has moved from its own anchor, and Delta(0) = Delta_m(0) = 0:
        D_m     <- Delta(r-1) + (Delta_m(r) - Delta_m(r-1)) / M
        Theta_m <- outer_m(Theta_m, D_m);     theta_m <- Theta_m
        send Delta_m(r), whose average Delta(r) is wanted at the end of round r+1

Transfers so overlap a whole round of inner steps. Anchors differ from replica to replica, each with an outer state of
its own. For evaluation there is a common one, which takes the averages alone as they come in, one round late.

How far anchors are apart: summed over rounds, D_m is the sum of all Delta up to r-1 and Delta_m(r) / M, for what a
replica adds of its own in one round it takes back in the next. Where the outer step is linear in what it is given
(SGD, Nesterov), Theta_m is the common anchor less the filtered own deltas: under Nesterov

    Theta - Theta_m = (lr / M) (Delta_m(r) + momentum b_m(r)),     b_m(r) = Delta_m(r) + momentum b_m(r-1)

which is never more than (lr / M) / (1 - momentum) times the largest delta. An outer step that is not linear (Adam,
weight decay) gives no such bound.

Differs from the paper in: anchors and deltas are kept as `DiLoCo` keeps them. What the paper does about a quantised
wire was not to be had. What is added must be what is later taken back, or the difference stays in the anchor for good:
one of the two quantised and the other not lets replicas drift apart. Here both are the exact own delta, whatever the
reducer sends, so the sums above hold as they stand, Delta being what the reducer makes of the deltas. (Both as sent
would also do; but what was sent is known only after the exchange with many compressors, and it puts their error into
the distance between anchors.) The first round, for which the paper states no Delta, takes 0. At the end of a run the
last average is waited for, and all replicas are loaded with the common anchor; a partial last round is averaged too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine
from lowcomm.outer.base import Outer
from lowcomm.outer.nesterov import Nesterov
from lowcomm.reduce import Reducer
from lowcomm.rounds.anchors import anchor_of, delta
from lowcomm.rounds.base import Rounds, RoundsState
from lowcomm.rounds.exchanges import Exchange, Sending
from lowcomm.rounds.qsr import check_every
from lowcomm.tensors import add_, copy_, zeros


@dataclass
class EagerDiLoCoState(RoundsState):
    """Attributes:
    own: this replica's anchor, float32 or better.
    own_outer: state of its outer optimizer.
    common: the anchor that has taken only averages; equal on all replicas.
    common_outer: state of its outer optimizer; equal on all replicas.
    correction: the next outer step's D_m less the fresh own delta: less the last own delta over M, and once it is
        there, plus the average.
    unheard: own deltas whose average was given up, which go with the next.
    """

    own: list[Tensor]
    own_outer: Any
    common: list[Tensor]
    common_outer: Any
    correction: list[Tensor]
    unheard: list[Tensor] | None = None


@dataclass(frozen=True)
class EagerDiLoCo(Rounds[EagerDiLoCoState]):
    """DiLoCo whose transfers have a whole round's time, and which steps at once by what it knows.

    Traffic of a round: as DiLoCo, 2 (n - 1) / n x 4 bytes a parameter for each of n replicas with an exact reducer.

    Of a compressor whose messages follow on each other the j-th of k sets out ceil((j - 1) every / k) steps after the
    first.

    Attributes:
        every: inner steps a round, H.
        outer: how each anchor follows what it is given. Take one that is linear in that, such as Nesterov or SGD:
            with others the replicas' anchors may drift apart.
        reducer: how deltas are averaged.
    """

    every: int = 30
    outer: Outer = Nesterov(0.4, 0.9)
    reducer: Reducer = Reducer()

    def __post_init__(self) -> None:
        check_every(self.every)

    def begin(self, engine: Engine, comm: Comm) -> EagerDiLoCoState:
        """Both anchors are copies of the parameters."""
        own, common = (anchor_of(engine.slots()["param"]) for _ in range(2))
        outers = self.outer.init(own), self.outer.init(common)
        return EagerDiLoCoState(own, outers[0], common, outers[1], zeros(own), kept={"deltas": self.keep(own)})

    def round(self, t: int, engine: Engine, state: EagerDiLoCoState, comm: Comm) -> list[Sending]:
        """What this replica has moved, needed at the end of the next round."""
        moved = delta(state.own, engine.slots()["param"], 1.0, range(len(state.own)))
        if state.unheard is not None:
            add_(moved, state.unheard)
        memo = [moved, len(comm.members)]
        return [Sending("deltas", self.reducer, moved, delay=self.every, memo=memo)]

    def commit(self, t: int, engine: Engine, state: EagerDiLoCoState, sent: Exchange, means: list[Tensor]) -> None:
        """The average moves the common anchor, and will correct the own one."""
        self.outer.apply(state.common, means, state.common_outer)
        add_(state.correction, means)

    def departed(self, t: int, engine: Engine, state: EagerDiLoCoState, sent: Exchange, has_arrived: bool) -> None:
        """The own anchor takes the own part of what is under way."""
        moved, num_members = sent.memo
        share = torch._foreach_div(moved, num_members)
        self.outer.apply(state.own, list(torch._foreach_add(state.correction, share)), state.own_outer)
        state.correction = list(torch._foreach_neg(share))
        state.unheard = None
        copy_(engine.slots()["param"], state.own)

    def abandoned(self, state: EagerDiLoCoState, lost: Exchange) -> None:
        """The own part has been taken, and is taken back with the next; the deltas themselves go again."""
        state.unheard = lost.memo[0]

    def stands(self, engine: Engine, state: EagerDiLoCoState) -> list[Tensor]:
        """The common anchor; it lags by the round that is under way."""
        return state.common
