"""Elastic averaging: replicas and a centre pull at each other (Zhang et al. 2015, arXiv:1412.6651, equations 5 and 6).

    every `every` inner steps:   x_i <- x_i - alpha (x_i - c);   c <- c + n alpha (mean_i x_i - c)

Differs from the paper in: the synchronous form; a partial last round is averaged too.
"""

from dataclasses import dataclass

from torch import Tensor

import lowcomm
from lowcomm.rounds.anchors import anchor_of, deltas
from lowcomm.rounds.base import Rounds, RoundsState
from lowcomm.rounds.exchanges import Exchange, Sending
from lowcomm.tensors import add_


@dataclass
class ElasticState(RoundsState):
    """Attributes:
    centre: equal on all replicas.
    """

    centre: list[Tensor]


@dataclass(frozen=True)
class ElasticAveraging(Rounds[ElasticState]):
    """Attributes:
    every: inner steps a round.
    alpha: how far replicas go to the centre; it goes n times as far to their mean, which must be at most 1.
    """

    every: int = 10
    alpha: float = 0.2
    reducer: lowcomm.Reducer = lowcomm.Reducer()

    def begin(self, engine: lowcomm.Engine, comm: lowcomm.Comm) -> ElasticState:
        """The centre is the first parameters."""
        centre = anchor_of(engine.slots()["param"])
        return ElasticState(centre, kept={"deltas": self.keep(centre)})

    def round(self, t: int, engine: lowcomm.Engine, state: ElasticState, comm: lowcomm.Comm) -> list[Sending]:
        """How far this replica is from the centre, times n alpha."""
        return deltas(self.reducer, state.centre, engine.slots()["param"], self.alpha * len(comm.members))

    def commit(self, t: int, engine: lowcomm.Engine, state: ElasticState, sent: Exchange, means: list[Tensor]) -> None:
        """Both go by where the other was."""
        for x, c in zip(engine.slots()["param"], state.centre, strict=True):
            x.lerp_(c.to(x.dtype), self.alpha)
        add_(state.centre, means, alpha=-1.0)

    def stands(self, engine: lowcomm.Engine, state: ElasticState) -> list[Tensor]:
        """The centre."""
        return state.centre
