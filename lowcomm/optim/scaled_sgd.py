"""SGD with a given diagonal scaling: each coordinate's step is divided by its scale.

    x <- (1 - lr weight_decay) x - lr g / scale

The optimizer never changes a scale. A method that shares one among replicas, such as `lowcomm.algorithms.savic.SAVIC`,
writes it into the slot "scale".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT


class ScaledSGD(Optimizer):
    """Gradient descent with a fixed diagonal scaling; its state "scale" is there from the start."""

    def __init__(self, params: ParamsT, lr: float = 1e-3, weight_decay: float = 0.0, scale: float = 1.0) -> None:
        """
        Args:
            params: parameters, or groups of them.
            lr: the learning rate.
            weight_decay: decoupled and not scaled: each step takes off ``lr weight_decay`` of a parameter.
            scale: what all coordinates start with; until somebody writes the slot this is SGD with ``lr / scale``.

        Raises:
            ValueError: for a number out of range.
        """
        if not (lr >= 0 and math.isfinite(lr)):
            raise ValueError(f"ScaledSGD(lr={lr}): it must be at least 0 and finite")
        if not (weight_decay >= 0 and math.isfinite(weight_decay)):
            raise ValueError(f"ScaledSGD(weight_decay={weight_decay}): it must be at least 0 and finite; 0 is none")
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"ScaledSGD(scale={scale}): gradients are divided by it; it must be positive and finite")
        defaults: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "scale": scale}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Called by the constructor for each group; sets its parameters' scale."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            wide = torch.promote_types(p.dtype, torch.float32)
            self.state[p]["scale"] = torch.full_like(p, group["scale"], dtype=wide, requires_grad=False)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; parameters without a gradient are left as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr = float(group["lr"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                scale: Tensor = self.state[p]["scale"]
                if group["weight_decay"]:
                    p.mul_(1 - lr * group["weight_decay"])
                p.addcdiv_(p.grad, scale, value=-lr)
        return loss
