"""EF21 on a running average of x, for noisy x (EF21-SGDM, arXiv:2305.15155).

Each member averages its own x, ``v = (1 - eta) v + eta x``, and follows v as EF21 follows x. Averaging takes the noise
out before it can be compressed, so that small batches do.

Differs from the paper in: nothing; v starts as the first x.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from lowcomm.comm.base import Comm, Work
from lowcomm.feedback.base import Feedback
from lowcomm.feedback.tracked import Tracked, move, resynced, tracked


@dataclass
class EF21SGDMState:
    """The average and what was sent of it.

    Attributes:
        average: v of this member; None before its first round.
        known: what it has sent of v, and the mean of that over members.
    """

    average: Tensor | None
    known: Tracked


@dataclass(frozen=True)
class EF21SGDM(Feedback[EF21SGDMState]):
    """EF21 with momentum on each member.

    Attributes:
        eta: weight of the newest x in (0, 1]; 1 is EF21.
        dense_first: start from the exact x of the first round, which goes uncompressed; otherwise from zero.
    """

    eta: float = 0.1
    dense_first: bool = True
    keeps_mean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < self.eta <= 1.0:
            raise ValueError(f"EF21SGDM(eta={self.eta}): it must lie within (0, 1]; 0.1 is usual, 1 is EF21")

    def init(self, like: Tensor) -> EF21SGDMState:
        return EF21SGDMState(None, tracked(like))

    def is_dense(self, state: EF21SGDMState) -> bool:
        """The first round, if so wanted."""
        return self.dense_first and state.known.is_new

    def before(self, x: Tensor, state: EF21SGDMState) -> tuple[Tensor, Tensor]:
        """What is new in v, and v."""
        last = state.average
        average = x.clone() if last is None or self.eta == 1 else last.mul(1 - self.eta).add_(x, alpha=self.eta)
        return average if state.known.is_new else average - state.known.mine, average

    def after(self, kept: Tensor, sent: Tensor, mean: Tensor, state: EF21SGDMState) -> tuple[Tensor, EF21SGDMState]:
        """The mean of what is known of all v."""
        move(state.known, sent, mean)
        return state.known.ours.clone(), EF21SGDMState(kept, state.known)

    def resync(self, state: EF21SGDMState, comm: Comm) -> Generator[Work[Any], Any, EF21SGDMState]:
        """Recompute the mean; a new member starts v with its first x."""
        return replace(state, known=(yield from resynced(state.known, comm)))
