"""Combinations of two methods: one after the other, or both at every step.

After(n, DataParallel(), DiLoCo()):   n steps of data parallel, then DiLoCo (post-local SGD, arXiv:1808.07217)
Then(SPARTA(), DiLoCo()):             at each step what SPARTA does, then what DiLoCo does
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from lowcomm.algorithms.base import Algorithm
from lowcomm.algorithms.data_parallel import DataParallel
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.sparta import SPARTA
from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine, Ready


@dataclass
class AfterState:
    """Attributes:
    first: the state of the first method.
    then: the state of the second, initialised again at the switch.
    t: steps so far.
    """

    first: Any
    then: Any
    t: int = 0


class _States(Protocol):
    first: Any
    then: Any


S = TypeVar("S", bound=_States)


class _Two(Algorithm[S], ABC):
    """What two methods do alike, whichever's turn it is.

    Attributes:
        first, then: the methods; the state has a state of each by the same name.
    """

    first: Algorithm
    then: Algorithm

    def settle(self, state: S) -> None:
        self.first.settle(state.first)
        self.then.settle(state.then)

    def forgo(self, state: S) -> None:
        self.first.forgo(state.first)
        self.then.forgo(state.then)

    def enter(self, engine: Engine, state: S, comm: Comm) -> None:
        self.first.enter(engine, state.first, comm)
        self.then.enter(engine, state.then, comm)

    def ends_apart(self) -> bool:
        return self.then.ends_apart()

    def num_rounds(self, state: S) -> int:
        return self.first.num_rounds(state.first) + self.then.num_rounds(state.then)


@dataclass(frozen=True)
class After(_Two[AfterState]):
    """One method for `num_steps` steps, then another.

    The second continues with the first's parameters and optimizer states, and counts rounds from there.

    Attributes:
        num_steps: steps of the first.
        first: a method that keeps replicas equal at every step: data parallel, or DeMo.
        then: any method.
    """

    num_steps: int = 100
    first: Algorithm = DataParallel()
    then: Algorithm = DiLoCo()

    def __post_init__(self) -> None:
        if self.num_steps < 0:
            raise ValueError(f"After(num_steps={self.num_steps}): it is a number of steps, at least 0")
        if not self.first.keeps_equal():
            raise ValueError(
                f"After(first={self.first}): replicas must be equal at every step where they go on with another "
                "method; take DataParallel, or DeMo"
            )

    def init(self, engine: Engine, comm: Comm, t: int = 0) -> AfterState:
        """Initialise both; the second again at the switch."""
        return AfterState(self.first.init(engine, comm, t), self.then.init(engine, comm, t), t)

    def sends_in_backward(self) -> bool:
        return self.first.sends_in_backward() or self.then.sends_in_backward()

    def keeps_equal(self) -> bool:
        return self.then.keeps_equal()

    def loads(self, t: int, state: AfterState) -> bool:
        method, its = self._at(t, state)
        return method.loads(t, its)

    def during_backward(self, t: int, engine: Engine, state: AfterState, comm: Comm) -> Ready | None:
        method, its = self._at(t, state)
        return method.during_backward(t, engine, its, comm)

    def before_update(self, t: int, engine: Engine, state: AfterState, comm: Comm) -> None:
        method, its = self._at(t, state)
        method.before_update(t, engine, its, comm)

    def after_update(self, t: int, engine: Engine, state: AfterState, comm: Comm) -> None:
        """Call the current method; after the first's last step, drain it and initialise the second."""
        method, its = self._at(t, state)
        if state.t < t:
            method.after_update(t, engine, its, comm)
            state.t = t
        if t == self.num_steps:
            method.drain(t, engine, its, comm)
            state.then = self.then.init(engine, comm, t)

    def drain(self, t: int, engine: Engine, state: AfterState, comm: Comm) -> None:
        method, its = self._at(t, state)
        method.drain(t, engine, its, comm)

    def complete(self, t: int, engine: Engine, state: AfterState, comm: Comm) -> None:
        method, its = self._at(t, state)
        method.complete(t, engine, its, comm)

    def finish(self, t: int, engine: Engine, state: AfterState, comm: Comm) -> None:
        method, its = self._at(t, state)
        method.finish(t, engine, its, comm)

    def consensus(self, engine: Engine, state: AfterState) -> list[Tensor]:
        method, its = self._at(state.t, state)
        return method.consensus(engine, its)

    def _at(self, t: int, state: AfterState) -> tuple[Algorithm[Any], Any]:
        return (self.first, state.first) if t <= self.num_steps else (self.then, state.then)


@dataclass
class ThenState:
    """Attributes:
    first, then: the states of the two methods.
    first_t: the last step whose `after_update` the first has done, so that a retry of the second does not repeat
        it.
    """

    first: Any
    then: Any
    first_t: int = 0


@dataclass(frozen=True)
class Then(_Two[ThenState]):
    """Two methods at every step: the second works on the result of the first, and ends the run.

    Before the second sets parameters, what the first has under way is waited for and applied: it corrects differences
    between replicas that are gone afterwards, and would part them again.

    Attributes:
        first: such as SPARTA, which keeps replicas close.
        then: such as DiLoCo, whose deltas then include the changes made by the first.
    """

    first: Algorithm = SPARTA()
    then: Algorithm = DiLoCo()

    def __post_init__(self) -> None:
        if self.first.sends_in_backward():
            raise ValueError(f"Then(first={self.first}): only the second may send in backward; set overlap to False")

    def init(self, engine: Engine, comm: Comm, t: int = 0) -> ThenState:
        return ThenState(self.first.init(engine, comm, t), self.then.init(engine, comm, t), t)

    def sends_in_backward(self) -> bool:
        """Only the second may; what it sends in backward has not been changed by the first in that step."""
        return self.then.sends_in_backward()

    def loads(self, t: int, state: ThenState) -> bool:
        return self.first.loads(t, state.first) or self.then.loads(t, state.then)

    def during_backward(self, t: int, engine: Engine, state: ThenState, comm: Comm) -> Ready | None:
        return self.then.during_backward(t, engine, state.then, comm)

    def before_update(self, t: int, engine: Engine, state: ThenState, comm: Comm) -> None:
        self.first.before_update(t, engine, state.first, comm)
        self.then.before_update(t, engine, state.then, comm)

    def after_update(self, t: int, engine: Engine, state: ThenState, comm: Comm) -> None:
        if state.first_t < t:
            self.first.after_update(t, engine, state.first, comm)
            state.first_t = t
        if self.then.loads(t, state.then):
            self.first.drain(t, engine, state.first, comm)
        self.then.after_update(t, engine, state.then, comm)

    def drain(self, t: int, engine: Engine, state: ThenState, comm: Comm) -> None:
        self.first.drain(t, engine, state.first, comm)
        self.then.drain(t, engine, state.then, comm)

    def complete(self, t: int, engine: Engine, state: ThenState, comm: Comm) -> None:
        """Drain the first, complete the second."""
        self.first.drain(t, engine, state.first, comm)
        self.then.complete(t, engine, state.then, comm)

    def finish(self, t: int, engine: Engine, state: ThenState, comm: Comm) -> None:
        """Drain the first, finish the second."""
        self.first.drain(t, engine, state.first, comm)
        self.then.finish(t, engine, state.then, comm)

    def consensus(self, engine: Engine, state: ThenState) -> list[Tensor]:
        return self.then.consensus(engine, state.then)
