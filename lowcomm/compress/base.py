"""The interface of compressors: an approximate mean of one vector per replica, in few bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from lowcomm.codecs.base import Codec
from lowcomm.comm.base import Comm, Work

S = TypeVar("S")


@dataclass(frozen=True)
class Contraction:
    """A bound on the compression error: ``E sum_i |x_i - sent_i|^2 <= loss sum_i |x_i|^2``.

    For all vectors x_i of the members together and any state. Error feedback needs only this sum; where a member's
    message depends on its own vector alone, the bound holds for each member. Floating-point rounding comes on top.

    Attributes:
        loss: 0 is exact, and below 1 the compressor contracts.
        in_expectation: whether E is over the round's random numbers, of which x_i must be independent. Otherwise the
            bound always holds.
        unbiased: whether E sent_i = x_i. Then ``loss`` is the variance omega of papers and may exceed 1.
    """

    loss: float
    in_expectation: bool = False
    unbiased: bool = False

    @property
    def delta(self) -> float:
        """1 - loss, called delta or alpha for contractive compressors, in (0, 1]; others do not contract."""
        return 1.0 - self.loss

    def then(self, second: Contraction, num: int) -> Contraction:
        """This one, then ``second`` on means of ``num`` members, each accountable for 1 / num of its loss.

        A member i sends s_i, and one of the members adds n (m - C(m)) to that, m being the mean of the n vectors s_i
        (each coordinate in its part of m, which is cut among the n). With first errors a_i = x_i - s_i, seconds b_i,
        losses p and q, all norms over all members:

            |b|^2 <= n^2 q |m|^2 <= n q |s|^2,    |s| <= (1 + sqrt(p)) |x|,    |a + b| <= |a| + |b|

        Where the first is unbiased E |s|^2 <= (1 + p) |x|^2, and where the second is E |a + b|^2 = E |a|^2 + E |b|^2.
        """
        p, q = self.loss, second.loss
        added = num * q * (1 + p if self.unbiased else (1 + sqrt(p)) ** 2)
        loss = p + added if second.unbiased else (sqrt(p) + sqrt(added)) ** 2
        return Contraction(
            loss, self.in_expectation or second.in_expectation, unbiased=self.unbiased and second.unbiased
        )


EXACT = Contraction(0.0, unbiased=True)


def coded(codec: Codec, num: int) -> Contraction:
    """The contraction of sending each vector of ``num`` values through a code."""
    loss = 1.0 - codec.contraction(num)
    return Contraction(loss, in_expectation=codec.stochastic, unbiased=codec.stochastic) if loss else EXACT


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

    def num_messages(self) -> int:
        """The most exchanges in sequence within `mean`, each depending on the last. By default 1."""
        return 1

    @abstractmethod
    def contraction(self, shape: Sequence[int], num_members: int) -> Contraction:
        """A bound on a round's loss for a tensor of this shape among this many members, in closed form."""

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
