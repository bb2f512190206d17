"""NoLoCo: DiLoCo without an all-reduce; each replica averages with one random partner per round (arXiv:2506.10911).

Each replica i keeps its own slow weights phi_i and outer momentum d_i. Every `every` inner steps, with bars for means
over its group of that round and delta_i = theta_i - phi_i:

    d_i <- alpha d_i + beta delta_bar + gamma (phi_bar - phi_i);   phi_i <- phi_i + d_i;   theta_i <- phi_i

Whatever the groups, the mean over all replicas follows DiLoCo with heavy-ball momentum; gamma pulls replicas together.
With gamma = beta it is ``d_i <- alpha d_i + beta (theta_bar - phi_i)``, which sends one tensor instead of two.

Differs from the paper in: its equation 2 diverges with the printed sign; here it has that of its code. gamma is checked
against the exact bound of `lowcomm.rounds.gossip.largest_pull`, as the paper's interval includes values that
diverge and excludes ones that contract. phi and d are float32 or better. Replicas start equal, not from an average of
independent initial weights. Group sizes need not divide the number of replicas; a partial last round and a final
average are added.
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
from lowcomm.rounds.gossip import Finalize, check_finalize, check_keeps_values, check_pull, finalized, group_mean, local
from lowcomm.rounds.qsr import check_every
from lowcomm.tensors import add_, copy_, mul_, zeros


@dataclass
class NoLoCoState(RoundsState):
    """Attributes:
    anchor: phi, this replica's slow weights, float32 or better.
    momentum: d, float32 or better.
    mean_anchor: phi_bar of this round's group, once received; None if not needed: anchors are equal, or thetas are
        sent.
    is_apart: whether anchors may differ.
    """

    anchor: list[Tensor]
    momentum: list[Tensor]
    mean_anchor: list[Tensor] | None = None
    is_apart: bool = False


@dataclass(frozen=True)
class NoLoCo(Rounds[NoLoCoState]):
    """Local steps, and outer steps on the mean of a random group.

    Traffic of a round, for N parameters and groups of n: (n - 1) x 4 N bytes with `gamma` None. A number doubles that:
    anchors are sent too, during the next round's inner steps. If a compressor sends k messages in sequence, they are
    spread over the round; a preliminary exchange with new partners is waited for after its first step. The anchors sent
    after the last full round are wasted, unless a partial round follows. At the end, one all-reduce of 4 N bytes,
    unless `finalize` says otherwise.

    Attributes:
        every: inner steps a round. The paper has 50, and 100 for its DiLoCo.
        alpha: outer momentum, the share of d that survives a round.
        beta: outer learning rate.
        gamma: pull towards the group's mean anchor; its bound depends on alpha and the group size. None: beta, by
            sending theta alone. A number, even beta's, sends deltas, and anchors ahead of time.
        group_size: replicas per group; the remainder forms a smaller group, or one replica steps by itself. None: all,
            which is DiLoCo with heavy-ball momentum.
        reducer: how theta, or the delta if `gamma` is a number, is averaged over a group.
        anchors: how anchors are averaged, if `gamma` is a number.
        finalize: final parameters: the "average" of all anchors, the first replica's ("pick"), or each replica's own
            ("ensemble").
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
        if self.gamma is None:
            check_keeps_values(self.reducer, "NoLoCo(gamma=None)", "; or give gamma a number, and deltas are sent")
        else:
            check_keeps_values(self.anchors, "NoLoCo(anchors=...)", "")
        if self.group_size is None:
            return  # anchors are equal at all times: there is nothing to pull together
        if self.gamma is None:
            named, remedy = f"NoLoCo(gamma=None), which is beta = {self.beta:g},", "give a lower gamma, or lower alpha"
            check_pull(self.beta, self.alpha, self.group_size, named, remedy)
        else:
            named = f"NoLoCo(gamma={self.gamma:g})"
            check_pull(self.gamma, self.alpha, self.group_size, named, "choose it within, or lower alpha")

    def begin(self, engine: Engine, comm: Comm) -> NoLoCoState:
        """The anchor is a copy of the parameters."""
        anchor = anchor_of(engine.slots()["param"])
        kept = {slot: self.keep(anchor, slot) for slot in ("moved", "anchors")}
        return NoLoCoState(anchor, zeros(anchor), kept=kept)

    def reducer_of(self, slot: str) -> Reducer:
        """Anchors have their own reducer."""
        return self.anchors if slot == "anchors" else self.reducer

    def round(self, t: int, engine: Engine, state: NoLoCoState, comm: Comm) -> list[Sending]:
        """Thetas or deltas, and anchors if they differ and were not sent ahead."""
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
        """Take this replica's outer step, from its group's mean and its distance to it."""
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
        """Do a round when due, then send the anchors to the group of the next round."""
        is_due = self.is_due(t, state)
        super().after_update(t, engine, state, comm)
        if is_due and self._has_groups(comm):
            self.exchange(t, engine, state, comm, [self._anchors(state, state.round + 1, self.every)])

    def enter(self, engine: Engine, state: NoLoCoState, comm: Comm) -> None:
        """The groups change, so their mean anchors are void."""
        super().enter(engine, state, comm)
        state.mean_anchor = None

    def ends_apart(self) -> bool:
        return self.finalize == "ensemble"

    def may_skip(self) -> bool:
        """A replica alone steps by itself."""
        return True

    def close(self, engine: Engine, state: NoLoCoState, comm: Comm) -> None:
        """Apply `finalize`."""
        anchor = finalized(state.anchor, self.finalize, comm)
        if self.finalize != "ensemble":
            # all anchors are equal again, and nobody needs their mean: what partners share begins anew, too
            state.mean_anchor, state.is_apart, state.kept["anchors"] = None, False, self.keep(anchor, "anchors")
        state.anchor = anchor

    def stands(self, engine: Engine, state: NoLoCoState) -> list[Tensor]:
        """This replica's anchor. Replicas differ, so an evaluation averages their losses."""
        return state.anchor

    def _has_groups(self, comm: Comm) -> bool:
        """Whether anchors must be sent: `gamma` is a number and groups are smaller than the whole."""
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
    """In place: momentum <- alpha momentum + sum of factor x pull; anchor <- anchor + momentum."""
    mul_(momentum, alpha)
    for factor, pull in pulls:
        add_(momentum, pull, alpha=factor)
    add_(anchor, momentum)
