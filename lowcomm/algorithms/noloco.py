"""NoLoCo: DiLoCo without an all-reduce; replicas average with one random partner a round (arXiv:2506.10911).

Each replica i keeps slow weights phi_i and an outer momentum d_i of its own. Every `every` inner steps, with bars for
means over its group of that round and delta_i = theta_i - phi_i for what its inner steps did:

    d_i <- alpha d_i + beta delta_bar + gamma (phi_bar - phi_i);   phi_i <- phi_i + d_i;   theta_i <- phi_i

The mean over all replicas follows DiLoCo with heavy-ball momentum whatever the groups; gamma pulls replicas together.
With gamma = beta it is ``d_i <- alpha d_i + beta (theta_bar - phi_i)``, for which one tensor travels in place of two.

Differs from the paper in: the sign of its equation 2, with which the method diverges, is that of its code; gamma is
checked against the exact bound of `lowcomm.algorithms.gossip.largest_pull`, as the paper's interval holds values that
diverge and leaves out ones that contract; phi and d are float32 or better; replicas start equal, in place of from an
average of independent first weights; numbers that groups do not divide, a partial last round and an average at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowcomm.algorithms.anchors import anchor_of, delta
from lowcomm.algorithms.base import Algorithm
from lowcomm.algorithms.gossip import (
    Finalize,
    check_finalize,
    check_pull,
    finalized,
    group_mean,
    local,
)
from lowcomm.algorithms.under_way import UnderWay, num_advances
from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine
from lowcomm.reduce import ALL_SENT, Reducer, ReducerState
from lowcomm.tensors import add_, copy_, mul_, zeros


@dataclass
class NoLoCoState:
    """Attributes:
    anchor: phi, this replica's slow weights, float32 or better.
    momentum: d, likewise.
    averaged: what averaging thetas (or deltas) keeps between rounds.
    anchors: what averaging anchors keeps, up to the round that `coming` is of.
    coming: the mean anchor of the next round's group, sent off after the last round; None where nobody needs it, as
        all anchors are equal or thetas travel in place of deltas, and after a partial last round.
    round: rounds so far.
    t: inner steps so far.
    synced_t: the inner step of the last round.
    """

    anchor: list[Tensor]
    momentum: list[Tensor]
    averaged: ReducerState
    anchors: ReducerState
    coming: UnderWay | None = None
    round: int = 0
    t: int = 0
    synced_t: int = 0


@dataclass(frozen=True)
class NoLoCo(Algorithm[NoLoCoState]):
    """Local steps, and outer steps on the mean of a random group.

    Traffic of a round, for N parameters and groups of n: (n - 1) x 4 N bytes with `gamma` None, twice that with a
    number, half of which, the anchors', goes while inner steps do, message by message: what new partners must share
    first is waited for after the first of them, and k messages in a row set out evenly over the round. Those after the
    last full round go in vain, unless a partial one follows. At the end, one all-reduce of 4 N bytes, unless `finalize`
    says otherwise.

    Attributes:
        every: inner steps a round. The paper has 50, and 100 for its DiLoCo.
        alpha: outer momentum, the share of d that survives a round.
        beta: outer learning rate.
        gamma: how strongly a replica is pulled to its group's mean anchor, below a bound that alpha and the group's
            size set. None: as strongly as beta, by sending theta alone. A number, beta too, sends deltas, and anchors
            ahead of time.
        group_size: replicas that average together in a round; what is left over is a smaller group, or one replica
            alone, which steps by itself. None: all of them, which is DiLoCo with heavy-ball momentum.
        reducer: how theta, or with a number for `gamma` the delta, is averaged over a group.
        anchors: how anchors are, which travel with a number for `gamma` only.
        finalize: what a run leaves behind: the "average" of all anchors on every replica, the first replica's on all
            ("pick"), or each its own ("ensemble").
        seed: of the groups.
    """

    every: int = 50
    alpha: float = 0.5
    beta: float = 0.7
    gamma: float | None = None
    group_size: int | None = 2
    reducer: Reducer = Reducer()
    anchors: Reducer = Reducer()
    finalize: Finalize = "average"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every is {self.every}; a round needs at least 1 inner step")
        if not 0 <= self.alpha < 1:
            raise ValueError(f"NoLoCo(alpha={self.alpha}): it must be at least 0 and below 1; 0.5 is the paper's")
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise ValueError(f"NoLoCo(beta={self.beta}): it must be positive and finite; 0.7 is the paper's")
        if self.group_size is not None and self.group_size < 2:
            raise ValueError(
                f"NoLoCo(group_size={self.group_size}): a group has at least 2 members; None: all replicas"
            )
        check_finalize(self.finalize)
        if self.gamma is not None and not math.isfinite(self.gamma):
            raise ValueError(f"NoLoCo(gamma={self.gamma}): it must be finite; None takes beta's value")
        if self.group_size is None:
            return  # anchors are equal at all times: there is nothing to pull together
        if self.gamma is None:
            named, remedy = f"NoLoCo(gamma=None), which is beta = {self.beta:g},", "give a lower gamma, or lower alpha"
            check_pull(self.beta, self.alpha, self.group_size, named, remedy)
        else:
            named = f"NoLoCo(gamma={self.gamma:g})"
            check_pull(self.gamma, self.alpha, self.group_size, named, "choose it within, or lower alpha")

    def init(self, engine: Engine, comm: Comm) -> NoLoCoState:
        """Every anchor is a copy of the parameters, which all replicas share."""
        anchor = anchor_of(engine.slots()["param"])
        momentum = zeros(anchor)
        return NoLoCoState(anchor, momentum, self.reducer.init(anchor), self.anchors.init(anchor))

    def after_update(self, t: int, engine: Engine, state: NoLoCoState, comm: Comm) -> None:
        """A round when it is due, after which the anchors set out; in between, what follows of their messages."""
        state.t = t
        if t % self.every == 0:
            self._sync(engine, state, comm)
            self._send_anchors(state, comm)
        elif state.coming is not None:
            self._advance(state.coming, t - state.synced_t)

    def settle(self, state: NoLoCoState) -> None:
        """See `Algorithm.settle`."""
        if state.coming is not None:
            state.coming.settle()

    def finish(self, t: int, engine: Engine, state: NoLoCoState, comm: Comm) -> None:
        """A round for a partial last one; then what `finalize` says, which all replicas' parameters become."""
        if state.t > state.synced_t:
            self._sync(engine, state, comm)
        self.settle(state)
        state.anchor = finalized(state.anchor, self.finalize, comm)
        copy_(engine.slots()["param"], state.anchor)
        if self.finalize != "ensemble":
            # all anchors are equal again, and no round uses those under way: what partners share begins anew, too
            state.coming, state.anchors = None, self.anchors.init(state.anchor)

    def num_rounds(self, state: NoLoCoState) -> int:
        """Rounds so far."""
        return state.round

    def consensus(self, engine: Engine, state: NoLoCoState) -> list[Tensor]:
        """This replica's anchor; replicas stay apart, and their losses rather than their parameters are averaged."""
        return state.anchor

    def _sync(self, engine: Engine, state: NoLoCoState, comm: Comm) -> None:
        params, round = engine.slots()["param"], state.round + 1
        if self.gamma is None:
            theta = local(state.anchor, params)
            mean, averaged = self._start(self.reducer, theta, state.averaged, round, comm).result()
            pulls = [(self.beta, list(torch._foreach_sub(mean, state.anchor)))]
        else:
            if state.coming is None and state.round > 0 and self.finalize == "ensemble":
                self._send_anchors(state, comm)  # a run that had ended with a partial round goes on
            moved = delta(state.anchor, params, -1.0, range(len(params)))
            mean, averaged = self._start(self.reducer, moved, state.averaged, round, comm).result()
            pulls = [(self.beta, mean)]
            if state.coming is not None:
                mean_anchor, state.anchors = state.coming.result()
                pulls.append((self.gamma, list(torch._foreach_sub(mean_anchor, state.anchor))))
                state.coming = None
        outer_step(state.anchor, state.momentum, self.alpha, pulls)
        copy_(params, state.anchor)
        state.averaged, state.round, state.synced_t = averaged, round, state.t

    def _send_anchors(self, state: NoLoCoState, comm: Comm) -> None:
        """To the group of the next round, where they are asked for and may differ."""
        if self.gamma is not None and self.group_size is not None and self.group_size < len(comm.members):
            state.coming = self._start(self.anchors, state.anchor, state.anchors, state.round + 1, comm)

    def _start(self, reducer: Reducer, xs: list[Tensor], kept: ReducerState, round: int, comm: Comm) -> UnderWay:
        return UnderWay(group_mean(reducer, xs, kept, comm, self.group_size, self.seed, round))

    def _advance(self, coming: UnderWay, age: int) -> None:
        """What is sent of the anchors ``age`` inner steps after a round; members of a group do it at the same ones."""
        if age == 1 and coming.task is not None and coming.task.pending is not ALL_SENT:
            coming.advance()  # new partners have made anew what they share, and the average itself sets out
        for _ in range(num_advances(self.anchors, age, self.every)):
            coming.advance()


def outer_step(
    anchor: list[Tensor],
    momentum: list[Tensor],
    alpha: float,
    pulls: Sequence[tuple[float, list[Tensor]]],
) -> None:
    """In place: the momentum becomes alpha times itself and the sum of factor times pull; the anchor moves by it."""
    mul_(momentum, alpha)
    for factor, pull in pulls:
        add_(momentum, pull, alpha=factor)
    add_(anchor, momentum)
