"""DiLoCo with eager updates: the average is applied one round late, a replica's own part at once (Kale, Douillard and
Donchev 2025, arXiv:2502.12996).

    after round r, with Delta_m what replica m of M has moved from its own anchor, and Delta(0) = Delta_m(0) = 0:
        D_m     <- Delta(r-1) + (Delta_m(r) - Delta_m(r-1)) / M
        Theta_m <- outer_m(Theta_m, D_m);     theta_m <- Theta_m
        send Delta_m(r), whose average Delta(r) is wanted at the end of round r+1

So transfers overlap a whole round of inner steps. Each replica has its own anchor and outer state. A common anchor, for
evaluation, takes only the averages, one round late.

Distance between anchors: summed over rounds, D_m is the sum of all Delta up to r-1 plus Delta_m(r) / M, as a replica
takes back in each round what it added of its own in the last. For a linear outer step (SGD, Nesterov), Theta_m is the
common anchor minus the filtered own deltas. For Nesterov

    Theta - Theta_m = (lr / M) (Delta_m(r) + momentum b_m(r)),     b_m(r) = Delta_m(r) + momentum b_m(r-1)

which is at most (lr / M) / (1 - momentum) times the largest delta. A nonlinear outer step (Adam, weight decay) has no
such bound.

Differs from the paper in: anchors and deltas are kept as in `DiLoCo`. The paper's handling of quantised deltas could
not be found. What is added must equal what is later taken back, or replicas drift apart. Here both are the exact own
delta, whatever the reducer sends, so the sums above hold, Delta being the reducer's result. (Both as sent would also
work, but many compressors know what was sent only after the exchange, and their error would add to the distance between
anchors.) The first round, for which the paper states no Delta, uses 0. At the end of a run the last average and a
partial last round are applied, and all replicas load the common anchor.
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
    common: the anchor that takes only averages; equal on all replicas.
    common_outer: state of its outer optimizer; equal on all replicas.
    correction: the next D_m without its fresh own delta: minus the last own delta over M, plus the average once it
        has arrived.
    unheard: own deltas whose average was dropped; sent again with the next.
    """

    own: list[Tensor]
    own_outer: Any
    common: list[Tensor]
    common_outer: Any
    correction: list[Tensor]
    unheard: list[Tensor] | None = None


@dataclass(frozen=True)
class EagerDiLoCo(Rounds[EagerDiLoCoState]):
    """DiLoCo whose transfers overlap a whole round; the outer step uses the own delta at once.

    Traffic of a round: as DiLoCo, 2 (n - 1) / n x 4 bytes a parameter for each of n replicas with an exact reducer.

    If a compressor sends k messages in sequence, the j-th is sent ceil((j - 1) every / k) steps after the first.

    Attributes:
        every: inner steps a round, H.
        outer: the outer optimizer of each anchor. It should be linear in the delta (Nesterov, SGD), or anchors may
            drift apart.
        reducer: how deltas are averaged.
    """

    every: int = 30
    outer: Outer = Nesterov(0.4, 0.9)
    reducer: Reducer = Reducer()

    def __post_init__(self) -> None:
        check_every(self.every)

    def begin(self, engine: Engine, comm: Comm) -> EagerDiLoCoState:
        own, common = (anchor_of(engine.slots()["param"]) for _ in range(2))
        outers = self.outer.init(own), self.outer.init(common)
        return EagerDiLoCoState(own, outers[0], common, outers[1], zeros(own), kept={"deltas": self.keep(own)})

    def round(self, t: int, engine: Engine, state: EagerDiLoCoState, comm: Comm) -> list[Sending]:
        """This replica's delta, due at the end of the next round."""
        moved = delta(state.own, engine.slots()["param"], 1.0, range(len(state.own)))
        if state.unheard is not None:
            add_(moved, state.unheard)
        memo = [moved, len(comm.members)]
        return [Sending("deltas", self.reducer, moved, delay=self.every, memo=memo)]

    def commit(self, t: int, engine: Engine, state: EagerDiLoCoState, sent: Exchange, means: list[Tensor]) -> None:
        """Step the common anchor, and correct the own anchor's next step."""
        self.outer.apply(state.common, means, state.common_outer)
        add_(state.correction, means)

    def departed(self, t: int, engine: Engine, state: EagerDiLoCoState, sent: Exchange, has_arrived: bool) -> None:
        """Step the own anchor by the own part of the delta just sent."""
        moved, num_members = sent.memo
        share = torch._foreach_div(moved, num_members)
        self.outer.apply(state.own, list(torch._foreach_add(state.correction, share)), state.own_outer)
        state.correction = list(torch._foreach_neg(share))
        state.unheard = None
        copy_(engine.slots()["param"], state.own)

    def abandoned(self, state: EagerDiLoCoState, lost: Exchange) -> None:
        """The own part was applied and is taken back with the next; the deltas are sent again."""
        state.unheard = lost.memo[0]

    def stands(self, engine: Engine, state: EagerDiLoCoState) -> list[Tensor]:
        """The common anchor, which lags by the pending round."""
        return state.common
