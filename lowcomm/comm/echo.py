"""A world of n ranks in which everybody says what I say.

For predicting traffic without a network (on ``device="meta"`` without arithmetic either), and as the plainest case of
k identical replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowcomm.comm.base import Call, Comm, Done, Work


class EchoComm(Comm):
    """Every exchange answers as if all members had sent this rank's tensor."""

    def __init__(self, num_members: int, rank: int = 0) -> None:
        if not 0 <= rank < num_members:
            raise ValueError(f"rank {rank} does not lie within {num_members} members")
        self.rank = rank
        self.members = tuple(range(num_members))

    def issue(self, call: Call) -> Work[Any]:
        """What is sent is dropped; what comes from whoever comes first came from the next rank."""
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
        """An echo among fewer."""
        smaller = EchoComm(self.rank + 1, self.rank)
        smaller.members = tuple(sorted(members))
        return smaller

    def now(self) -> float:
        """Always 0: nothing takes time."""
        return 0.0


def _rows(x: Tensor, num: int) -> Tensor:
    """A tensor as each of so many rows; not ``expand``, whose copies of bytes are slow on GPUs."""
    return torch.stack([x] * num)
