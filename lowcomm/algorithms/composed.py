"""Methods put together: one after the other, or one within the other.

After(n, DataParallel(), DiLoCo()):   n steps of data parallel, then DiLoCo (post-local SGD, arXiv:1808.07217)
Then(SPARTA(), DiLoCo()):             at each step what SPARTA does, then what DiLoCo does
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    first: the state of the method that comes first.
    then: that of the other, as it begins until its time has come.
    t: steps so far.
    """

    first: Any
    then: Any
    t: int = 0


@dataclass(frozen=True)
class After(Algorithm[AfterState]):
    """One method for some steps, then another to the end.

    The second begins with the parameters and optimizer states that the first leaves, and counts its rounds from there.

    Attributes:
        num_steps: of the first.
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
        """Both begin; the second again when its time has come."""
        return AfterState(self.first.init(engine, comm, t), self.then.init(engine, comm, t), t)

    def sends_in_backward(self) -> bool:
        return self.first.sends_in_backward() or self.then.sends_in_backward()

    def keeps_equal(self) -> bool:
        return self.then.keeps_equal()

    def during_backward(self, t: int, engine: Engine, state: AfterState, comm: Comm) -> Ready | None:
        method, its = self._at(t, state)
        return method.during_backward(t, engine, its, comm)

    def before_update(self, t: int, engine: Engine, state: AfterState, comm: Comm) -> None:
        method, its = self._at(t, state)
        method.before_update(t, engine, its, comm)

    def after_update(self, t: int, engine: Engine, state: AfterState, comm: Comm) -> None:
        """That of whose time it is; after the last step of the first, the other begins."""
        method, its = self._at(t, state)
        method.after_update(t, engine, its, comm)
        state.t = t
        if t == self.num_steps:
            state.then = self.then.init(engine, comm, t)

    def settle(self, state: AfterState) -> None:
        self.first.settle(state.first)
        self.then.settle(state.then)

    def drain(self, t: int, engine: Engine, state: AfterState, comm: Comm) -> None:
        method, its = self._at(t, state)
        method.drain(t, engine, its, comm)

    def complete(self, t: int, engine: Engine, state: AfterState, comm: Comm) -> None:
        method, its = self._at(t, state)
        method.complete(t, engine, its, comm)

    def finish(self, t: int, engine: Engine, state: AfterState, comm: Comm) -> None:
        method, its = self._at(t, state)
        method.finish(t, engine, its, comm)

    def forgo(self, state: AfterState) -> None:
        self.first.forgo(state.first)
        self.then.forgo(state.then)

    def enter(self, engine: Engine, state: AfterState, comm: Comm) -> None:
        self.first.enter(engine, state.first, comm)
        self.then.enter(engine, state.then, comm)

    def num_rounds(self, state: AfterState) -> int:
        return self.first.num_rounds(state.first) + self.then.num_rounds(state.then)

    def consensus(self, engine: Engine, state: AfterState) -> list[Tensor]:
        method, its = self._at(state.t, state)
        return method.consensus(engine, its)

    def _at(self, t: int, state: AfterState) -> tuple[Algorithm[Any], Any]:
        return (self.first, state.first) if t <= self.num_steps else (self.then, state.then)


@dataclass
class ThenState:
    """Attributes:
    first, then: the states of the two methods.
    first_t: the step up to which the first is done: it is not done twice where the other is taken again.
    """

    first: Any
    then: Any
    first_t: int = 0


@dataclass(frozen=True)
class Then(Algorithm[ThenState]):
    """Two methods at once: at each step the second works on what the first leaves, and it ends the run in its way.

    Attributes:
        first: such as SPARTA, which keeps replicas close.
        then: such as DiLoCo, whose deltas are then measured on parameters that the first has moved.
    """

    first: Algorithm = SPARTA()
    then: Algorithm = DiLoCo()

    def __post_init__(self) -> None:
        if self.first.sends_in_backward():
            raise ValueError(f"Then(first={self.first}): only the second may send in backward; set overlap to False")

    def init(self, engine: Engine, comm: Comm, t: int = 0) -> ThenState:
        return ThenState(self.first.init(engine, comm, t), self.then.init(engine, comm, t), t)

    def sends_in_backward(self) -> bool:
        """Where the second does; what it sends there was not treated by the first in that step."""
        return self.then.sends_in_backward()

    def during_backward(self, t: int, engine: Engine, state: ThenState, comm: Comm) -> Ready | None:
        return self.then.during_backward(t, engine, state.then, comm)

    def before_update(self, t: int, engine: Engine, state: ThenState, comm: Comm) -> None:
        self.first.before_update(t, engine, state.first, comm)
        self.then.before_update(t, engine, state.then, comm)

    def after_update(self, t: int, engine: Engine, state: ThenState, comm: Comm) -> None:
        self._once(t, state, lambda: self.first.after_update(t, engine, state.first, comm))
        self.then.after_update(t, engine, state.then, comm)

    def settle(self, state: ThenState) -> None:
        self.first.settle(state.first)
        self.then.settle(state.then)

    def drain(self, t: int, engine: Engine, state: ThenState, comm: Comm) -> None:
        self.first.drain(t, engine, state.first, comm)
        self.then.drain(t, engine, state.then, comm)

    def complete(self, t: int, engine: Engine, state: ThenState, comm: Comm) -> None:
        """What the first has under way is taken in; the second completes its round."""
        self.first.drain(t, engine, state.first, comm)
        self.then.complete(t, engine, state.then, comm)

    def finish(self, t: int, engine: Engine, state: ThenState, comm: Comm) -> None:
        """Complete; the second ends the run."""
        self.first.drain(t, engine, state.first, comm)
        self.then.finish(t, engine, state.then, comm)

    def forgo(self, state: ThenState) -> None:
        self.first.forgo(state.first)
        self.then.forgo(state.then)

    def enter(self, engine: Engine, state: ThenState, comm: Comm) -> None:
        self.first.enter(engine, state.first, comm)
        self.then.enter(engine, state.then, comm)

    def num_rounds(self, state: ThenState) -> int:
        return self.first.num_rounds(state.first) + self.then.num_rounds(state.then)

    def consensus(self, engine: Engine, state: ThenState) -> list[Tensor]:
        return self.then.consensus(engine, state.then)

    def _once(self, t: int, state: ThenState, call: Callable[[], None]) -> None:
        if state.first_t < t:
            call()
            state.first_t = t
