"""DiLoCo: many local steps, then one outer step on the mean delta (Douillard et al. 2023, arXiv:2311.08105, Alg. 1).

    every `every` inner steps:
        delta_i = anchor - local_i;   anchor <- outer(anchor, mean_i delta_i);   local_i <- anchor

Inner optimizer state stays with its replica: never averaged, never reset (section 6.1).

Differs from the paper in: the anchor is kept in float32 or better, and delta is measured from the value a replica was
loaded with, so that bfloat16 replicas do not drag the anchor onto the bfloat16 grid; a partial last round is synced at
the end of a run; in place of separate pretraining, `start` steps of data parallel may come first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowcomm.algorithms.base import Algorithm
from lowcomm.algorithms.data_parallel import average_gradients
from lowcomm.algorithms.participation import DroppedRounds, check_weights, factors
from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine
from lowcomm.outer.base import Outer
from lowcomm.outer.nesterov import Nesterov
from lowcomm.reduce import Reducer, ReducerState


@dataclass
class DiLoCoState:
    """Attributes:
    anchor: parameters at the last round, float32 or better; equal on all replicas.
    outer: state of the outer optimizer; equal on all replicas.
    reducer: what averaging deltas keeps between rounds.
    gradients: what averaging gradients keeps between the first `start` steps; None when there are none.
    round: rounds so far.
    t: inner steps so far.
    synced_t: the inner step of the last round.
    """

    anchor: list[Tensor]
    outer: Any
    reducer: ReducerState
    gradients: ReducerState | None
    round: int = 0
    t: int = 0
    synced_t: int = 0


@dataclass(frozen=True)
class DiLoCo(Algorithm[DiLoCoState]):
    """Local steps and an outer optimizer.

    Traffic of a round: one all-reduce of the parameters in float32 (less with a compressor), 2 (n - 1) / n x 4 bytes a
    parameter for each of n replicas; that over `every` for each step.

    Attributes:
        every: inner steps a round, H. The paper uses 500; loss rises slowly with it (+2.9 % perplexity at 1,000).
        outer: how the anchor follows the mean delta.
        reducer: how deltas are averaged.
        start: steps of data parallel before local steps begin (post-local SGD, arXiv:1808.07217, for outer SGD(1)).
        weights: how much each replica counts, in rank order, scaled to sum 1 (the paper's non-iid rule takes the
            sizes of their data). None: equally.
        dropped: simulate lost deltas.
    """

    every: int = 100
    outer: Outer = Nesterov()
    reducer: Reducer = Reducer()
    start: int = 0
    weights: list[float] | None = None
    dropped: DroppedRounds | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every is {self.every}; a round needs at least 1 inner step")
        if self.start < 0:
            raise ValueError(f"start is {self.start}; it is a number of steps, at least 0")
        if self.weights is not None:
            check_weights(self.weights)

    def init(self, engine: Engine, comm: Comm) -> DiLoCoState:
        """The anchor is a copy of the parameters."""
        if self.weights is not None and len(self.weights) != len(comm.members):
            raise ValueError(
                f"weights has {len(self.weights)} entries for {len(comm.members)} replicas; give one for each"
            )
        params = engine.slots()["param"]
        anchor = [x.detach().to(_wide(x.dtype), copy=True) for x in params]
        gradients = self.reducer.init(params) if self.start > 0 else None
        return DiLoCoState(anchor, self.outer.init(anchor), self.reducer.init(anchor), gradients)

    def before_update(self, t: int, engine: Engine, state: DiLoCoState, comm: Comm) -> None:
        """Data parallel up to step `start`."""
        if t <= self.start:
            assert state.gradients is not None
            state.gradients = average_gradients(self.reducer, engine, state.gradients, comm)

    def after_update(self, t: int, engine: Engine, state: DiLoCoState, comm: Comm) -> None:
        """A round when it is due."""
        state.t = t
        if t <= self.start:
            state.round, state.synced_t = state.round + 1, t
            if t == self.start:
                torch._foreach_copy_(state.anchor, engine.slots()["param"])
        elif (t - self.start) % self.every == 0:
            self._sync(engine, state, comm, self.dropped)

    def finish(self, t: int, engine: Engine, state: DiLoCoState, comm: Comm) -> None:
        """Sync a partial last round, which nobody misses, and load the anchor everywhere."""
        if state.t > state.synced_t:
            self._sync(engine, state, comm, None)
        if t > self.start:
            torch._foreach_copy_(engine.slots()["param"], state.anchor)

    def num_rounds(self, state: DiLoCoState) -> int:
        """Rounds so far, those of data parallel included."""
        return state.round

    def consensus(self, engine: Engine, state: DiLoCoState) -> list[Tensor]:
        """The anchor; up to step `start` the live parameters."""
        return state.anchor if state.t > self.start or self.start == 0 else engine.slots()["param"]

    def _sync(self, engine: Engine, state: DiLoCoState, comm: Comm, dropped: DroppedRounds | None) -> None:
        params = engine.slots()["param"]
        scale = factors(state.round + 1, len(comm.members), self.weights, dropped)
        mine = scale[comm.members.index(comm.rank)]
        if any(scale):
            # anchor.to(dtype) is the value this replica was loaded with: no step taken must mean no delta.
            loaded = [a.to(p.dtype) for a, p in zip(state.anchor, params, strict=True)]
            delta = [old.to(a.dtype, copy=True) for old, a in zip(loaded, state.anchor, strict=True)]
            for x, p in zip(delta, params, strict=True):
                x.sub_(p).mul_(mine)
            mean, state.reducer = self.reducer.mean(delta, state.reducer, comm).result()
            self.outer.apply(state.anchor, mean, state.outer)
        if mine > 0 or dropped is None:
            torch._foreach_copy_(params, state.anchor)
        state.round, state.synced_t = state.round + 1, state.t


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
