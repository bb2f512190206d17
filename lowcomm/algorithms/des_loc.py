"""DES-LOC: parameters and each optimizer state, averaged at periods of their own (Iacob et al. 2025, arXiv:2505.22549,
Alg. 1).

    every step:                   x_i, s_i <- InnerOpt(x_i, s_i, g_i)
    every `periods["param"]`:     x_i <- Outer(mean_j x_j)
    every `periods[name]`:        s_i[name] <- mean_j s_j[name]

A state that changes slowly may be averaged rarely. Parameters are synced as in DiLoCo; outer SGD(1) averages them.
Equal periods give Local Adam; a period for "param" alone gives Local SGD. Periods count from the step at which the
method begins, which `After` may delay.

An exact reducer sends the state itself, which needs no memory. Any other sends the difference to the last average:
values that the compressor drops then keep that average, whereas a dropped second moment of 0 would make a step as long
as 1 / eps. The first round has no last average and goes uncompressed, except after data parallel, whose last state
serves. Rounding may make an average negative. So the mean of a tensor that is nonnegative on all ranks is clamped at 0;
each rank sends a flag per tensor.

Differs from the paper in: a state is averaged after a step's update, not before it as in the authors' code, so it is
then equal on all replicas. States are found by name; the authors' code sorts and counts them. Averages are in float32
or better. A state that a replica does not have yet (a gradient scaler skips first steps, a parameter gets no gradient)
is averaged over those that have it, and the others begin it on their own: the authors' code knows no such replicas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine
from lowcomm.outer.base import Outer
from lowcomm.outer.sgd import SGD
from lowcomm.reduce import Reducer
from lowcomm.rounds.anchors import anchor_of, delta, deltas
from lowcomm.rounds.base import Rounds, RoundsState
from lowcomm.rounds.exchanges import Exchange, Sending
from lowcomm.tensors import copy_

# The slot of whether a replica has negative values of an optimizer state, by the state's own.
_SIGNS = "signs of "
# The slot of a state itself rather than its difference to the last average; nothing is kept of it.
_FIRST = "first "


@dataclass
class DESLOCState(RoundsState):
    """Attributes:
    anchor: the last average of the parameters, float32 or better; equal on all replicas.
    outer: state of the outer optimizer; equal on all replicas.
    averages: last averages of optimizer states by name, float32 or better; equal on all replicas. Absent before the
        first and with an exact reducer.
    has_negative: by name, whether each tensor has a negative value on any replica; only within a round.
    whole: names of the states that all replicas are known to have for all parameters.
    params_t: the step of the last average of the parameters.
    """

    anchor: list[Tensor]
    outer: Any
    averages: dict[str, list[Tensor]] = field(default_factory=dict)
    has_negative: dict[str, Tensor] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    params_t: int = 0


@dataclass(frozen=True)
class DESLOC(Rounds[DESLOCState]):
    """Periodic averages of parameters and optimizer states.

    Traffic of a step, on average: the sum of 1 / period over all periods, times an all-reduce of the parameters in
    float32, 2 (n - 1) / n x 4 bytes a parameter for each of n replicas. A compressor reduces all but the first round of
    each state. Lossy rounds of a state add 4 bytes in place of a parameter for each tensor.

    Attributes:
        periods: inner steps between averages of "param" and of optimizer states by their torch name, such as "exp_avg".
            A state without a period stays local. The default averages Adam's moments at 3 and 6 times the parameters'
            period, the slower second moment less often, as the paper advises.
        outer: how the anchor follows the mean delta: SGD(1) averages, Nesterov gives DES-LOC-Nesterov.
        reducer: how differences to the last average are averaged; each slot has its own state.
    """

    periods: dict[str, int] = field(default_factory=lambda: {"param": 32, "exp_avg": 96, "exp_avg_sq": 192})
    outer: Outer = SGD(lr=1.0)
    reducer: Reducer = Reducer()

    def __post_init__(self) -> None:
        if "param" not in self.periods:
            raise ValueError(
                f"periods {self.periods} has none for 'param', so the replicas would never meet; add one, such as 32"
            )
        if "grad" in self.periods:
            raise ValueError("periods has one for 'grad'; gradients are not kept between steps: use DataParallel")
        for name, every in self.periods.items():
            if every < 1:
                raise ValueError(
                    f"the period of {name!r} is {every}; it must be at least 1 inner step; leave a state out to keep "
                    "it with its replica"
                )

    @property
    def every(self) -> int:
        """The period of the parameters."""
        return self.periods["param"]

    def init(self, engine: Engine, comm: Comm, t: int = 0) -> DESLOCState:
        """If the states exist and are equal already, they are the first averages."""
        state = super().init(engine, comm, t)
        state.params_t = t
        if t > 0:
            self._check_names(engine)
            slots = engine.slots()
            state.whole = [name for name in sorted(self.periods) if all(_present(name, slots))]
            if not self.reducer.is_exact():
                state.averages = {name: anchor_of(slots[name]) for name in state.whole if name != "param"}
                state.kept |= {name: self.keep(average) for name, average in state.averages.items()}
        return state

    def begin(self, engine: Engine, comm: Comm) -> DESLOCState:
        """Copy the parameters to the anchor; optimizer states exist only after the first update."""
        anchor = anchor_of(engine.slots()["param"])
        return DESLOCState(anchor, self.outer.init(anchor), kept={"param": self.keep(anchor)})

    def is_due(self, t: int, state: DESLOCState) -> bool:
        """Whether anything is averaged after step ``t``."""
        return bool(self._due(t, state))

    def after_update(self, t: int, engine: Engine, state: DESLOCState, comm: Comm) -> None:
        """Average all that is due, concurrently.

        Raises:
            ValueError: after the optimizer's first step, if it lacks a state in `periods`.
        """
        if not state.is_checked:
            self._check_names(engine)
            state.is_checked = engine.has_stepped()
        super().after_update(t, engine, state, comm)

    def reducer_of(self, slot: str) -> Reducer:
        """Sign flags are summed exactly."""
        return Reducer() if slot.startswith(_SIGNS) else self.reducer

    def round(self, t: int, engine: Engine, state: DESLOCState, comm: Comm) -> list[Sending]:
        """What is due: parameter deltas, and optimizer states or their differences to the last average."""
        slots, sendings = engine.slots(), []
        for name in self._due(t, state):
            if name == "param":
                sendings += self._parameters(engine, state)
            elif name not in state.averages:
                if name not in slots:
                    self._check_names(engine)
                present = _present(name, slots)
                tensors = [
                    x if is_there else torch.zeros_like(p)
                    for x, p, is_there in zip(slots.get(name, slots["param"]), slots["param"], present, strict=True)
                ]
                wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
                if name not in state.whole:
                    wide.append(wide[0].new_tensor(present))
                exact = Reducer(bucket_bytes=self.reducer.bucket_bytes)
                sendings.append(Sending(_FIRST + name, exact, wide))
            else:
                signs = [torch.stack([(x < 0).any() for x in slots[name]]).float()]
                sendings.append(Sending(_SIGNS + name, Reducer(), signs))
                moved = partial(delta, state.averages[name], slots[name], -1.0)
                sendings.append(Sending(name, self.reducer, state.averages[name], moved))
        return sendings

    def commit(self, t: int, engine: Engine, state: DESLOCState, sent: Exchange, means: list[Tensor]) -> None:
        """Load the averages; the parameters take an outer step."""
        if sent.slot == "param":
            self.outer.apply(state.anchor, means, state.outer)
            copy_(engine.slots()["param"], state.anchor)
            state.params_t = t
        elif sent.slot.startswith(_FIRST):
            name, slots = sent.slot.removeprefix(_FIRST), engine.slots()
            if name not in state.whole:
                *means, share = means  # of the replicas that have each; of exactly 1 rounding leaves a trace
                share = torch.where(share > 1 - 1e-6, 1.0, share.clamp(min=1e-6))
                means = [x / part for x, part in zip(means, share.unbind(), strict=True)]
                if share.is_meta or bool((share == 1).all()):
                    state.whole.append(name)
            for x, mean, is_there in zip(slots.get(name, means), means, _present(name, slots), strict=True):
                if is_there:
                    x.copy_(mean)
            del state.kept[sent.slot]
            if not self.reducer.is_exact() and name in state.whole:
                state.averages[name], state.kept[name] = means, self.keep(means)
        elif sent.slot.startswith(_SIGNS):
            state.has_negative[sent.slot.removeprefix(_SIGNS)] = means[0]
        else:
            negative, average = state.has_negative.pop(sent.slot), state.averages[sent.slot]
            torch._foreach_add_(average, means)
            for x, has_negative in zip(average, negative.unbind(), strict=True):
                x.copy_(torch.where(has_negative > 0, x, x.clamp(min=0)))
            copy_(engine.slots()[sent.slot], average)

    def rest(self, t: int, engine: Engine, state: DESLOCState, comm: Comm) -> list[Sending] | None:
        """A partial last round of the parameters; optimizer states are no longer needed."""
        return self._parameters(engine, state) if t > state.params_t else None

    def stands(self, engine: Engine, state: DESLOCState) -> list[Tensor]:
        return state.anchor

    def _parameters(self, engine: Engine, state: DESLOCState) -> list[Sending]:
        return deltas(self.reducer, state.anchor, engine.slots()["param"], 1.0, "param")

    def _due(self, t: int, state: DESLOCState) -> list[str]:
        """The names averaged after step ``t``, in the same order on all replicas."""
        return sorted(name for name, every in self.periods.items() if (t - state.begun_t) % every == 0)

    def _check_names(self, engine: Engine) -> None:
        """Before the optimizer's first step nobody knows its states."""
        names = engine.slots().keys()
        missing = sorted(self.periods.keys() - names)
        if missing and engine.has_stepped():
            raise ValueError(
                f"periods names {missing}, but the optimizer's states of every parameter are "
                f"{sorted(names - {'param', 'grad'})}: choose from those, or leave it out and it stays with its replica"
            )


def _present(name: str, slots: Mapping[str, list[Tensor]]) -> list[bool]:
    """Whether each parameter has this state by now."""
    if name not in slots:
        return [False] * len(slots["param"])
    return [x.shape == p.shape for x, p in zip(slots[name], slots["param"], strict=True)]
