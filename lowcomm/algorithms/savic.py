"""Local steps with one diagonal scaling, shared by all replicas and updated only when they sync (SAVIC, Chezhegov et
al. 2024, arXiv:2406.00846).

    each step:                    x_i <- x_i - lr g_i / D-hat
    every `every` steps, after:   x_i <- mean_j x_j
                                  D^2 <- beta D^2 + (1 - beta) H^2,   H = mean_j g_j of that step
                                  D-hat = max(alpha, |D|)

Adam within Local SGD scales differently on every replica. Here all steps of a round have the same scaling.

Differs from the paper in: only the rules of Adam and RMSProp for D; OASIS would need Hessian-vector products, which an
engine does not offer. D starts at zero, D-hat at the inner optimizer's scale. H is measured before clipping.
Differences to the last mean are sent, as in Local SGD.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine
from lowcomm.reduce import Reducer, ReducerState
from lowcomm.rounds.anchors import anchor_of, deltas
from lowcomm.rounds.base import Rounds, RoundsState
from lowcomm.rounds.exchanges import Exchange, Sending
from lowcomm.rounds.qsr import QSR, check_every
from lowcomm.tensors import add_, copy_, mul_, zeros


@dataclass
class SAVICState(RoundsState):
    """Attributes:
    anchor: the last mean of the parameters, float32 or better.
    squares: D^2 without bias correction, float32 or better; equal on all replicas.
    num_scalings: gradients in D^2.
    gradients: the reducer's state for gradients.
    gradient: the mean gradient of the last step of a round, until it is used.
    """

    anchor: list[Tensor]
    squares: list[Tensor]
    gradients: ReducerState
    num_scalings: int = 0
    gradient: list[Tensor] | None = None


@dataclass(frozen=True)
class SAVIC(Rounds[SAVICState]):
    """Local SGD with a shared scaling. The inner optimizer must be `lowcomm.optim.scaled_sgd.ScaledSGD`.

    Traffic of a round: two all-reduces of the parameters' size, for differences and a gradient; twice DiLoCo's.

    Attributes:
        every: inner steps a round.
        alpha: the minimum of D-hat, in units of gradients. It bounds the steps of coordinates with a small H; a
            fraction of the usual gradient size is a good choice.
        beta: decay of D^2 per round; 0 uses the last gradient alone.
        bias_correction: divide D^2 by 1 - beta^r after r rounds (the paper's rule "Adam"); False is RMSProp, whose
            first steps are larger.
        reducer: how differences to the last mean of parameters are averaged.
        gradient_reducer: how gradients are averaged for H. Losing part of a gradient makes steps larger.
    """

    every: int = 16
    alpha: float = 1e-3
    beta: float = 0.999
    bias_correction: bool = True
    reducer: Reducer = Reducer()
    gradient_reducer: Reducer = Reducer()

    def __post_init__(self) -> None:
        if isinstance(self.every, QSR):
            raise ValueError(f"SAVIC(every={self.every}): its rounds have one length; give a number of steps")
        check_every(self.every)
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(
                f"SAVIC(alpha={self.alpha}): gradients are divided by at least this, so it must be positive and "
                "finite; begin with a tenth of their root mean square"
            )
        if not 0 <= self.beta < 1:
            raise ValueError(f"SAVIC(beta={self.beta}): it must be at least 0 and below 1; 0.999 is Adam's")

    def begin(self, engine: Engine, comm: Comm) -> SAVICState:
        """Start from the parameters and D = 0.

        Raises:
            ValueError: when the inner optimizer has no slot "scale".
        """
        slots = engine.slots()
        if "scale" not in slots:
            raise ValueError(
                "SAVIC sets the scaling of the inner optimizer, but this one has no state 'scale': take "
                "lowcomm.optim.scaled_sgd.ScaledSGD (optimizer.path)"
            )
        anchor, squares = anchor_of(slots["param"]), zeros(slots["scale"])
        kept = {"deltas": self.keep(anchor)}
        return SAVICState(anchor, squares, self.gradient_reducer.init(squares), kept=kept)

    def before_update(self, t: int, engine: Engine, state: SAVICState, comm: Comm) -> None:
        """In the last step of a round, average a copy of the gradients; gradients and D-hat stay."""
        if self.is_due(t, state):
            gradients = engine.gradients(range(len(state.squares)))
            gradients = [g.to(s.dtype) for g, s in zip(gradients, state.squares, strict=True)]
            state.gradient, state.gradients = self.gradient_reducer.mean(gradients, state.gradients, comm).result()

    def round(self, t: int, engine: Engine, state: SAVICState, comm: Comm) -> list[Sending]:
        """Differences to the last mean of the parameters."""
        return deltas(self.reducer, state.anchor, engine.slots()["param"])

    def commit(self, t: int, engine: Engine, state: SAVICState, sent: Exchange, means: list[Tensor]) -> None:
        """Load the mean parameters and, except in a partial last round, update D and D-hat."""
        add_(state.anchor, means, alpha=-1.0)
        copy_(engine.slots()["param"], state.anchor)
        if state.gradient is not None:
            mul_(state.squares, self.beta)
            torch._foreach_addcmul_(state.squares, state.gradient, state.gradient, 1 - self.beta)
            state.num_scalings, state.gradient = state.num_scalings + 1, None
            copy_(engine.slots()["scale"], self._scaling(state))

    def enter(self, engine: Engine, state: SAVICState, comm: Comm) -> None:
        """Also resync the reducer of gradients."""
        gradients = self.gradient_reducer.resync(state.gradients, comm).result()
        super().enter(engine, state, comm)
        state.gradients = gradients

    def stands(self, engine: Engine, state: SAVICState) -> list[Tensor]:
        return state.anchor

    def _scaling(self, state: SAVICState) -> list[Tensor]:
        """D-hat, equal on all replicas."""
        weight = 1 - self.beta**state.num_scalings if self.bias_correction else 1.0
        return [(square / weight).sqrt_().clamp_(min=self.alpha) for square in state.squares]
