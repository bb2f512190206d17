"""Plain outer step: anchor <- anchor - lr delta. With lr 1 the anchor becomes the mean of the replicas (FedAvg).

Differs from the paper in: nothing (McMahan et al. 2017, arXiv:1602.05629, is lr = 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lowcomm.outer.base import Outer
from lowcomm.tensors import add_


@dataclass(frozen=True)
class SGD(Outer[None]):
    """Follow the mean delta.

    Attributes:
        lr: 1 averages, less keeps a part of the old anchor, more overshoots.
    """

    lr: float = 1.0

    def __post_init__(self) -> None:
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"outer SGD(lr={self.lr}): it must be positive and finite; 1 is plain averaging")

    def init(self, anchor: list[Tensor]) -> None: ...

    def apply(self, anchor: list[Tensor], delta: list[Tensor], state: None) -> None:
        add_(anchor, delta, alpha=-self.lr)
