"""A world of ranks without a network: the simulator's, in which nothing takes time and sums are in rank order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from lowcomm.comm.base import Call, Comm, Work
from lowcomm.sim.wire.clock import Clock
from lowcomm.sim.wire.comm import World

T = TypeVar("T")


def run_world(num_ranks: int, program: Callable[[Comm], T]) -> list[T]:
    """Run ``program(comm)`` on every rank; the results in rank order, or the first error."""
    clock = Clock()
    world = World(clock)
    for rank in range(num_ranks):
        clock.spawn(rank, partial(program, world.comm(rank, range(num_ranks))))
    return clock.run()


class Passing(Comm):
    """Passes every call on to another Comm: for one that watches them, or refuses some."""

    def __init__(self, inner: Comm) -> None:
        self.inner, self.rank, self.members = inner, inner.rank, inner.members

    def issue(self, call: Call) -> Work[Any]:
        return self.inner.issue(call)

    def sub(self, members: Sequence[int]) -> Comm:
        return type(self)(self.inner.sub(members))

    def now(self) -> float:
        return self.inner.now()
