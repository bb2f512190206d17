"""Rounds that grow as the learning rate falls: the quadratic synchronization rule (Gu et al. 2023, arXiv:2310.14423).

    after each round, with lr the rate of the next step:   H <- max(base, floor((alpha / lr)^power))

Power 2 is QSR; 1 and 3 are the linear and the cubic rule that the paper compares it with; a plain number of steps is
the constant one.

Differs from the paper in: during warm-up, the length follows from ``peak_lr``, or is ``base`` without one (the authors'
code has an option ``init_h``). A rate that rises within a round shortens it to what it would have been at that rate, as
in a warm-up that nobody told of; one that falls changes only the next. A round at a rate of 0 lasts until the rate
rises, or to the end of the run; the authors' code divides by it.
alpha 0, their switch to a constant length, is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# More steps than any run has; the end of the run cuts such a round short.
_FOREVER = 2**53


@dataclass(frozen=True)
class QSR:
    """The inner steps of a round as a function of the learning rate at its start.

    Attributes:
        base: the minimum, H_base.
        alpha: scale of the length: n steps at the rate alpha / n^(1 / power). The default is the paper's for ViT-B with
            AdamW at a peak rate of 0.008.
        power: 2 is QSR.
        num_warmup_steps: rounds that begin before this inner step ignore the rate, which is still rising.
        peak_lr: the rate at the end of warm-up, which sets the length of those rounds; None gives them ``base`` steps.
    """

    base: int = 4
    alpha: float = 0.0175
    power: float = 2.0
    num_warmup_steps: int = 0
    peak_lr: float | None = None

    def __post_init__(self) -> None:
        if self.base < 1:
            raise ValueError(f"QSR(base={self.base}): a round needs at least 1 inner step")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(
                f"QSR(alpha={self.alpha}): it must be positive and finite; for rounds of one length set every to a "
                "number of steps"
            )
        if not (self.power > 0 and math.isfinite(self.power)):
            raise ValueError(f"QSR(power={self.power}): it must be positive and finite; 2 is the paper's")
        if self.num_warmup_steps < 0:
            raise ValueError(f"QSR(num_warmup_steps={self.num_warmup_steps}): it must be at least 0")
        if self.peak_lr is not None and not (self.peak_lr > 0 and math.isfinite(self.peak_lr)):
            raise ValueError(f"QSR(peak_lr={self.peak_lr}): it must be positive and finite, or None")
        if self.peak_lr is not None and self.num_warmup_steps == 0:
            raise ValueError(
                f"QSR(peak_lr={self.peak_lr}, num_warmup_steps=0): peak_lr is for rounds of the warm-up; give its "
                "number of steps, or leave peak_lr out"
            )

    def round_steps(self, t: int, lr: float) -> int:
        """Inner steps of the round that begins after step ``t``, whose first update has the rate ``lr``."""
        if t < self.num_warmup_steps:
            return self.base if self.peak_lr is None else self._steps_at(self.peak_lr)
        return self._steps_at(lr)

    def _steps_at(self, lr: float) -> int:
        if lr <= 0 or self.power * (math.log(self.alpha) - math.log(lr)) >= math.log(_FOREVER):
            return _FOREVER
        # a whole number of steps must not round down to one less
        return max(self.base, math.floor(math.pow(self.alpha / lr, self.power) * (1 + 1e-9)))


def check_every(every: int | QSR) -> None:
    """Check that the period is at least 1.

    Raises:
        ValueError: for a number below 1.
    """
    if not isinstance(every, QSR) and every < 1:
        raise ValueError(f"every is {every}; a round needs at least 1 inner step")


def round_steps(every: int | QSR, t: int, lr: float) -> int:
    """Inner steps of the round that begins after step ``t``, whose first update has the rate ``lr``."""
    return every.round_steps(t, lr) if isinstance(every, QSR) else every
