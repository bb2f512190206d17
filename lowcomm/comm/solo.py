"""A world of one rank: every exchange is with oneself."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lowcomm.comm.base import Comm, Done, Work, check_rows, check_summable


@dataclass
class SoloComm(Comm):
    """One rank alone. Sums are copies; a message to oneself waits in a queue."""

    rank: int = 0
    members: tuple[int, ...] = field(init=False)
    _mail: deque[Tensor] = field(default_factory=deque, init=False, repr=False)

    def __post_init__(self) -> None:
        self.members = (self.rank,)

    def all_sum(self, x: Tensor) -> Work[Tensor]:
        """A copy of ``x``."""
        check_summable(x)
        return Done(x.detach().clone())

    def all_gather(self, x: Tensor) -> Work[Tensor]:
        """A copy as the only row."""
        return Done(x.detach()[None].clone())

    def all_to_all(self, x: Tensor) -> Work[Tensor]:
        """A copy of the only row."""
        check_rows(x, 1)
        return Done(x.detach().clone())

    def broadcast(self, x: Tensor, source: int) -> Work[Tensor]:
        """A copy of ``x``."""
        self._check(source)
        return Done(x.detach().clone())

    def send(self, x: Tensor, to: int) -> Work[None]:
        """Queue a copy for one's own `recv`."""
        self._check(to)
        self._mail.append(x.detach().clone())
        return Done(None)

    def recv(self, like: Tensor, source: int | None = None) -> Work[tuple[int, Tensor]]:
        """The oldest message that was sent to oneself."""
        self._check(self.rank if source is None else source)
        if not self._mail:
            raise ValueError("recv in a world of one rank, but nothing was sent: it would wait for ever")
        return Done((self.rank, self._mail.popleft()))

    def exchange(self, x: Tensor, peer: int) -> Work[Tensor]:
        """A copy of ``x``."""
        self._check(peer)
        return Done(x.detach().clone())

    def sub(self, members: Sequence[int]) -> Comm:
        """Itself: there is no smaller view."""
        if tuple(members) != self.members:
            raise ValueError(f"members {tuple(members)} are not among {self.members}")
        return self

    def now(self) -> float:
        """Seconds of the monotonic clock."""
        return time.perf_counter()

    def _check(self, rank: int) -> None:
        if rank != self.rank:
            raise ValueError(f"rank {rank} is not among the members {self.members}")
