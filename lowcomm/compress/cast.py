"""Send 16-bit floats, add in full precision.

Rank i owns the i-th of n equal chunks. Everybody sends each owner its chunk in 16 bits; the owner adds the n chunks
in the precision of the input, in members' order, and sends the mean to all in 16 bits. Per rank that is
2 (n - 1) / n x 16 bits a value, as in a ring all-reduce, but no partial sum is ever rounded to 16 bits (OpenDiLoCo,
arXiv:2407.07852, sends 16-bit deltas at no loss in quality), and the result is bitwise equal on all ranks and worlds.
Fewer values than half of the ranks, of which chunks would be mostly filling, go by one exact all-reduce.

Differs from the paper in: OpenDiLoCo lets the transport add in 16 bits; here sums are exact to the input's precision.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lowcomm.comm.base import Comm, Work
from lowcomm.compress.base import EXACT, Compressor, Contraction
from lowcomm.compress.identity import Identity, outgrows

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Cast(Compressor[None]):
    """The mean of values rounded to 16 bits.

    Attributes:
        dtype: "bfloat16" (8 bits of precision, up to 3.39e38, almost all of float32's range) or "float16" (11 bits, up
            to 65,504); what rounds to more becomes infinite.
    """

    dtype: Literal["float16", "bfloat16"] = "bfloat16"
    elementwise: ClassVar[bool] = True
    passes_nonfinite: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"Cast(dtype={self.dtype!r}): choose one of {sorted(_DTYPES)}")

    def init(self, like: Tensor) -> None:
        """No state."""

    def mean(self, x: Tensor, state: None, comm: Comm) -> Generator[Work[Any], Any, tuple[Tensor, Tensor, None]]:
        """Two shots: chunks to their owners, means to everybody."""
        if x.numel() == 0:
            return x, x.clone(), state
        n, me = len(comm.members), comm.place
        if outgrows(_coded_bytes(x.numel(), n), x.numel(), n):
            return (yield from Identity().mean(x, state, comm))
        chunk = -(-x.numel() // n)
        wire = x.new_zeros(n * chunk, dtype=_DTYPES[self.dtype])
        wire[: x.numel()] = x.reshape(-1)

        received = yield comm.all_to_all(wire.view(n, chunk))
        exact = received.to(x.dtype).sum(0).div_(n)
        gathered = yield comm.all_gather(exact.to(wire.dtype))
        if x.is_meta:  # nothing is left to compute, and torch would take a while to find that out
            return x, x.clone(), state
        mean = gathered.reshape(-1).to(x.dtype)

        # The second rounding belongs to the owner, who alone knows it: so the mean of what was sent stays the mean.
        sent = wire.to(x.dtype)
        own = slice(me * chunk, (me + 1) * chunk)
        sent[own] += n * (mean[own] - exact)
        return sent[: x.numel()].view(x.shape), mean[: x.numel()].view(x.shape), state

    def num_messages(self) -> int:
        """See `Compressor.num_messages`."""
        return 2

    def sent_bytes(self, shape: Sequence[int], element_bytes: int, num_members: int) -> float:
        """See `Compressor.sent_bytes`."""
        coded = _coded_bytes(prod(shape), num_members)
        if outgrows(coded, prod(shape), num_members):
            return Identity().sent_bytes(shape, element_bytes, num_members)
        return coded

    def contraction(self, shape: Sequence[int], num_members: int) -> Contraction:
        """Half a unit in the last place of a value, and again of a mean, within the range of normal numbers.

        With u = eps / 2 a value misses by u / (1 + u) of itself at most, which is sharp.
        """
        if outgrows(_coded_bytes(prod(shape), num_members), prod(shape), num_members):
            return EXACT
        unit = torch.finfo(_DTYPES[self.dtype]).eps / 2
        once = Contraction((unit / (1 + unit)) ** 2)
        return once if num_members == 1 else once.then(once, num_members)


def _coded_bytes(num: int, num_members: int) -> int:
    return 2 * (num_members - 1) * -(-num // num_members) * 2
