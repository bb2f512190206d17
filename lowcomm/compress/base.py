"""How replicas average one vector each with few bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from lowcomm.comm.base import Comm, Work

S = TypeVar("S")


class Compressor(ABC, Generic[S]):
    """An approximate mean over ranks. What changes between rounds lives in the state ``S``.

    Attributes:
        elementwise: whether shapes do not matter, so that many tensors may be joined in one vector. Otherwise a tensor
            that is given is a stack of tensors of one shape, ``[num, *shape]``, each compressed for itself.
        passes_nonfinite: whether an infinity or NaN of one rank turns up as such in the mean of all, and nowhere else.
            A reducer refuses a round of other compressors, in which one would spoil its neighbours or vanish.
    """

    elementwise: ClassVar[bool]
    passes_nonfinite: ClassVar[bool]

    @abstractmethod
    def init(self, like: Tensor) -> S:
        """The state before the first round for tensors shaped like ``like``; equal on all ranks."""

    @abstractmethod
    def mean(
        self, x: Tensor, state: S, comm: Comm, wants_sent: bool = True
    ) -> Generator[Work[Any], Any, tuple[Tensor, Tensor, S]]:
        """Yield each Work that is needed; return ``(sent, mean, state)``. ``x`` and ``state`` are not modified.

        Law: the mean over ranks of ``sent`` equals ``mean``, which is the same on every rank, bit for bit.
        ``sent`` and ``mean`` have the shape and dtype of ``x``; ``sent`` may be ``x`` itself.

        Args:
            x: let go of as soon as it is sent, since whole models are under way. It may hold infinities and NaN, of
                which nothing is used, but the round must come to its end.
            wants_sent: whether ``sent`` will be used; otherwise it may be anything, such as ``mean``.
        """

    @abstractmethod
    def sent_bytes(self, shape: Sequence[int], element_bytes: int, num_members: int) -> float:
        """What each member sends in a round for a tensor of this shape and element size, as a meter counts it.

        A meter counts all-reduces as rings: 2 (n - 1) / n of the bytes. No shape is expanded: what is summed on its way
        or averaged in two shots takes at most the bytes of an exact all-reduce, and a message that everybody gets those
        of the vector in float32. Where a code would be larger, the values themselves go.
        """

    def divides_by_all(self) -> bool:
        """Whether the mean is over all ranks at every place, whoever sent something there; by default it is."""
        return True

    def num_messages(self) -> int:
        """The most exchanges that `mean` makes in a row, each with what the last one brought; by default 1."""
        return 1

    def resync(self, state: S, comm: Comm) -> Generator[Work[Any], Any, S]:
        """The state to go on with among new members, some of which bring `init`'s.

        What must be equal on all ranks comes from ``members[0]``. By default the state stays as it is, which is right
        where there is none.
        """
        del comm
        yield from ()
        return state


def in_rows(x: Tensor, num: int, dtype: torch.dtype) -> Tensor:
    """All values as ``num`` rows of equal length, filled up with zeros; ``x`` itself, viewed, where it fits."""
    length = -(-x.numel() // num)
    if num * length == x.numel():
        return x.reshape(num, length).to(dtype)
    rows = x.new_zeros(num * length, dtype=dtype)
    rows[: x.numel()] = x.reshape(-1)
    return rows.view(num, length)


def first_count(count: int, comm: Comm) -> Generator[Work[Any], Any, int]:
    """The count of ``members[0]``, on which shared random numbers may depend; for `Compressor.resync`."""
    counted = yield comm.broadcast(torch.tensor(count), comm.members[0])
    return int(counted)
