"""The interface of compressors: an approximate mean of one vector per replica, in few bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from lowcomm.comm.base import Comm, Work

S = TypeVar("S")


class Compressor(ABC, Generic[S]):
    """An approximate mean over ranks. What changes between rounds is in the state ``S``.

    Attributes:
        elementwise: whether shapes do not matter, so tensors may be joined in one vector. Otherwise the input is a
            stack of tensors of one shape, ``[num, *shape]``, each compressed separately.
        passes_nonfinite: whether an infinity or NaN of one rank appears in the mean at its place and nowhere else. For
            other compressors, reducers refuse a round with one.
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
        """Yield each Work and return ``(sent, mean, state)``. ``x`` and ``state`` are not modified.

        Law: the mean over ranks of ``sent`` equals ``mean``, which is the same on every rank, bit for bit. ``sent`` and
        ``mean`` have the shape and dtype of ``x``; ``sent`` may be ``x`` itself.

        Args:
            x: released as soon as it is sent, to save memory. It may hold infinities and NaN; the result is then
                unused, but the round must complete.
            wants_sent: whether ``sent`` will be used; otherwise it may be anything, such as ``mean``.
        """

    @abstractmethod
    def sent_bytes(self, shape: Sequence[int], element_bytes: int, num_members: int) -> float:
        """Bytes that each member sends in a round for a tensor of this shape and element size, as a meter counts.

        A meter counts all-reduces as rings: 2 (n - 1) / n of the bytes. Never more than uncompressed: sums and two-shot
        averages take at most the bytes of an exact all-reduce, and gathered messages at most the vector in float32.
        Where a code would be larger, the values themselves are sent.
        """

    def divides_by_all(self) -> bool:
        """Whether the mean at each place is over all ranks, also those that sent nothing there. By default yes."""
        return True

    def keeps_values(self) -> bool:
        """Whether the mean is close for any values, such as parameters, from the first round on. By default yes; not
        where places or directions are left out.
        """
        return True

    def num_messages(self) -> int:
        """The most exchanges in sequence within `mean`, each depending on the last. By default 1."""
        return 1

    def resync(self, state: S, comm: Comm) -> Generator[Work[Any], Any, S]:
        """The state for new members, some of which bring `init`'s.

        What must be equal on all ranks comes from ``members[0]``. By default the state is unchanged, which is right if
        there is none.
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
