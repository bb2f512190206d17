"""DeMo: each replica keeps its momentum and sends its largest DCT coefficients (Peng et al. 2024, arXiv:2411.19870).

    every step, with gradient g_i and learning rate lr:
        m_i <- decay m_i + lr g_i;   q_i = the largest cosine coefficients of m_i;   m_i <- m_i - q_i
        x <- (1 - lr weight_decay) x - lr sign(combined q)

This is error feedback with a decay on lr g: m is the error of `EF14`, and q what `DCT(TopK())` sends of it. The step is
plain SGD on the sign, for which coupled weight decay is decoupled: x - lr (sign + w x) = (1 - lr w) x - lr sign.

Differs from the paper in: m is in float32 or better. Tiles need not divide a matrix: some are shorter by one. Where
sides are not multiples of 64, and in vectors, the 32 largest are taken of each 4,096 coefficients in tile order (of
vectors the paper keeps 32 of at most 64). Indices take 9 bits each and values are bfloat16; their rounding error stays
in m. Ranks are decoded in order, so sums do not depend on timing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowcomm.codecs.half import Half
from lowcomm.comm.base import Comm
from lowcomm.compress.dct import DCT
from lowcomm.compress.top_k import TopK
from lowcomm.engine.base import Engine
from lowcomm.feedback.ef14 import EF14
from lowcomm.reduce import Reducer
from lowcomm.rounds.base import GradientRounds, GradientsState
from lowcomm.rounds.exchanges import Exchange, Sending
from lowcomm.tensors import copy_, zeros


@dataclass(frozen=True)
class DeMo(GradientRounds):
    """Decoupled momentum: a small message at every step, then an update by its sign.

    Traffic of a round: a message from each of n replicas to the n - 1 others; by default of 100 bytes for each 4,096
    parameters, 32 values of 16 bits and 32 indices of 9: 1.22 % of a bfloat16 gradient.

    The inner optimizer must be plain ``torch.optim.SGD(lr, weight_decay=...)``. One with per-parameter state is
    refused, at the latest after the first step; so is clipping, which would shrink the signs.

    Attributes:
        reducer: how lr x gradient is combined; the sign of the result replaces the gradient. The feedback's `decay` is
            that of the momentum. `TopK(divide_by="present")` averages each coefficient over the ranks that sent it, as
            the authors' program does. Reducer() gives signSGD on the mean gradient.
    """

    reducer: Reducer = Reducer(
        DCT(TopK(num=32, chunk=4096, values=Half(), divide_by="present"), tile=64), EF14(decay=0.999)
    )

    def begin(self, engine: Engine, comm: Comm) -> GradientsState:
        """The momentum starts at zero; it is the reducer's error, and differs between replicas.

        Raises:
            ValueError: when the engine's update needs all gradients (clipping), or the inner optimizer has state.
        """
        if (reason := engine.needs_all_gradients()) is not None:
            raise ValueError(f"DeMo takes a step of size lr by the sign of each value, but {reason}")
        _require_no_state(engine)
        return GradientsState(kept={"momentum": self.keep(engine.slots()["param"])})

    def round(self, t: int, engine: Engine, state: GradientsState, comm: Comm) -> list[Sending]:
        """lr x gradient."""

        def values(places: Sequence[int]) -> list[Tensor]:
            lr, wide = engine.lr(), [_wide(g) for g in engine.gradients(places)]
            return list(torch._foreach_mul(wide, lr)) if lr else zeros(wide)

        return [Sending("momentum", self.reducer, engine.slots()["param"], values)]

    def commit(self, t: int, engine: Engine, state: GradientsState, sent: Exchange, means: list[Tensor]) -> None:
        """Replace the gradients by the sign of the result."""
        copy_(engine.slots()["grad"], torch._foreach_sign(means))

    def after_update(self, t: int, engine: Engine, state: GradientsState, comm: Comm) -> None:
        """Check the optimizer; sends nothing.

        Raises:
            ValueError: at the optimizer's first step, when it keeps state.
        """
        if not state.is_checked:
            _require_no_state(engine)
            state.is_checked = engine.has_stepped()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _require_no_state(engine: Engine) -> None:
    # slots have only what all parameters keep, in their own shapes; what is saved for a restart has the rest
    kept = set(engine.slots()) - {"param", "grad"} | _kept(engine.state_dict())
    if kept:
        raise ValueError(
            f"DeMo keeps the momentum itself and steps by its sign, but the inner optimizer keeps {sorted(kept)}: "
            "choose torch.optim.SGD with lr and weight_decay alone"
        )


def _kept(saved: Any) -> set[str]:
    """Names of the per-parameter optimizer states found anywhere in ``saved``."""
    if not isinstance(saved, Mapping):
        return set()
    if {"state", "param_groups"} <= saved.keys():
        states = [state for state in saved["state"].values() if isinstance(state, Mapping)]
        return {str(name) for state in states for name, value in state.items() if value is not None}
    return set().union(*(_kept(part) for part in saved.values()))
