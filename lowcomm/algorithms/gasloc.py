"""GASLoC: gossip on what an outer step proposes, with momentum that speeds it up (arXiv:2606.11081).

Each replica i keeps the point x_i that it was loaded with. Every `every` inner steps, with a bar for the mean over its
group of that round:

    y_i = x_i + lr (local_i - x_i);   x_i <- y_i - gossip (y_i - y_bar) + momentum (y_i - y_i of the last round)

with y_i = x_i before the first round. The mean over all replicas follows DiLoCo with this lr and Nesterov momentum,
whatever the groups: for the mean, ``y - y of the last round`` is -lr times torch's momentum buffer. Without momentum
and with one group of all, every replica does.

Differs from the paper in: its equations are followed, which we know from others' accounts; its graph of one peer each
is groups of two here, and larger groups stand for its two peers; gossip is checked against the bound of
`lowcomm.rounds.gossip.largest_pull`; x and y are float32 or better; the default numbers are ours.
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
from lowcomm.rounds.gossip import Finalize, check_finalize, check_pull, finalized, group_mean
from lowcomm.rounds.qsr import check_every
from lowcomm.tensors import copy_


@dataclass
class GASLoCState(RoundsState):
    """Attributes:
    anchor: x, what this replica was loaded with, float32 or better.
    proposed: y of the last round, likewise; before the first, x.
    """

    anchor: list[Tensor]
    proposed: list[Tensor]


@dataclass(frozen=True)
class GASLoC(Rounds[GASLoCState]):
    """Local steps, an outer step of one's own, and a step towards the mean of a random group.

    Traffic of a round, for N parameters and groups of n: (n - 1) x 4 N bytes. At the end, one all-reduce of 4 N bytes,
    unless `finalize` says otherwise.

    Attributes:
        every: inner steps a round.
        lr: outer learning rate, eta in the paper.
        momentum: on what is proposed, gamma in the paper; below 1.
        gossip: how far to go to the group's mean, alpha in the paper: 1 goes all the way. The momentum and the group's
            size bound it.
        group_size: replicas that average together in a round; what is left over is a smaller group, or one replica
            alone. None: all of them, the complete graph.
        reducer: how y is averaged over a group.
        finalize: what a run leaves behind: the "average" of all replicas on each, the first replica's on all ("pick"),
            or each its own ("ensemble").
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
        remedy = "lower gossip or momentum"
        check_pull(self.gossip, self.momentum, self.group_size, f"GASLoC(gossip={self.gossip:g})", remedy)

    def begin(self, engine: Engine, comm: Comm) -> GASLoCState:
        """Both points are copies of the parameters, which all replicas share."""
        params = engine.slots()["param"]
        anchor = anchor_of(params)
        return GASLoCState(anchor, anchor_of(params), kept={"proposed": self.keep(anchor)})

    def round(self, t: int, engine: Engine, state: GASLoCState, comm: Comm) -> list[Sending]:
        """What this replica proposes, to its group."""
        moved = delta(state.anchor, engine.slots()["param"], -1.0, range(len(state.anchor)))
        proposed = list(torch._foreach_add(state.anchor, moved, alpha=self.lr))
        among = partial(group_mean, self.reducer, size=self.group_size, seed=self.seed, round=state.round + 1)
        return [Sending("proposed", self.reducer, proposed, memo=proposed, average=among)]

    def commit(self, t: int, engine: Engine, state: GASLoCState, sent: Exchange, means: list[Tensor]) -> None:
        """Towards the group's mean, and on with the momentum."""
        state.anchor = mixed(sent.memo, means, state.proposed, self.gossip, self.momentum)
        state.proposed = sent.memo
        copy_(engine.slots()["param"], state.anchor)

    def may_skip(self) -> bool:
        """Alone a replica steps by itself."""
        return True

    def close(self, engine: Engine, state: GASLoCState, comm: Comm) -> None:
        """What `finalize` says, which all replicas' parameters become."""
        state.anchor = finalized(state.anchor, self.finalize, comm)

    def stands(self, engine: Engine, state: GASLoCState) -> list[Tensor]:
        """This replica's anchor; replicas stay apart, and their losses rather than their parameters are averaged."""
        return state.anchor


def mixed(
    proposed: list[Tensor], mean: list[Tensor], last: list[Tensor], gossip: float, momentum: float
) -> list[Tensor]:
    """Where a replica goes on: from what it proposed towards its group's mean, and on as it moved since the last."""
    moved = torch._foreach_sub(proposed, last)
    return list(torch._foreach_add(torch._foreach_lerp(proposed, mean, gossip), moved, alpha=momentum))
