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

from lowcomm.algorithms.anchors import anchor_of, delta
from lowcomm.algorithms.base import Algorithm
from lowcomm.algorithms.under_way import UnderWay, num_advances, send
from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine
from lowcomm.outer.base import Outer
from lowcomm.outer.nesterov import Nesterov
from lowcomm.reduce import Reducer, ReducerState
from lowcomm.tensors import add_, copy_, zeros


@dataclass
class EagerDiLoCoState:
    """Attributes:
    own: this replica's anchor, float32 or better.
    own_outer: state of its outer optimizer.
    common: the anchor that has taken only averages; equal on all replicas.
    common_outer: state of its outer optimizer; equal on all replicas.
    correction: the next outer step's D_m less the fresh own delta: less the last own delta over M, and once it is
        there, plus the average.
    reducer: what averaging deltas keeps between rounds.
    under_way: the average of the last round's deltas; None before the first round and after the end.
    round: rounds so far.
    t: inner steps so far.
    synced_t: the inner step of the last round.
    """

    own: list[Tensor]
    own_outer: Any
    common: list[Tensor]
    common_outer: Any
    correction: list[Tensor]
    reducer: ReducerState
    under_way: UnderWay | None = None
    round: int = 0
    t: int = 0
    synced_t: int = 0


@dataclass(frozen=True)
class EagerDiLoCo(Algorithm[EagerDiLoCoState]):
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
        if self.every < 1:
            raise ValueError(f"every is {self.every}; a round needs at least 1 inner step")

    def init(self, engine: Engine, comm: Comm) -> EagerDiLoCoState:
        """Both anchors are copies of the parameters."""
        own, common = (anchor_of(engine.slots()["param"]) for _ in range(2))
        reducer = self.reducer.init(own)
        return EagerDiLoCoState(own, self.outer.init(own), common, self.outer.init(common), zeros(own), reducer)

    def after_update(self, t: int, engine: Engine, state: EagerDiLoCoState, comm: Comm) -> None:
        """A round when it is due; between rounds, the later messages of the average under way at their steps."""
        state.t = t
        if t % self.every == 0:
            params = engine.slots()["param"]
            self._land(state)
            moved = self._send(params, state, comm)
            share = torch._foreach_div(moved, len(comm.members))
            self.outer.apply(state.own, list(torch._foreach_add(state.correction, share)), state.own_outer)
            state.correction = list(torch._foreach_neg(share))
            copy_(params, state.own)
        elif state.under_way is not None:
            for _ in range(num_advances(self.reducer, t - state.synced_t, self.every)):
                state.under_way.advance()

    def settle(self, state: EagerDiLoCoState) -> None:
        """Wait for the average under way."""
        if state.under_way is not None:
            state.under_way.settle()

    def finish(self, t: int, engine: Engine, state: EagerDiLoCoState, comm: Comm) -> None:
        """Average a partial last round, wait for what is under way, and load the common anchor everywhere."""
        params = engine.slots()["param"]
        self._land(state)
        if state.t > state.synced_t:
            self._send(params, state, comm)
            self._land(state)
        copy_(params, state.common)

    def num_rounds(self, state: EagerDiLoCoState) -> int:
        """Rounds so far, the one that is under way included."""
        return state.round

    def consensus(self, engine: Engine, state: EagerDiLoCoState) -> list[Tensor]:
        """The common anchor; it lags by the round that is under way."""
        return state.common

    def _land(self, state: EagerDiLoCoState) -> None:
        """Take in the average of the last round's deltas."""
        if state.under_way is not None:
            mean, state.reducer = state.under_way.result()
            self.outer.apply(state.common, mean, state.common_outer)
            add_(state.correction, mean)
            state.under_way = None

    def _send(self, params: list[Tensor], state: EagerDiLoCoState, comm: Comm) -> list[Tensor]:
        """Send off what this replica has moved, and return it."""
        moved = delta(state.own, params, 1.0, range(len(params)))
        state.under_way = send(self.reducer, moved, state.reducer, comm)
        state.round, state.synced_t = state.round + 1, state.t
        return moved
