"""DiLoCo: many local steps, then one outer step on the mean delta (Douillard et al. 2023, arXiv:2311.08105, Alg. 1).

    every `every` inner steps:
        delta_i = anchor - local_i;   anchor <- outer(anchor, mean_i delta_i);   local_i <- anchor

Inner optimizer state stays with its replica: never averaged, never reset (section 6.1).

Differs from the paper in: the anchor is kept in float32 or better, and delta is measured from the value a replica was
loaded with, so that bfloat16 replicas do not drag the anchor onto the bfloat16 grid; a partial last round is synced at
the end of a run; in place of separate pretraining, `start` steps of data parallel may come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lowcomm.algorithms.anchors import anchor_of, delta
from lowcomm.algorithms.base import Algorithm
from lowcomm.algorithms.overlapped import Groups, GroupsState, average_gradients
from lowcomm.algorithms.participation import DroppedRounds, check_participation, check_weights, factor
from lowcomm.algorithms.qsr import QSR, check_every, round_steps
from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine, Ready
from lowcomm.outer.base import Outer
from lowcomm.outer.nesterov import Nesterov
from lowcomm.reduce import Reducer
from lowcomm.tensors import copy_, mul_


@dataclass
class DiLoCoState:
    """Attributes:
    anchor: parameters at the last round, float32 or better; equal on all replicas.
    outer: state of the outer optimizer; equal on all replicas.
    deltas: what averaging them keeps between rounds.
    gradients: what averaging gradients keeps between the first `start` steps; None when there are none.
    round: rounds so far.
    t: inner steps so far.
    synced_t: the inner step of the last round.
    ends_t: the inner step at which the present round ends.
    """

    anchor: list[Tensor]
    outer: Any
    deltas: GroupsState
    gradients: GroupsState | None
    round: int = 0
    t: int = 0
    synced_t: int = 0
    ends_t: int = 0


@dataclass(frozen=True)
class DiLoCo(Algorithm[DiLoCoState]):
    """Local steps and an outer optimizer.

    Traffic of a round: one all-reduce of the parameters in float32 (less with a compressor), 2 (n - 1) / n x 4 bytes a
    parameter for each of n replicas; that over `every` for each step.

    Attributes:
        every: inner steps a round, H. The paper uses 500; loss rises slowly with it (+2.9 % perplexity at 1,000). A
            `QSR` lets rounds grow as the learning rate falls; how long one is is settled as it begins.
        outer: how the anchor follows the mean delta.
        reducer: how deltas are averaged.
        start: steps of data parallel before local steps begin (post-local SGD, arXiv:1808.07217, for outer SGD(1)).
        weights: how much each replica counts, in rank order, scaled to sum 1 (the paper's non-iid rule takes the
            sizes of their data). None: equally.
        dropped: simulate lost deltas; no gradient of the first `start` steps is.
        overlap: in the last inner step of a round, update parameters while backward computes the gradients of others,
            and send their deltas at once: in groups from the last parameter to the first, by the reducer's
            `bucket_bytes`. Gradients cannot be clipped by their norm then. A compressor's second and later messages
            follow after backward. A partial last round is sent after its last step.
    """

    every: int | QSR = 100
    outer: Outer = Nesterov()
    reducer: Reducer = Reducer()
    start: int = 0
    weights: list[float] | None = None
    dropped: DroppedRounds | None = None
    overlap: bool = False

    def __post_init__(self) -> None:
        check_every(self.every)
        if self.start < 0:
            raise ValueError(f"start is {self.start}; it is a number of steps, at least 0")
        if self.weights is not None:
            check_weights(self.weights)
        check_participation(self.reducer, self.weights, self.dropped)

    def init(self, engine: Engine, comm: Comm) -> DiLoCoState:
        """The anchor is a copy of the parameters."""
        if self.weights is not None and len(self.weights) != len(comm.members):
            raise ValueError(
                f"weights has {len(self.weights)} entries for {len(comm.members)} replicas; give one for each"
            )
        if self.overlap and (reason := engine.needs_all_gradients()) is not None:
            raise ValueError(
                f"DiLoCo(overlap=True) updates parameters while backward goes on, but {reason}, or set overlap to False"
            )
        params = engine.slots()["param"]
        anchor = anchor_of(params)
        gradients = self._gradient_groups().init(params) if self.start > 0 else None
        ends_t = round_steps(self.every, 0, engine.lr())
        return DiLoCoState(anchor, self.outer.init(anchor), self._delta_groups().init(anchor), gradients, ends_t=ends_t)

    def sends_in_backward(self) -> bool:
        """With `overlap`."""
        return self.overlap

    def during_backward(self, t: int, engine: Engine, state: DiLoCoState, comm: Comm) -> Ready | None:
        """With `overlap`, in the last step of a round: update and send each group as soon as its turn has come."""
        if not (self.overlap and self._ends_round(t, state)):
            return None
        mine = self._factor(state, comm, self.dropped)
        if mine is None:
            return None
        params = engine.slots()["param"]

        def updated_delta(group: Sequence[int]) -> list[Tensor]:
            engine.update_part(group)
            return delta(state.anchor, params, mine, group)

        final = self._delta_groups().in_turn(state.anchor, state.deltas, comm, updated_delta)
        return lambda i, gradient: final(i)

    def before_update(self, t: int, engine: Engine, state: DiLoCoState, comm: Comm) -> None:
        """Data parallel up to step `start`."""
        if t <= self.start:
            assert state.gradients is not None
            gradients = engine.slots()["grad"]
            if self.weights is not None:
                share = self._factor(state, comm, None)
                assert share is not None, "where nobody is lost, somebody counts"
                mul_(gradients, share)
            average_gradients(self._gradient_groups(), gradients, state.gradients, comm)

    def after_update(self, t: int, engine: Engine, state: DiLoCoState, comm: Comm) -> None:
        """A round when it is due."""
        state.t = t
        if t <= self.start:
            state.round, state.synced_t = state.round + 1, t
            if t == self.start:
                copy_(state.anchor, engine.slots()["param"])
        elif self._ends_round(t, state):
            self._sync(engine, state, comm, self.dropped)
        if state.synced_t == t:
            state.ends_t = t + round_steps(self.every, t, engine.lr())

    def finish(self, t: int, engine: Engine, state: DiLoCoState, comm: Comm) -> None:
        """Sync a partial last round, which nobody misses, and load the anchor everywhere."""
        if state.t > state.synced_t:
            self._sync(engine, state, comm, None)
        if t > self.start:
            copy_(engine.slots()["param"], state.anchor)

    def num_rounds(self, state: DiLoCoState) -> int:
        """Rounds so far, those of data parallel included."""
        return state.round

    def consensus(self, engine: Engine, state: DiLoCoState) -> list[Tensor]:
        """The anchor; up to step `start` the live parameters."""
        return state.anchor if state.t > self.start or self.start == 0 else engine.slots()["param"]

    def _ends_round(self, t: int, state: DiLoCoState) -> bool:
        return t > self.start and t == state.ends_t

    def _sync(self, engine: Engine, state: DiLoCoState, comm: Comm, dropped: DroppedRounds | None) -> None:
        params = engine.slots()["param"]
        mine = self._factor(state, comm, dropped)
        if mine is not None:
            moved = partial(delta, state.anchor, params, mine)
            mean = self._delta_groups().mean(state.anchor, state.deltas, comm, moved)
            self.outer.apply(state.anchor, mean, state.outer)
        if mine or dropped is None:
            copy_(params, state.anchor)
        state.round, state.synced_t = state.round + 1, state.t

    def _factor(self, state: DiLoCoState, comm: Comm, dropped: DroppedRounds | None) -> float | None:
        """What this replica's delta counts in the next round; None when no replica's does."""
        return factor(state.round + 1, comm.place, len(comm.members), self.weights, dropped)

    def _delta_groups(self) -> Groups:
        return Groups(self.reducer, self.overlap)

    def _gradient_groups(self) -> Groups:
        return Groups(self.reducer, overlap=False)
