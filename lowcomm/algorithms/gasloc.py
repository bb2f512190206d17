"""GASLoC: gossip on the result of a local outer step, accelerated by momentum (arXiv:2606.11081).

Each replica i keeps its anchor x_i. Every `every` inner steps, with a bar for the mean over its group of that round:

    y_i = x_i + lr (local_i - x_i);   x_i <- y_i - gossip (y_i - y_bar) + momentum (y_i - y_i of the last round)

with y_i = x_i before the first round. The mean over all replicas follows DiLoCo with this lr and Nesterov momentum,
whatever the groups: for the mean, ``y - y of the last round`` is -lr times torch's momentum buffer. Without momentum
and with one group of all, every replica does.

Differs from the paper in: its equations are known to us from others' accounts. Its graph of one peer is groups of two
here, and its two peers are larger groups. gossip is checked against the bound of
`lowcomm.rounds.gossip.largest_pull`. x and y are float32 or better. The default numbers are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine
from lowcomm.reduce import Reducer
from lowcomm.rounds.anchors import anchor_of, delta
from lowcomm.rounds.base import Rounds, RoundsState
from lowcomm.rounds.exchanges import Exchange, Sending
from lowcomm.rounds.gossip import Finalize, check_finalize, check_keeps_values, check_pull, finalized, group_mean
from lowcomm.rounds.qsr import check_every
from lowcomm.tensors import copy_


@dataclass
class GASLoCState(RoundsState):
    """Attributes:
    anchor: x of this replica, float32 or better.
    proposed: y of the last round, float32 or better; before the first, x.
    """

    anchor: list[Tensor]
    proposed: list[Tensor]


@dataclass(frozen=True)
class GASLoC(Rounds[GASLoCState]):
    """Local steps, a local outer step, and a step towards the mean of a random group.

    Traffic of a round, for N parameters and groups of n: (n - 1) x 4 N bytes. At the end, one all-reduce of 4 N bytes,
    unless `finalize` says otherwise.

    Attributes:
        every: inner steps a round.
        lr: outer learning rate, eta in the paper.
        momentum: on y, gamma in the paper; below 1.
        gossip: step towards the group's mean, alpha in the paper; 1 goes all the way. Its bound depends on momentum and
            group size.
        group_size: replicas per group; the remainder forms a smaller group, or one replica is alone. None: all, the
            complete graph.
        reducer: how y is averaged over a group.
        finalize: final parameters: the "average" of all replicas, the first replica's ("pick"), or each replica's own
            ("ensemble").
        seed: of the groups.
    """

    every: int = 50
    lr: float = 0.7
    momentum: float = 0.5
    gossip: float = 1.0
    group_size: int | None = 2
    reducer: Reducer = Reducer()
    finalize: Finalize = "average"
    seed: int = 0

    def __post_init__(self) -> None:
        check_every(self.every)
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"GASLoC(lr={self.lr}): it must be positive and finite; 0.7 is usual")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"GASLoC(momentum={self.momentum}): it must be at least 0 and below 1; 0.5 is usual")
        if self.group_size is not None and self.group_size < 2:
            raise ValueError(
                f"GASLoC(group_size={self.group_size}): a group has at least 2 members; None: all replicas"
            )
        if not (self.gossip > 0 and math.isfinite(self.gossip)):
            raise ValueError(f"GASLoC(gossip={self.gossip}): it must be positive and finite; 1 goes to the mean")
        check_finalize(self.finalize)
        check_keeps_values(self.reducer, "GASLoC(reducer=...)", "")
        remedy = "lower gossip or momentum"
        check_pull(self.gossip, self.momentum, self.group_size, f"GASLoC(gossip={self.gossip:g})", remedy)

    def begin(self, engine: Engine, comm: Comm) -> GASLoCState:
        """Both x and y start as the parameters."""
        params = engine.slots()["param"]
        anchor = anchor_of(params)
        return GASLoCState(anchor, anchor_of(params), kept={"proposed": self.keep(anchor)})

    def round(self, t: int, engine: Engine, state: GASLoCState, comm: Comm) -> list[Sending]:
        """y of this replica, to its group."""
        moved = delta(state.anchor, engine.slots()["param"], -1.0, range(len(state.anchor)))
        proposed = list(torch._foreach_add(state.anchor, moved, alpha=self.lr))
        among = partial(group_mean, self.reducer, size=self.group_size, seed=self.seed, round=state.round + 1)
        return [Sending("proposed", self.reducer, proposed, memo=proposed, average=among)]

    def commit(self, t: int, engine: Engine, state: GASLoCState, sent: Exchange, means: list[Tensor]) -> None:
        """Apply `mixed`, and load the result."""
        state.anchor = mixed(sent.memo, means, state.proposed, self.gossip, self.momentum)
        state.proposed = sent.memo
        copy_(engine.slots()["param"], state.anchor)

    def ends_apart(self) -> bool:
        return self.finalize == "ensemble"

    def may_skip(self) -> bool:
        """A replica alone steps by itself."""
        return True

    def close(self, engine: Engine, state: GASLoCState, comm: Comm) -> None:
        """Apply `finalize`."""
        state.anchor = finalized(state.anchor, self.finalize, comm)

    def stands(self, engine: Engine, state: GASLoCState) -> list[Tensor]:
        """This replica's anchor. Replicas differ, so an evaluation averages their losses."""
        return state.anchor


def mixed(
    proposed: list[Tensor], mean: list[Tensor], last: list[Tensor], gossip: float, momentum: float
) -> list[Tensor]:
    """The new x: y pulled towards its group's mean, plus momentum times the change of y."""
    moved = torch._foreach_sub(proposed, last)
    pulled = mean if gossip == 1 else list(torch._foreach_lerp(proposed, mean, gossip))
    return list(torch._foreach_add(pulled, moved, alpha=momentum)) if momentum else pulled
