"""A world in which every member sends what this rank sends.

For predicting traffic without a network (and on ``device="meta"`` without arithmetic), and as k identical replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowcomm.comm.base import Call, Comm, Done, Work


class EchoComm(Comm):
    """Every call answers as if all members had sent this rank's tensor."""

    def __init__(self, num_members: int, rank: int = 0) -> None:
        if not 0 <= rank < num_members:
            raise ValueError(f"rank {rank} does not lie within {num_members} members")
        self.rank = rank
        self.members = tuple(range(num_members))

    def issue(self, call: Call) -> Work[Any]:
        """Sends are dropped; a receive from any source is from the next rank."""
        x, n = call.x.detach(), len(self.members)
        if call.kind == "all_sum":
            return Done(x * n)
        if call.kind == "all_gather":
            return Done(_rows(x, n))
        if call.kind == "all_to_all":
            return Done(_rows(x[self.place], n))
        if call.kind == "recv":
            return Done(((self.rank + 1) % n if call.peer is None else call.peer, x.clone()))
        return Done(None if call.kind == "send" else x.clone())

    def sub(self, members: Sequence[int]) -> Comm:
        smaller = EchoComm(self.rank + 1, self.rank)
        smaller.members = tuple(sorted(members))
        return smaller

    def now(self) -> float:
        """Always 0."""
        return 0.0


def _rows(x: Tensor, num: int) -> Tensor:
    """A tensor as each of so many rows; not ``expand``, whose copies of bytes are slow on GPUs."""
    return torch.stack([x] * num)
