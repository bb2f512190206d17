"""NoLoCo: DiLoCo without an all-reduce; replicas average with one random partner a round (arXiv:2506.10911).

Each replica i keeps slow weights phi_i and an outer momentum d_i of its own. Every `every` inner steps, with bars for
means over its group of that round and delta_i = theta_i - phi_i for what its inner steps did:

    d_i <- alpha d_i + beta delta_bar + gamma (phi_bar - phi_i);   phi_i <- phi_i + d_i;   theta_i <- phi_i

The mean over all replicas follows DiLoCo with heavy-ball momentum whatever the groups; gamma pulls replicas together.
With gamma = beta it is ``d_i <- alpha d_i + beta (theta_bar - phi_i)``, for which one tensor travels in place of two.

Differs from the paper in: the sign of its equation 2, with which the method diverges, is that of its code; gamma is
checked against the exact bound of `lowcomm.rounds.gossip.largest_pull`, as the paper's interval holds values that
diverge and leaves out ones that contract; phi and d are float32 or better; replicas start equal, in place of from an
average of independent first weights; numbers that groups do not divide, a partial last round and an average at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine
from lowcomm.reduce import Reducer
from lowcomm.rounds.anchors import anchor_of, delta
from lowcomm.rounds.base import Rounds, RoundsState
from lowcomm.rounds.exchanges import Average, Exchange, Sending
from lowcomm.rounds.gossip import Finalize, check_finalize, check_pull, finalized, group_mean, local
from lowcomm.rounds.qsr import check_every
from lowcomm.tensors import add_, copy_, mul_, zeros


@dataclass
class NoLoCoState(RoundsState):
    """Attributes:
    anchor: phi, this replica's slow weights, float32 or better.
    momentum: d, likewise.
    mean_anchor: that of this round's group, once it has come; None where nobody needs it, as all anchors are equal or
        thetas travel in place of deltas.
    is_apart: whether anchors may differ.
    """

    anchor: list[Tensor]
    momentum: list[Tensor]
    mean_anchor: list[Tensor] | None = None
    is_apart: bool = False


@dataclass(frozen=True)
class NoLoCo(Rounds[NoLoCoState]):
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
        check_every(self.every)
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

    def begin(self, engine: Engine, comm: Comm) -> NoLoCoState:
        """Every anchor is a copy of the parameters, which all replicas share."""
        anchor = anchor_of(engine.slots()["param"])
        kept = {slot: self.keep(anchor, slot) for slot in ("moved", "anchors")}
        return NoLoCoState(anchor, zeros(anchor), kept=kept)

    def reducer_of(self, slot: str) -> Reducer:
        """Anchors have one of their own."""
        return self.anchors if slot == "anchors" else self.reducer

    def round(self, t: int, engine: Engine, state: NoLoCoState, comm: Comm) -> list[Sending]:
        """Thetas, or deltas, and anchors if they are apart and did not travel ahead."""
        params, round = engine.slots()["param"], state.round + 1
        is_coming = state.mean_anchor is not None or any(sent.slot == "anchors" for sent in state.under_way)
        is_missing = state.is_apart and self._has_groups(comm) and not is_coming
        ahead = [self._anchors(state, round, 0)] if is_missing else []
        if self.gamma is None:
            moved = local(state.anchor, params)
        else:
            moved = delta(state.anchor, params, -1.0, range(len(params)))
        among = self._among(self.reducer, round)
        return [*ahead, Sending("moved", self.reducer, moved, average=among)]

    def commit(self, t: int, engine: Engine, state: NoLoCoState, sent: Exchange, means: list[Tensor]) -> None:
        """An outer step of this replica's own, on what its group has moved and on how far it is from the group."""
        if sent.slot == "anchors":
            state.mean_anchor = means
            return
        if self.gamma is None:
            pulls = [(self.beta, list(torch._foreach_sub(means, state.anchor)))]
        else:
            pulls = [(self.beta, means)]
            if state.mean_anchor is not None:
                pulls.append((self.gamma, list(torch._foreach_sub(state.mean_anchor, state.anchor))))
        outer_step(state.anchor, state.momentum, self.alpha, pulls)
        state.mean_anchor, state.is_apart = None, True
        copy_(engine.slots()["param"], state.anchor)

    def after_update(self, t: int, engine: Engine, state: NoLoCoState, comm: Comm) -> None:
        """A round when it is due, after which the anchors set out to the group of the next one."""
        is_due = self.is_due(t, state)
        super().after_update(t, engine, state, comm)
        if is_due and self._has_groups(comm):
            self.exchange(t, engine, state, comm, [self._anchors(state, state.round + 1, self.every)])

    def enter(self, engine: Engine, state: NoLoCoState, comm: Comm) -> None:
        """Groups are others now, and so are their mean anchors."""
        super().enter(engine, state, comm)
        state.mean_anchor = None

    def may_skip(self) -> bool:
        """Alone a replica steps by itself."""
        return True

    def close(self, engine: Engine, state: NoLoCoState, comm: Comm) -> None:
        """What `finalize` says, which all replicas' parameters become."""
        anchor = finalized(state.anchor, self.finalize, comm)
        if self.finalize != "ensemble":
            # all anchors are equal again, and nobody needs their mean: what partners share begins anew, too
            state.mean_anchor, state.is_apart, state.kept["anchors"] = None, False, self.keep(anchor, "anchors")
        state.anchor = anchor

    def stands(self, engine: Engine, state: NoLoCoState) -> list[Tensor]:
        """This replica's anchor; replicas stay apart, and their losses rather than their parameters are averaged."""
        return state.anchor

    def _has_groups(self, comm: Comm) -> bool:
        """Whether anchors travel: they are asked for and may differ."""
        return self.gamma is not None and self.group_size is not None and self.group_size < len(comm.members)

    def _anchors(self, state: NoLoCoState, round: int, delay: int) -> Sending:
        among = self._among(self.anchors, round)
        return Sending("anchors", self.anchors, state.anchor, delay=delay, average=among, has_prelude=True)

    def _among(self, reducer: Reducer, round: int) -> Average:
        return partial(group_mean, reducer, size=self.group_size, seed=self.seed, round=round)


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
