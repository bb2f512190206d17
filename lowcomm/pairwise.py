"""A group whose exchanges are made of swaps between two ranks each: no collective, and no process group to set up.

For groups that change from round to round, of few members: each sends all that it has to every other, which for two
members is as little as an all-reduce needs, and for n of them n / 2 times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lowcomm.comm.base import Comm, Done, Work, check_rows, check_summable

T = TypeVar("T")


class Pairwise(Comm):
    """Some members of another Comm, who talk by `Comm.exchange` alone; broadcasts take `Comm.send`.

    All swaps of a call are under way at once when it returns. Sums are in members' order, so that all members get the
    same bits. A group of one sends nothing.
    """

    def __init__(self, inner: Comm, members: Sequence[int]) -> None:
        if not {inner.rank} <= set(members) <= set(inner.members):
            raise ValueError(
                f"members {tuple(members)} must hold this rank, {inner.rank}, and be among {inner.members}"
            )
        self.rank, self.members = inner.rank, tuple(sorted(members))
        self._inner = inner

    def all_sum(self, x: Tensor) -> Work[Tensor]:
        """See `Comm.all_sum`."""
        check_summable(x)
        return _Then(self._swaps([x] * len(self.members)), _added)

    def all_gather(self, x: Tensor) -> Work[Tensor]:
        """See `Comm.all_gather`."""
        return _Then(self._swaps([x] * len(self.members)), torch.stack)

    def all_to_all(self, x: Tensor) -> Work[Tensor]:
        """See `Comm.all_to_all`."""
        check_rows(x, len(self.members))
        return _Then(self._swaps(list(x)), torch.stack)

    def broadcast(self, x: Tensor, source: int) -> Work[Tensor]:
        """See `Comm.broadcast`."""
        self._check(source)
        if source != self.rank:
            return _Second(self._inner.recv(x, source))
        sent = [self._inner.send(x, to) for to in self.members if to != source]
        copy = x.detach().clone()
        return _Then(sent, lambda _: copy)

    def send(self, x: Tensor, to: int) -> Work[None]:
        """See `Comm.send`."""
        self._check(to)
        return self._inner.send(x, to)

    def recv(self, like: Tensor, source: int | None = None) -> Work[tuple[int, Tensor]]:
        """See `Comm.recv`; the source must be named, as somebody outside of the group could come first."""
        if source is None:
            raise ValueError("recv(source=None) in a group of pairs could take an outsider's message; name the source")
        self._check(source)
        return self._inner.recv(like, source)

    def exchange(self, x: Tensor, peer: int) -> Work[Tensor]:
        """See `Comm.exchange`."""
        self._check(peer)
        return self._inner.exchange(x, peer)

    def sub(self, members: Sequence[int]) -> Comm:
        """Fewer of them, likewise."""
        if not set(members) <= set(self.members):
            raise ValueError(f"members {tuple(members)} are not all among {self.members}")
        return Pairwise(self._inner, members)

    def now(self) -> float:
        """See `Comm.now`."""
        return self._inner.now()

    def _swaps(self, xs: Sequence[Tensor]) -> list[Work[Tensor]]:
        """With every member, the tensor that is for it."""
        return [
            Done(x.detach().clone()) if peer == self.rank else self._inner.exchange(x, peer)
            for x, peer in zip(xs, self.members, strict=True)
        ]

    def _check(self, rank: int) -> None:
        if rank not in self.members:
            raise ValueError(f"rank {rank} is not among the members {self.members}")


class _Then(Generic[T]):
    """Several works, and what to make of their results."""

    def __init__(self, works: Sequence[Work[Any]], make: Callable[[list[Any]], T]) -> None:
        self._works, self._make = works, make

    def wait(self) -> T:
        return self._make([work.wait() for work in self._works])


class _Second:
    """A receive whose sender is known."""

    def __init__(self, work: Work[tuple[int, Tensor]]) -> None:
        self._work = work

    def wait(self) -> Tensor:
        return self._work.wait()[1]


def _added(xs: list[Tensor]) -> Tensor:
    total = xs[0]
    for x in xs[1:]:
        total = total + x
    return total
