"""DES-LOC: parameters and each optimizer state, averaged at periods of their own (Iacob et al. 2025, arXiv:2505.22549,
Alg. 1).

    every step:                   x_i, s_i <- InnerOpt(x_i, s_i, g_i)
    every `periods["param"]`:     x_i <- Outer(mean_j x_j)
    every `periods[name]`:        s_i[name] <- mean_j s_j[name]

A state that forgets slowly may be averaged rarely. Parameters take the rounds of DiLoCo; outer SGD(1) averages them.
With equal periods it is Local Adam; with a period for "param" alone it is Local SGD. Periods count from step `start`;
up to it data parallel keeps parameters and states equal.

What travels of a state: under an exact reducer the state itself, which needs no memory. Under any other the difference
to its last average, for what a compressor leaves out then keeps the value of that average; the state itself would lose
it, and a second moment near 0 makes a step as long as 1 / eps. There is no last average at first, so that round goes
uncompressed; with `start` the last state of data parallel is one. Rounding may still carry an average below 0, where no
second moment can be: a mean of numbers none of which is negative is therefore cut off at 0, and each rank says for each
tensor whether it has a negative one.

Differs from the paper in: a state is averaged after a step's update, not before it, as in the authors' code: after such
a step it is equal on all replicas. States are found by name; the authors' code sorts them and counts. Averages are kept
in float32 or better.
"""

from __future__ import annotations

from collections.abc import Collection, Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowcomm.algorithms.anchors import anchor_of
from lowcomm.algorithms.base import Algorithm
from lowcomm.algorithms.diloco import DiLoCo, DiLoCoState
from lowcomm.comm.base import Comm, Task, Work
from lowcomm.compress.identity import Identity
from lowcomm.engine.base import Engine
from lowcomm.feedback.none import NoFeedback
from lowcomm.outer.base import Outer
from lowcomm.outer.sgd import SGD
from lowcomm.reduce import Reducer, ReducerState
from lowcomm.tensors import copy_


@dataclass
class Averaged:
    """One optimizer state after its first average.

    Attributes:
        anchor: its last average, float32 or better; equal on all replicas.
        reducer: what averaging the differences to it keeps between rounds.
    """

    anchor: list[Tensor]
    reducer: ReducerState


@dataclass
class DESLOCState:
    """Attributes:
    params: the rounds of the parameters.
    averaged: optimizer states by name, each from its first average or the last step of data parallel on; none where the
        reducer is exact.
    round: steps so far after which something was averaged.
    """

    params: DiLoCoState
    averaged: dict[str, Averaged] = field(default_factory=dict)
    round: int = 0


