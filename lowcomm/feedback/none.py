"""Forget what was not sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowcomm.feedback.base import Feedback


@dataclass(frozen=True)
class NoFeedback(Feedback[None]):
    """The compressed mean as it is."""

    wants_sent: ClassVar[bool] = False

    def init(self, like: Tensor) -> None:
        """No state."""

    def before(self, x: Tensor, state: None) -> tuple[Tensor, None]:
        """``x`` itself."""
        return x, None

    def after(self, kept: None, sent: Tensor, mean: Tensor, state: None) -> tuple[Tensor, None]:
        """The mean of what was sent."""
        return mean, state
