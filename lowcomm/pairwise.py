"""A group that communicates in pairs: no collectives, and no process group to set up.

For small groups that change every round. Each member sends everything to every other: as many bytes as an all-reduce
for two members, n / 2 times as many for n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lowcomm.comm.base import Call, Comm, Work

T = TypeVar("T")


class Pairwise(Comm):
    """Some members of another Comm, which use only `Comm.exchange`, and `Comm.send` for broadcasts.

    All swaps of a call run concurrently. Sums are in members' order, so results are bitwise equal. A group of one sends
    nothing.
    """

    def __init__(self, inner: Comm, members: Sequence[int]) -> None:
        if not {inner.rank} <= set(members) <= set(inner.members):
            raise ValueError(
                f"members {tuple(members)} must hold this rank, {inner.rank}, and be among {inner.members}"
            )
        self.rank, self.members = inner.rank, tuple(sorted(members))
        self._inner = inner

    def issue(self, call: Call) -> Work[Any]:
        """A receive must name its source, as ranks outside of the group could send first."""
        x, peer = call.x, call.peer
        if call.kind == "all_sum":
            return _Then(self._swaps([x] * len(self.members)), _added)
        if call.kind == "all_gather":
            return _Then(self._swaps([x] * len(self.members)), torch.stack)
        if call.kind == "all_to_all":
            return _Then(self._swaps(list(x)), torch.stack)
        if call.kind == "broadcast":
            if peer != self.rank:
                return _Then([self._inner.recv(x, peer)], lambda came: came[0][1])
            sent = [self._inner.send(x, to) for to in self.members if to != self.rank]
            copy = x.detach().clone()
            return _Then(sent, lambda _: copy)
        if call.kind == "recv" and peer is None:
            raise ValueError("recv(source=None) in a group of pairs could take an outsider's message; name the source")
        return self._inner.issue(call)

    def sub(self, members: Sequence[int]) -> Comm:
        if not set(members) <= set(self.members):
            raise ValueError(f"members {tuple(members)} are not all among {self.members}")
        return Pairwise(self._inner, members)

    def now(self) -> float:
        return self._inner.now()

    def _swaps(self, xs: Sequence[Tensor]) -> list[Work[Tensor]]:
        """Swap with every member the tensor meant for it."""
        return [self._inner.exchange(x, peer) for x, peer in zip(xs, self.members, strict=True)]


class _Then(Generic[T]):
    """Several works, and the function of their results."""

    def __init__(self, works: Sequence[Work[Any]], make: Callable[[list[Any]], T]) -> None:
        self._works, self._make = works, make

    def wait(self) -> T:
        return self._make([work.wait() for work in self._works])


def _added(xs: list[Tensor]) -> Tensor:
    total = xs[0]
    for x in xs[1:]:
        total = total + x
    return total
