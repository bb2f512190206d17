"""No feedback: forget what was not sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowcomm.feedback.base import Feedback


@dataclass(frozen=True)
class NoFeedback(Feedback[None]):
    """No memory: the estimate is the compressed mean."""

    wants_sent: ClassVar[bool] = False

    def init(self, like: Tensor) -> None: ...

    def before(self, x: Tensor, state: None) -> tuple[Tensor, None]:
        return x, None

    def after(self, kept: None, sent: Tensor, mean: Tensor, state: None) -> tuple[Tensor, None]:
        return mean, state
