"""A world of n ranks in which everybody says what I say.

For predicting traffic without a network (on ``device="meta"`` without arithmetic either), and as the plainest case of
k identical replicas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowcomm.comm.base import Comm, Done, Work, check_rows, check_summable


class EchoComm(Comm):
    """Every exchange answers as if all members had sent this rank's tensor."""

    def __init__(self, num_members: int, rank: int = 0) -> None:
        if not 0 <= rank < num_members:
            raise ValueError(f"rank {rank} does not lie within {num_members} members")
        self.rank = rank
        self.members = tuple(range(num_members))

    def all_sum(self, x: Tensor) -> Work[Tensor]:
        """n x."""
        check_summable(x)
        return Done(x.detach() * len(self.members))

    def all_gather(self, x: Tensor) -> Work[Tensor]:
        """n copies of x."""
        return Done(x.detach().expand(len(self.members), *x.shape).clone(memory_format=torch.contiguous_format))

    def all_to_all(self, x: Tensor) -> Work[Tensor]:
        """n copies of what this rank sends itself."""
        check_rows(x, len(self.members))
        return Done(x.detach()[self.place].expand(x.shape).clone(memory_format=torch.contiguous_format))

    def broadcast(self, x: Tensor, source: int) -> Work[Tensor]:
        """A copy of x."""
        return Done(x.detach().clone())

    def send(self, x: Tensor, to: int) -> Work[None]:
        """The message is dropped."""
        return Done(None)

    def recv(self, like: Tensor, source: int | None = None) -> Work[tuple[int, Tensor]]:
        """``like`` itself, as if the sender had the same; from the next rank when any will do."""
        return Done(((self.rank + 1) % len(self.members) if source is None else source, like.detach().clone()))

    def exchange(self, x: Tensor, peer: int) -> Work[Tensor]:
        """A copy of x."""
        return Done(x.detach().clone())

    def sub(self, members: Sequence[int]) -> Comm:
        """An echo among fewer."""
        smaller = EchoComm(self.rank + 1, self.rank)
        smaller.members = tuple(sorted(members))
        return smaller

    def now(self) -> float:
        """Always 0: nothing takes time."""
        return 0.0
