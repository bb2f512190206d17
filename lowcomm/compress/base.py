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
        passes_nonfinite: whether an infinity or NaN of one rank turns up as such in the mean of all. A reducer refuses
            a round of other compressors, in which one would spoil its neighbours or vanish.
    """

    elementwise: ClassVar[bool]
    passes_nonfinite: ClassVar[bool]

    @abstractmethod
    def init(self, like: Tensor) -> S:
        """The state before the first round for tensors shaped like ``like``; equal on all ranks."""

    @abstractmethod
    def mean(self, x: Tensor, state: S, comm: Comm) -> Generator[Work[Any], Any, tuple[Tensor, Tensor, S]]:
        """Yield each Work that is needed; return ``(sent, mean, state)``. ``x`` and ``state`` are not modified.

        Law: the mean over ranks of ``sent`` equals ``mean``, which is the same on every rank, bit for bit.
        ``sent`` and ``mean`` have the shape and dtype of ``x``; ``sent`` may be ``x`` itself.
        """

    @abstractmethod
    def sent_bytes(self, shape: Sequence[int], element_bytes: int, num_members: int) -> float:
        """What each member sends in a round for a tensor of this shape and element size, as a meter counts it.

        A meter counts all-reduces as rings: 2 (n - 1) / n of the bytes.
        """

    def resync(self, state: S, comm: Comm) -> Generator[Work[Any], Any, S]:
        """The state to go on with among new members, some of which bring `init`'s.

        What must be equal on all ranks comes from ``members[0]``. By default the state stays as it is, which is right
        where there is none.
        """
        del comm
        yield from ()
        return state


def first_count(count: int, comm: Comm) -> Generator[Work[Any], Any, int]:
    """The count of ``members[0]``, on which shared random numbers may depend; for `Compressor.resync`."""
    counted = yield comm.broadcast(torch.tensor(count), comm.members[0])
    return int(counted)
