"""A world of one rank: every exchange is with oneself."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lowcomm.comm.base import Call, Comm, Done, Work


@dataclass
class SoloComm(Comm):
    """A single rank. Sums are copies; a message to oneself is queued."""

    rank: int = 0
    members: tuple[int, ...] = field(init=False)
    _mail: deque[Tensor] = field(default_factory=deque, init=False, repr=False)

    def __post_init__(self) -> None:
        self.members = (self.rank,)

    def issue(self, call: Call) -> Work[Any]:
        if call.kind == "recv":
            if not self._mail:
                raise ValueError("recv in a world of one rank, but nothing was sent: it would wait for ever")
            return Done((self.rank, self._mail.popleft()))
        copy = call.x.detach().clone()
        if call.kind == "send":
            self._mail.append(copy)
            return Done(None)
        return Done(copy[None] if call.kind == "all_gather" else copy)

    def sub(self, members: Sequence[int]) -> Comm:
        """Itself, as there is no smaller view."""
        if tuple(members) != self.members:
            raise ValueError(f"members {tuple(members)} are not among {self.members}")
        return self

    def now(self) -> float:
        """Seconds of the monotonic clock."""
        return time.perf_counter()
