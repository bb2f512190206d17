"""Collectives and swaps in virtual time: members arrive, the bytes move, each continues with its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lowcomm.comm.base import PeerLost, named
from lowcomm.sim.wire.clock import Clock
from lowcomm.sim.wire.collectives import Schedule, Transfer, Turns


class Carrier(Protocol):
    """Moves bytes in virtual time, such as `lowcomm.sim.wire.network.Network`."""

    def send(
        self,
        source: int,
        to: int,
        num_bytes: float,
        on_end: Callable[[], None],
        num_latencies: float = 1.0,
        turns: Turns | None = None,
    ) -> Any:
        """Start a flow and return it; ``on_end`` is called between ranks' turns when the last byte has arrived."""
        ...

    def cancel(self, flow: Any) -> None:
        """Stop a flow; no effect if it has ended."""
        ...


class Asked(NamedTuple):
    """A call without its values; all members of an exchange must make the same."""

    kind: str
    shape: torch.Size
    dtype: torch.dtype
    source: int | None = None

    def __str__(self) -> str:
        """As in "broadcast of float32 [2, 3] from rank 1"."""
        source = "" if self.source is None else f" from rank {self.source}"
        return f"{self.kind} of {str(self.dtype).removeprefix('torch.')} {list(self.shape)}{source}"


@dataclass(eq=False, slots=True)
class Exchange:
    """One collective, or one swap of two members.

    Transfers start when the last member has arrived, or when earlier ones they depend on have ended. Without a pipeline
    (`all_to_all`, most broadcasts), a member is done when its own transfers are; otherwise all are done at once.

    Attributes:
        number: counts these members' exchanges from 1.
        call: the first member's call.
        on_over: called after the last transfer.
        posts: each member's tensor; None if it sends nothing.
        lost: ranks whose loss ended it early; may include non-members until the first waiter is told.
    """

    clock: Clock
    carrier: Carrier | None
    schedule: Schedule
    members: tuple[int, ...]
    number: int
    call: Asked
    on_over: Callable[[], object]
    posts: dict[int, Tensor | None] = field(default_factory=dict, init=False)
    lost: set[int] = field(default_factory=set, init=False)
    _flows: list[Any] = field(default_factory=list, init=False)
    # transfers that wait for the end of another
    _after: dict[int, list[tuple[int, Transfer]]] = field(default_factory=dict, init=False)
    _num_open: int | None = field(default=None, init=False)  # transfers under way; None before the last member is there
    # those of each rank, where ranks wait for their own alone
    _by_rank: dict[int, int] | None = field(default=None, init=False)
    _parked: dict[int, None] = field(default_factory=dict, init=False)  # a set in order of arrival
    _total: Tensor | None = field(default=None, init=False)

    def arrive(self, rank: int, call: Asked, x: Tensor | None) -> None:
        """A member joins with a tensor that must not change.

        Raises:
            ValueError: when its call differs from the others'.
        """
        if call != self.call:
            first = next(iter(self.posts))
            raise ValueError(
                f"exchange number {self.number} among ranks {named(self.members)}: rank {rank} calls {call}, but rank "
                f"{first} called {self.call}; all members must make the same calls in the same order"
            )
        assert rank not in self.posts
        self.posts[rank] = x
        if len(self.posts) == len(self.members):
            self._start()

    def wait(self, rank: int) -> None:
        """Block until this member is done.

        Raises:
            PeerLost: when another member was lost first.
        """
        if not self.lost and not self._is_through(rank):
            self._parked[rank] = None
            try:
                self.clock.park(self._describe)
            finally:
                self._parked.pop(rank, None)
        if not self._is_through(rank):
            self.lost = self.lost.intersection(self.members)  # a copy: who is lost from now on is no cause
            raise PeerLost(f"{self._name()} cannot end: ranks {named(self.lost)} are gone", tuple(sorted(self.lost)))

    def lose(self, lost: set[int]) -> None:
        """Members are lost: end it for all that are not done. Ranks that crash at the same moment are added."""
        self.lost = lost
        if self.carrier is not None:
            for flow in self._flows:
                self.carrier.cancel(flow)
        self._wake(list(self._parked))

    def total(self) -> Tensor:
        """The sum of all posts, in members' order, as a fresh tensor."""
        if self._total is None:
            self._total = self.post(self.members[0]).clone()
            if not self._total.is_meta:
                for rank in self.members[1:]:
                    self._total += self.post(rank)
        return self._total.clone()

    def gathered(self) -> Tensor:
        """All posts as rows of a fresh tensor, in members' order."""
        first = self.post(self.members[0])
        if first.is_meta:  # without a look at all of them, which would be n times n
            return first.new_empty(len(self.members), *first.shape)
        return torch.stack([self.post(rank) for rank in self.members])

    def rows(self, place: int) -> Tensor:
        """The row at this place of each post, as a fresh tensor in members' order."""
        first = self.post(self.members[0])
        return first.clone() if first.is_meta else torch.stack([self.post(r)[place] for r in self.members])

    def post(self, rank: int) -> Tensor:
        """The tensor of a member that sends."""
        x = self.posts[rank]
        assert x is not None
        return x

    def copy(self, rank: int) -> Tensor:
        """A fresh copy of `post`."""
        return self.post(rank).clone()

    def _start(self) -> None:
        transfers: list[Transfer] = []
        if self.carrier is not None:
            num_bytes = self.call.shape.numel() * self.call.dtype.itemsize
            if self.call.kind == "all_to_all":
                num_bytes //= len(self.members)
            transfers = self.schedule.transfers(self.call.kind, self.members, num_bytes, self.call.source)
        self._num_open = len(transfers)
        if not transfers:
            self._end()
        elif self.call.kind == "all_to_all" or all(
            x.source == self.call.source or x.after is not None for x in transfers
        ):
            self._by_rank = dict.fromkeys(self.members, 0)
            for transfer in transfers:
                self._by_rank[transfer.source] += 1
                self._by_rank[transfer.to] += 1
        for i, transfer in enumerate(transfers):
            if transfer.after is None:
                self._send(i, transfer)
            else:
                self._after.setdefault(transfer.after, []).append((i, transfer))

    def _send(self, i: int, x: Transfer) -> None:
        assert self.carrier is not None
        on_end = partial(self._moved, i, x)
        self._flows.append(self.carrier.send(x.source, x.to, x.num_bytes, on_end, x.num_latencies, x.turns))

    def _moved(self, i: int, transfer: Transfer) -> None:
        assert self._num_open
        for later in self._after.pop(i, ()):
            self._send(*later)
        self._num_open -= 1
        if self._by_rank is not None:
            self._by_rank[transfer.source] -= 1
            self._by_rank[transfer.to] -= 1
            self._wake([rank for rank in transfer[:2] if rank in self._parked and self._is_through(rank)])
        if self._num_open == 0:
            self._end()

    def _end(self) -> None:
        self._flows.clear()
        self._wake(list(self._parked))
        self.on_over()

    def _wake(self, ranks: list[int]) -> None:
        for rank in ranks:
            del self._parked[rank]
            self.clock.wake(rank)

    def _name(self) -> str:
        return f"{self.call}, exchange number {self.number} among ranks {named(self.members)},"

    def _is_through(self, rank: int) -> bool:
        return self._num_open == 0 or (self._by_rank is not None and self._by_rank[rank] == 0)

    def _describe(self) -> str:
        if self._num_open is not None:
            return f"{self._name()} of which {self._num_open} messages are under way"
        return f"{self._name()} which ranks {named(set(self.members) - self.posts.keys())} have not called"