@dataclass(frozen=True)
class DESLOC(Algorithm[DESLOCState]):
    """Periodic averages of parameters and optimizer states.

    Traffic of a step, on average: the sum of 1 / period over all periods, times an all-reduce of the parameters in
    float32 (less with a compressor, but for the first round of each state), 2 (n - 1) / n x 4 bytes a parameter for
    each of n replicas. Lossy rounds of a state add 4 bytes in place of a parameter for each tensor.

    Attributes:
        periods: inner steps between averages: of "param", and of each optimizer state by its name in torch, such as
            "exp_avg". A state without a period stays with its replica. By default those of Adam at 3 and 6 times the
            parameters' period, as the paper advises for its second moment that forgets slowly.
        outer: how the parameters follow their mean delta: SGD(1) averages, Nesterov is DES-LOC-Nesterov.
        reducer: how differences to the last average are averaged, each of its own; with `start` gradients too.
        start: steps of data parallel first; 2,048 in the paper's runs of 700M parameters with outer Nesterov.
    """

    periods: dict[str, int] = field(default_factory=lambda: {"param": 32, "exp_avg": 96, "exp_avg_sq": 192})
    outer: Outer = SGD(lr=1.0)
    reducer: Reducer = Reducer()
    start: int = 0

    def __post_init__(self) -> None:
        if self.start < 0:
            raise ValueError(f"start is {self.start}; it is a number of steps, at least 0")
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

    def init(self, engine: Engine, comm: Comm) -> DESLOCState:
        """The anchor of the parameters; optimizer states are there only after the first update."""
        return DESLOCState(self._params().init(engine, comm))

    def before_update(self, t: int, engine: Engine, state: DESLOCState, comm: Comm) -> None:
        """Data parallel up to step `start`."""
        self._params().before_update(t, engine, state.params, comm)

    def after_update(self, t: int, engine: Engine, state: DESLOCState, comm: Comm) -> None:
        """Average what is due; all that is due is under way at once.

        Raises:
            ValueError: after the first step, when the optimizer lacks a state that has a period.
        """
        due = self._due(t)
        slots = engine.slots() if t in (1, self.start) or due else {}
        if t == 1:
            self._check_names(slots)
        tasks = {
            name: Task(self._average(slots[name], state.averaged.get(name), comm)) for name in due if name != "param"
        }
        self._params().after_update(t, engine, state.params, comm)
        for name, task in tasks.items():
            averaged = task.result()
            copy_(slots[name], averaged.anchor)
            if not self._is_exact():
                state.averaged[name] = averaged
        if t == self.start and not self._is_exact():
            anchors = {name: anchor_of(slots[name]) for name in self.periods if name != "param"}
            state.averaged = {name: Averaged(anchor, self.reducer.init(anchor)) for name, anchor in anchors.items()}
        state.round += 1 if due or t <= self.start else 0

    def finish(self, t: int, engine: Engine, state: DESLOCState, comm: Comm) -> None:
        """Sync a partial last round of the parameters; optimizer states are not needed any more."""
        before = state.params.round
        self._params().finish(t, engine, state.params, comm)
        state.round += state.params.round - before

    def num_rounds(self, state: DESLOCState) -> int:
        """Steps so far after which something was averaged."""
        return state.round

    def consensus(self, engine: Engine, state: DESLOCState) -> list[Tensor]:
        """The parameters' anchor."""
        return self._params().consensus(engine, state.params)

    def _due(self, t: int) -> list[str]:
        """What is averaged after step ``t``, in one order on all replicas."""
        return sorted(name for name, every in self.periods.items() if t > self.start and (t - self.start) % every == 0)

    def _params(self) -> DiLoCo:
        return DiLoCo(self.periods["param"], self.outer, self.reducer, self.start)

    def _is_exact(self) -> bool:
        return isinstance(self.reducer.compressor, Identity) and isinstance(self.reducer.feedback, NoFeedback)

    def _check_names(self, names: Collection[str]) -> None:
        missing = sorted(self.periods.keys() - set(names))
        if missing:
            raise ValueError(
                f"periods names {missing}, but the optimizer's states of every parameter are "
                f"{sorted(set(names) - {'param', 'grad'})}: choose from those, or leave it out and it stays with its "
                "replica"
            )

    def _average(self, xs: list[Tensor], averaged: Averaged | None, comm: Comm) -> Generator[Work[Any], Any, Averaged]:
        """The mean of ``xs`` over replicas as the new anchor."""
        wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in xs]
        if averaged is None:
            exact = Reducer(bucket_bytes=self.reducer.bucket_bytes)
            means, _ = yield from exact.mean(wide, exact.init(wide), comm).steps()
            return Averaged(means, self.reducer.init(means))
        negative = comm.all_sum(torch.stack([(x < 0).any() for x in xs]).float())
        # from what this replica was loaded with, not the anchor: no step taken must mean no difference
        loaded = [a.to(x.dtype).to(a.dtype) for a, x in zip(averaged.anchor, xs, strict=True)]
        task = self.reducer.mean(torch._foreach_sub(wide, loaded), averaged.reducer, comm)
        has_negative = (yield negative).unbind()
        moved, reducer = yield from task.steps()
        anchor = torch._foreach_add(averaged.anchor, moved)
        cut = [torch.where(n > 0, a, a.clamp(min=0)) for n, a in zip(has_negative, anchor, strict=True)]
        return Averaged(cut, reducer)
