"""QHADOPT: ADOPT with quasi-hyperbolic momentum, the inner optimizer of MT-DAO (Iacob et al. 2025, arXiv:2510.05361).

With momenta u_1..u_N of weights w_j >= 0 that sum to at most 1, for the gradient g of call k = 0, 1, 2, ...:

    k = 0:    v <- g^2                                               and nothing else
    k >= 1:   x <- (1 - lr weight_decay) x
              n <- clamp(g / max(sqrt(v), eps), -k^(1/4), k^(1/4))
              u_j <- beta_j u_j + (1 - beta_j) n                     for each j
              x <- x - lr ((1 - sum_j w_j) n + sum_j w_j u_j)
              v <- beta_v v + (1 - beta_v) g^2

The gradient is divided by the second moment of the calls *before* it, and then averaged: momenta are in units of
normalised gradients. One momentum of weight 1 is ADOPT (Taniguchi et al. 2024, arXiv:2411.02853, with the clipping of
its second version); weight 0 is clipped RMSProp one step late; several momenta are AggMo on ADOPT.

Differs from the paper in: weight decay shrinks by lr x weight_decay, as torch's AdamW; the authors' code by
(lr / peak lr) x weight_decay, so divide theirs by the peak rate. States are in float32 or better whatever the
parameters are in: with beta_v 0.9999 a second moment in bfloat16 would never change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer


class QHADOPT(Optimizer):
    """The optimizer of the module's equations. The first call changes no parameter; there is no bias correction.

    A momentum starts from zero and reaches its full size in about 1 / (1 - beta) calls, 1,000 for 0.999. Until then
    steps are as short as (1 - sum of weights) of a full one, so warm up the learning rate in that time.

    States of each parameter: "exp_avg_sq" (v), "exp_avg" (u_1), "exp_avg_2" (u_2) and so on, and "step", the calls so
    far. `load_state_dict` is torch's, which rounds them to the parameter's dtype; `TorchEngine` loads them exactly.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: Sequence[float] = (0.999, 0.9999),
        omega: float | Sequence[float] = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        """Nothing is allocated before the first step.

        Args:
            params: as for any torch optimizer; a group may have options of its own.
            lr: learning rate.
            betas: what each momentum keeps in a call, and at last what the second moment keeps.
            omega: the weight of the momentum in a step, or of each; the gradient has the rest. 1 is ADOPT, whose
                published betas are (0.95, 0.9999).
            eps: the least divisor of a gradient.
            weight_decay: share of each parameter that a call takes away, times lr.

        Raises:
            ValueError: for a number out of range or not finite, or weights that do not fit the momenta.
        """
        defaults = {"lr": lr, "betas": betas, "omega": omega, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The constructor calls it for each group.

        Raises:
            ValueError: as the constructor; the group is then not added.
        """
        _check(self.defaults | param_group)
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One call for all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            new: list[Tensor] = []
            old: list[Tensor] = []
            for p in group["params"]:
                if p.grad is not None:
                    (old if self.state[p] else new).append(p)
            if new:
                self._begin(new, len(_weights(group)))
            if old:
                self._move(old, group)
            for p in new + old:
                self.state[p]["step"] += 1
        return loss

    def _begin(self, params: list[Tensor], num_momenta: int) -> None:
        """The first call: the second moment is the squared gradient."""
        for p in params:
            assert p.grad is not None
            if p.grad.is_sparse or p.is_complex():
                raise ValueError(
                    "QHADOPT takes real, dense gradients; train these parameters with torch.optim.SparseAdam"
                )
            wide = torch.promote_types(p.dtype, torch.float32)
            state = self.state[p]
            state["step"] = torch.tensor(0.0, device="cpu")  # as in torch.optim: reading it waits for no device
            for name in _names(num_momenta):
                state[name] = torch.zeros_like(p, dtype=wide, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = p.grad.to(wide).square()

    def _move(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Every later call, in the order of the equations."""
        *betas, beta_v = group["betas"]
        lr, weights, states = group["lr"], _weights(group), [self.state[p] for p in params]
        seconds = [state["exp_avg_sq"] for state in states]
        gradients = [p.grad.to(v.dtype) for p, v in zip(params, seconds, strict=True) if p.grad is not None]
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        divisors = torch._foreach_sqrt(seconds)
        torch._foreach_clamp_min_(divisors, group["eps"])
        normalised = torch._foreach_div(gradients, divisors)
        limits = [float(state["step"]) ** 0.25 for state in states]
        torch._foreach_clamp_min_(normalised, [-limit for limit in limits])
        torch._foreach_clamp_max_(normalised, limits)
        momenta = [[state[name] for state in states] for name in _names(len(betas))]
        for us, beta in zip(momenta, betas, strict=True):
            torch._foreach_lerp_(us, normalised, 1 - beta)
        steps = normalised
        torch._foreach_mul_(steps, 1 - sum(weights))
        for us, weight in zip(momenta, weights, strict=True):
            torch._foreach_add_(steps, us, alpha=weight)
        torch._foreach_add_(params, steps, alpha=-lr)
        torch._foreach_mul_(seconds, beta_v)
        torch._foreach_addcmul_(seconds, gradients, gradients, value=1 - beta_v)


def _names(num_momenta: int) -> list[str]:
    return ["exp_avg", *(f"exp_avg_{j}" for j in range(2, num_momenta + 1))][:num_momenta]


def _weights(group: dict[str, Any]) -> list[float]:
    omega = group["omega"]
    return [float(omega)] if isinstance(omega, int | float) else [float(w) for w in omega]


def _check(group: dict[str, Any]) -> None:
    betas, weights = group["betas"], _weights(group)
    if len(betas) != len(weights) + 1:
        raise ValueError(
            f"QHADOPT(betas={betas}, omega={group['omega']}): betas has one for each momentum and at last that of the "
            f"second moment, so give {len(weights) + 1} of them, or another number of weights"
        )
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"QHADOPT(betas={betas}): each must be at least 0 and below 1")
    if not (all(w >= 0 for w in weights) and sum(weights) <= 1 + 1e-12):
        raise ValueError(
            f"QHADOPT(omega={group['omega']}): each must be at least 0, the sum at most 1; the gradient has the rest"
        )
    lr, eps, weight_decay = group["lr"], group["eps"], group["weight_decay"]
    if not (lr >= 0 and math.isfinite(lr)):
        raise ValueError(f"QHADOPT(lr={lr}): it must be at least 0 and finite")
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"QHADOPT(eps={eps}): it must be above 0 and finite; 1e-6 is usual")
    if not (weight_decay >= 0 and math.isfinite(weight_decay)):
        raise ValueError(f"QHADOPT(weight_decay={weight_decay}): it must be at least 0 and finite; 0 is none")
