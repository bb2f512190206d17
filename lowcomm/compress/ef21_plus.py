"""Send the vector or its change, whichever loses less (EF21+, arXiv:2106.05203).

All members know a vector g of each. A member with x has two candidates for its next g, C(x) and g + C(x - g), takes the
one nearer to x and sends its code with a byte that says which; the mean is that of all new g. Good with large step
sizes, where x changes so much that its change is no easier to send than x itself.

As C(x) takes the place of g, others must know what it replaces: every rank holds g of all n members, n times the memory
of the vector. It is meant for small problems.

Differs from the paper in: nothing; ``dense_first`` chooses between its two starts.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowcomm.comm.base import Comm, Work
from lowcomm.compress.base import Compressor
from lowcomm.compress.gathered import Gathered
from lowcomm.compress.top_k import TopK

_FLAG_BYTES, _FLOAT32_BYTES = 1, 4


@dataclass
class EF21PlusState:
    """The vectors g of all members.

    Attributes:
        known: g of each member in members' order, ``[n, *shape]``, equal on all ranks; None before the first round.
        mine: this rank's row of it.
    """

    known: Tensor | None
    mine: Tensor


@dataclass(frozen=True)
class EF21Plus(Compressor[EF21PlusState]):
    """EF21 that may restart in any round. It has its own memory, so it needs no feedback.

    Attributes:
        inner: what codes the candidates: `TopK` or `Gathered`, without random rounding.
        dense_first: start from the exact x of the first round, which goes uncompressed (and is not what `sent_bytes`
            counts); otherwise from zero.
    """

    inner: Compressor = TopK()
    dense_first: bool = False
    elementwise: ClassVar[bool] = True
    passes_nonfinite: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.inner, (TopK, Gathered)):
            raise ValueError(
                f"EF21Plus(inner={self.inner}): ranks must be able to decode each other's messages one by one; choose "
                "TopK or Gathered"
            )
        if (self.inner.values if isinstance(self.inner, TopK) else self.inner.codec).stochastic:
            raise ValueError(f"EF21Plus(inner={self.inner}): a code that rounds at random has no better candidate")
        if not self.inner.divides_by_all():
            raise ValueError(f"EF21Plus(inner={self.inner}): the mean is over all ranks; take divide_by='all'")

    def init(self, like: Tensor) -> EF21PlusState:
        return EF21PlusState(None, torch.zeros_like(like))

    def mean(
        self, x: Tensor, state: EF21PlusState, comm: Comm, wants_sent: bool = True
    ) -> Generator[Work[Any], Any, tuple[Tensor, Tensor, EF21PlusState]]:
        """One all-gather of a flag and a code."""
        if (self.dense_first and state.known is None) or self._goes_whole(x.numel()):
            return _round((yield comm.all_gather(x)), comm)
        flat, mine = x.reshape(-1), state.mine.reshape(-1)
        whole, change = self._encode(flat), self._encode(flat - mine)
        is_whole = self._error(whole, flat) < self._error(change, flat - mine)
        code = torch.where(is_whole, whole, change)
        messages = yield comm.all_gather(torch.cat([is_whole.to(torch.uint8).view(1), code]))
        known = x.new_zeros((len(comm.members), *x.shape)) if state.known is None else state.known
        heard = self._decode(messages[:, _FLAG_BYTES:], flat).view(known.shape)
        is_whole = (messages[:, 0] == 1).view(-1, *[1] * x.dim())
        return _round(torch.where(is_whole, heard, known + heard), comm)

    def keeps_values(self) -> bool:
        return self.dense_first

    def sent_bytes(self, shape: Sequence[int], element_bytes: int, num_members: int) -> int:
        """Vectors too short to gain from flag and code are sent uncoded."""
        num = prod(shape)
        size = element_bytes * num if self._goes_whole(num) else _FLAG_BYTES + self._code.num_bytes(num)
        return (num_members - 1) * size

    def resync(self, state: EF21PlusState, comm: Comm) -> Generator[Work[Any], Any, EF21PlusState]:
        """Gather all members' g, uncompressed; a new member has g = 0."""
        is_new = state.mine.new_full((1,), 1.0 if state.known is None else 0.0)
        rows = yield comm.all_gather(torch.cat([state.mine.reshape(-1), is_new]))
        if not rows.is_meta and rows[:, -1].all():  # before the first round
            return state
        return EF21PlusState(rows[:, :-1].reshape(len(rows), *state.mine.shape), state.mine)

    def _error(self, code: Tensor, x: Tensor) -> Tensor:
        return (x - self._decode(code[None], x)[0]).square().sum()

    @property
    def _code(self) -> TopK | Gathered:
        assert isinstance(self.inner, (TopK, Gathered))
        return self.inner

    def _goes_whole(self, num: int) -> bool:
        return _FLAG_BYTES + self._code.num_bytes(num) > _FLOAT32_BYTES * num

    def _encode(self, x: Tensor) -> Tensor:
        return self._code.encode(x) if isinstance(self._code, TopK) else self._code.encode(x[None])[0]

    def _decode(self, codes: Tensor, like: Tensor) -> Tensor:
        """Rows of the length and dtype of ``like`` from rows of codes."""
        if isinstance(self._code, Gathered):
            return self._code.decode(codes.contiguous(), len(like)).to(like.dtype)
        places, values = self._code.decode(codes, len(like))
        return like.new_zeros(len(codes), len(like)).scatter_(1, places, values.to(like.dtype))


def _round(known: Tensor, comm: Comm) -> tuple[Tensor, Tensor, EF21PlusState]:
    """``sent``, the mean and the state when members' vectors have become ``known``, ``[n, *shape]``."""
    mine = known[comm.place].clone()
    return mine, known.sum(0).div_(len(known)), EF21PlusState(known, mine)
