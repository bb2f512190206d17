"""How a replica remembers what it has not yet sent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from torch import Tensor

S = TypeVar("S")


class Feedback(ABC, Generic[S]):
    """A pair of functions around a compressor; what changes between rounds lives in the state ``S``."""

    @abstractmethod
    def init(self, like: Tensor) -> S:
        """The state before the first round for tensors shaped like ``like``."""

    @abstractmethod
    def before(self, x: Tensor, state: S) -> Tensor:
        """What to hand to the compressor in place of ``x``."""

    @abstractmethod
    def after(self, x: Tensor, sent: Tensor, mean: Tensor, state: S) -> tuple[Tensor, S]:
        """The estimate of the mean of ``x`` over ranks, equal on all of them, and the new state."""
