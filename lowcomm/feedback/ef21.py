"""Compress the change since what the others know (EF21, arXiv:2106.05203).

Each member keeps g, the sum of all that it has sent. It compresses ``x - g``; the estimate is the mean of all g. Where
x settles down the differences vanish, and their errors with them, however much the members differ.

EF21-W (arXiv:2402.10774) is this method with a larger step size, see `benchmarks/step_size.py`, as long as the
compressor commutes with positive factors; for others see `ef21_w_weights` there.

Differs from the paper in: nothing; ``dense_first`` chooses between its two starts.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lowcomm.comm.base import Comm, Work
from lowcomm.feedback.base import Feedback
from lowcomm.feedback.tracked import Tracked, move, resynced, tracked


@dataclass(frozen=True)
class EF21(Feedback[Tracked]):
    """Differences of ``x`` from round to round.

    Attributes:
        dense_first: start from the exact x of the first round, which goes uncompressed; otherwise from zero.
    """

    dense_first: bool = True
    keeps_mean: ClassVar[bool] = True

    def init(self, like: Tensor) -> Tracked:
        return tracked(like)

    def is_dense(self, state: Tracked) -> bool:
        """The first round, if so wanted."""
        return self.dense_first and state.is_new

    def before(self, x: Tensor, state: Tracked) -> tuple[Tensor, None]:
        """What is new in ``x``."""
        return x - state.mine, None

    def after(self, kept: None, sent: Tensor, mean: Tensor, state: Tracked) -> tuple[Tensor, Tracked]:
        """The mean of all g."""
        move(state, sent, mean)
        return state.ours.clone(), state

    def resync(self, state: Tracked, comm: Comm) -> Generator[Work[Any], Any, Tracked]:
        """Recompute the mean; a new member has g = 0."""
        return (yield from resynced(state, comm))
