"""Local steps in one metric: a diagonal scaling that all replicas share and that changes only when they meet (SAVIC,
Chezhegov et al. 2024, arXiv:2406.00846).

    each step:                    x_i <- x_i - lr g_i / D-hat
    every `every` steps, after:   x_i <- mean_j x_j
                                  D^2 <- beta D^2 + (1 - beta) H^2,   H = mean_j g_j of that step
                                  D-hat = max(alpha, |D|)

Adam within Local SGD gives every replica a metric of its own, and the mean of their parameters belongs to none. Here
all steps of a round are taken in the same one.

Differs from the paper in: of its rules for D those of Adam and RMSProp; OASIS would need Hessian-vector products of the
loss, which an engine does not offer. D starts at zero and D-hat at what the inner optimizer was given; H is measured
before gradients are clipped. What travels is the difference to the last mean, as in Local SGD.
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
    squares: D^2 without the correction of its start at zero, float32 or better; equal on all replicas.
    num_scalings: gradients that D^2 holds.
    gradients: what averaging gradients keeps between rounds.
    gradient: the mean gradient of the step that ends a round, until the round ends.
    """

    anchor: list[Tensor]
    squares: list[Tensor]
    gradients: ReducerState
    num_scalings: int = 0
    gradient: list[Tensor] | None = None


@dataclass(frozen=True)
class SAVIC(Rounds[SAVICState]):
    """Local SGD with one scaling for all. The inner optimizer is `lowcomm.optim.scaled_sgd.ScaledSGD`.

    Traffic of a round: two all-reduces of the parameters' size, their differences and a gradient; twice DiLoCo's.

    Attributes:
        every: inner steps a round.
        alpha: the least D-hat, in the units of gradients. A coordinate whose H happened to be small would otherwise
            take steps without bound until the next round; a share of the gradients' usual size is a good choice.
        beta: share of D^2 that survives a round. With 0 the scaling is that of the last gradient alone.
        bias_correction: divide D^2 by 1 - beta^r after r rounds, as Adam does for its start at zero (the paper's rule
            "Adam"); False is RMSProp, whose steps are larger at first.
        reducer: how differences to the last mean of parameters are averaged.
        gradient_reducer: how gradients are averaged for H. What it loses of a gradient makes steps larger.
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
        """The last mean is the first parameters, and nothing is known of gradients.

        Raises:
            ValueError: when the inner optimizer has no scaling that could be set.
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
        """In the last step of a round: the mean gradient. The gradients themselves stay, and so does D-hat."""
        if self.is_due(t, state):
            gradients = [g.to(s.dtype) for g, s in zip(engine.slots()["grad"], state.squares, strict=True)]
            state.gradient, state.gradients = self.gradient_reducer.mean(gradients, state.gradients, comm).result()

    def round(self, t: int, engine: Engine, state: SAVICState, comm: Comm) -> list[Sending]:
        """Differences to the last mean of the parameters."""
        return deltas(self.reducer, state.anchor, engine.slots()["param"])

    def commit(self, t: int, engine: Engine, state: SAVICState, sent: Exchange, means: list[Tensor]) -> None:
        """The mean of the parameters and, but for a partial last round, D and D-hat from the mean gradient."""
        add_(state.anchor, means, alpha=-1.0)
        copy_(engine.slots()["param"], state.anchor)
        if state.gradient is not None:
            mul_(state.squares, self.beta)
            torch._foreach_addcmul_(state.squares, state.gradient, state.gradient, 1 - self.beta)
            state.num_scalings, state.gradient = state.num_scalings + 1, None
            copy_(engine.slots()["scale"], self._scaling(state))

    def enter(self, engine: Engine, state: SAVICState, comm: Comm) -> None:
        """What averaging gradients shares, too."""
        gradients = self.gradient_reducer.resync(state.gradients, comm).result()
        super().enter(engine, state, comm)
        state.gradients = gradients

    def stands(self, engine: Engine, state: SAVICState) -> list[Tensor]:
        """The last mean."""
        return state.anchor

    def _scaling(self, state: SAVICState) -> list[Tensor]:
        """D-hat, a function of what is equal everywhere."""
        weight = 1 - self.beta**state.num_scalings if self.bias_correction else 1.0
        return [(square / weight).sqrt_().clamp_(min=self.alpha) for square in state.squares]
