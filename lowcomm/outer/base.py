"""The optimizer of the anchor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from torch import Tensor

S = TypeVar("S")


class Outer(ABC, Generic[S]):
    """Moves the anchor once a round; what changes between rounds lives in the state ``S``."""

    @abstractmethod
    def init(self, anchor: list[Tensor]) -> S:
        """The state before the first round."""

    def tensors(self, state: S) -> list[Tensor]:
        """Those of the state; by default there are none."""
        del state
        return []

    @abstractmethod
    def apply(self, anchor: list[Tensor], delta: list[Tensor], state: S) -> None:
        """Step in place. ``delta`` is anchor - local, averaged: it points like a gradient, so the step descends."""
