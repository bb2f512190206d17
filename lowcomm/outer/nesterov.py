"""Nesterov momentum on the anchor, the outer optimizer of DiLoCo (Douillard et al. 2023, arXiv:2311.08105).

    b <- momentum b + delta;    anchor <- anchor - lr (delta + momentum b);    b = 0 at first

The form of torch.optim.SGD(nesterov=True): momentum is kept in units of delta, so lr may be scheduled.

Differs from the paper in: the paper names Nesterov momentum without equations; this is the form that its authors'
and all public implementations use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from lowcomm.outer.base import Outer
from lowcomm.tensors import laid_out_like, valueless, zeros


@dataclass
class NesterovState:
    """Attributes:
    buffer: b, shaped like the anchor; equal on all replicas.
    """

    buffer: list[Tensor]


@dataclass(frozen=True)
class Nesterov(Outer[NesterovState]):
    """Outer momentum with look-ahead.

    Attributes:
        lr: outer learning rate. Published optima are 0.7 with 8 replicas of full batch (DiLoCo, table 5) and
            0.4 / 0.6 / 0.6 / 0.8 for 1 / 2 / 4 / 8 replicas sharing a batch (arXiv:2503.09799).
        momentum: share of the buffer that survives a round, below 1.
    """

    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"Nesterov(lr={self.lr}): it must be positive and finite; 0.7 is usual")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"Nesterov(momentum={self.momentum}): it must be at least 0 and below 1; 0.9 is usual")

    def init(self, anchor: list[Tensor]) -> NesterovState:
        return NesterovState(zeros(anchor))

    def tensors(self, state: NesterovState) -> list[Tensor]:
        return state.buffer

    def apply(self, anchor: list[Tensor], delta: list[Tensor], state: NesterovState) -> None:
        """By torch's fused kernel, in one pass."""
        if not anchor or valueless(anchor):
            return
        state.buffer[:] = laid_out_like(anchor, state.buffer)
        grads, buffers = laid_out_like(anchor, delta), cast("list[Tensor | None]", state.buffer)
        how: dict[str, Any] = {
            "fused": True,
            "nesterov": True,
            "maximize": False,
            "weight_decay": 0.0,
            "dampening": 0.0,
        }
        with torch.no_grad():
            sgd(anchor, grads, buffers, momentum=self.momentum, lr=self.lr, **how)
