"""Send the largest coordinates of each chunk, with their places (Stich et al. 2018, arXiv:1809.07599, "top_k"; in
chunks of 4,096 and with 2-bit values SparseLoCo, arXiv:2508.15706, section 3).

    C(x) = the k entries of each chunk with the largest |x_j|, through a code Q, zero elsewhere
    |x - C(x)|^2 <= (1 - delta k / d) |x|^2         delta: the contraction of Q, see `Codec`; exact values have 1
    mean = 1/n sum_i C(x_i), or at each place the mean over those ranks that sent it

The vector is cut into flat chunks, whatever the shapes in it, so a fixed k per chunk gives every message one size. A
round is one all-gather of one payload: coded values, then coded places. Decoded vectors are added one rank after the
other, so sums are the same in every world.

Differs from the paper in: chunks are flat, not 64 x 64, so odd shapes do not grow; places are sorted and coded; two
magnitudes for each sign rather than four bins (values=SignMagnitude()).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lowcomm.codecs.base import Codec
from lowcomm.codecs.float32 import Float32, no_longer
from lowcomm.codecs.indices import INDEX_CODES, IndexCode, decode_indices, encode_indices, index_bytes
from lowcomm.codecs.packing import as_bytes, from_bytes
from lowcomm.comm.base import Comm, Work
from lowcomm.compress.base import Compressor
from lowcomm.compress.gathered import batches
from lowcomm.tensors import rng

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class _Piece:
    """Chunks of one length: ``rows`` of them from place ``start`` of the vector, of each of which ``kept`` go."""

    start: int
    rows: int
    length: int
    kept: int


@dataclass(frozen=True)
class TopK(Compressor[int]):
    """The mean of every rank's largest values.

    A message never outgrows the vector in float32: where it would, as for tiny vectors, all values go as float32.

    Attributes:
        density: the share of each chunk that is kept; rounded to a whole number, at least 1.
        num: how many of each chunk are kept, in place of ``density``. A shorter chunk, the last, keeps its part of
            that, rounded up.
        chunk: values of a chunk; None takes the whole bucket as one chunk.
        values: code of the kept values, which are one vector in order of their places; its blocks need not be chunks.
        indices: code of the places, see `lowcomm.codecs.indices`; Elias-Fano is the smaller one.
        divide_by: "all" averages over all ranks. "present" averages at each place over those ranks that sent it, as
            the programs of DeMo and SparseLoCo do: up to n times larger where few did. ``sent`` is what this rank sent
            either way, so with "present" the law of `Compressor.mean` reads ``mean(sent) * n / count == mean`` with the
            ``count`` of ranks that sent a place. Feedbacks that keep a mean of what was sent, such as EF21, need "all".
        seed: of random rounding, where ``values`` wants it; each rank and round has its own numbers.
    """

    density: float = 1 / 64
    num: int | None = None
    chunk: int | None = 4096
    values: Codec = Float32()
    indices: IndexCode = "elias_fano"
    divide_by: Literal["all", "present"] = "all"
    seed: int = 0
    elementwise: ClassVar[bool] = True
    passes_nonfinite: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"TopK(density={self.density}): it is the share that is sent, above 0 and at most 1")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"TopK(chunk={self.chunk}): a chunk has at least 1 value; None is the whole bucket")
        if self.num is not None and not 1 <= self.num <= (self.chunk or self.num):
            most = "at least 1 of the bucket" if self.chunk is None else f"1 to {self.chunk} of each chunk"
            raise ValueError(f"TopK(num={self.num}, chunk={self.chunk}): choose {most}")
        if self.indices not in INDEX_CODES:
            raise ValueError(f"TopK(indices={self.indices!r}): choose one of {', '.join(INDEX_CODES)}")
        if self.divide_by not in ("all", "present"):
            raise ValueError(f"TopK(divide_by={self.divide_by!r}): choose all or present")

    def init(self, like: Tensor) -> int:
        """The number of rounds so far."""
        return 0

    def mean(
        self, x: Tensor, state: int, comm: Comm, wants_sent: bool = True
    ) -> Generator[Work[Any], Any, tuple[Tensor, Tensor, int]]:
        """One all-gather; what members sent, this one too, is read back and added in their order."""
        num, shape, dtype = x.numel(), x.shape, x.dtype
        if num == 0:
            return x, x.clone(), state + 1
        random = rng(self.seed, "rounding", comm.rank, state + 1, device="cpu" if x.is_meta else x.device)
        work = comm.all_gather(self.encode(x.reshape(-1), random))
        wide = torch.promote_types(dtype, torch.float32)  # 16 bits would lose late terms
        del x
        gathered = yield work
        total = torch.zeros(num, dtype=wide, device=gathered.device)
        count = torch.zeros_like(total) if self.divide_by == "present" else None
        sent = torch.zeros_like(total, dtype=dtype) if wants_sent else None
        rank = 0
        for messages in batches(gathered, self._num_kept(num)):
            for places, kept in zip(*self.decode(messages, num), strict=True):
                kept = kept.to(dtype)
                if sent is not None and rank == comm.place:
                    sent.index_copy_(0, places, kept)
                total.index_add_(0, places, kept.to(wide))  # no place twice, so the order of additions is fixed
                if count is not None:
                    count.index_add_(0, places, torch.ones_like(kept, dtype=wide))
                rank += 1
        mean = total.div_(len(comm.members) if count is None else count.clamp_(min=1)).to(dtype).view(shape)
        return mean if sent is None else sent.view(shape), mean, state + 1

    def divides_by_all(self) -> bool:
        return self.divide_by == "all"

    def keeps_values(self) -> bool:
        return False

    def sent_bytes(self, shape: Sequence[int], element_bytes: int, num_members: int) -> int:
        return (num_members - 1) * self.num_bytes(prod(shape))

    def num_bytes(self, num: int) -> int:
        """Exact size of a message for ``num`` values."""
        return min(self._coded_bytes(num), _FLOAT32_BYTES * num)

    def encode(self, x: Tensor, random: torch.Generator | None = None) -> Tensor:
        """A vector as a message, uint8 ``[num_bytes(num)]``."""
        if self._goes_whole(len(x)):
            return as_bytes(x.float())
        kept: list[Tensor] = []
        places: list[Tensor] = []
        for piece in self._pieces(len(x)):
            rows = x[piece.start : piece.start + piece.rows * piece.length].view(piece.rows, piece.length)
            where = rows.abs().topk(piece.kept, sorted=False).indices.sort(1).values
            kept.append(rows.gather(1, where).reshape(-1))
            places.append(encode_indices(where, piece.length, self.indices).reshape(-1))
        values = torch.cat(kept)[None].float()
        return torch.cat([no_longer(self.values, values.shape[1]).encode(values, random)[0], *places])

    def decode(self, messages: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """The places (int64, rising) and float32 values, both ``[rows, kept]``, of rows of messages of `encode`."""
        num_rows, device = len(messages), messages.device
        if self._goes_whole(num):
            return torch.arange(num, device=device).expand(num_rows, num), from_bytes(messages, torch.float32)
        num_kept = self._num_kept(num)
        code = no_longer(self.values, num_kept)
        at = code.num_bytes(num_kept)
        values = code.decode(messages[:, :at].contiguous(), num_kept)
        places: list[Tensor] = []
        for piece in self._pieces(num):
            size = index_bytes(piece.length, piece.kept, self.indices)
            raw = messages[:, at : at + piece.rows * size].reshape(num_rows * piece.rows, size)
            where = decode_indices(raw, piece.length, piece.kept, self.indices).view(num_rows, piece.rows, piece.kept)
            first = piece.start + piece.length * torch.arange(piece.rows, device=device)
            places.append((where + first[:, None]).flatten(1))
            at += piece.rows * size
        return torch.cat(places, 1), values

    def _pieces(self, num: int) -> list[_Piece]:
        """The full chunks, then what is left."""
        chunk = self.chunk or max(num, 1)
        kept = min(chunk, self.num or max(1, round(chunk * self.density)))
        rows, rest = divmod(num, chunk)
        pieces = [_Piece(0, rows, chunk, kept), _Piece(rows * chunk, 1, rest, -(-kept * rest // chunk))]
        return [piece for piece in pieces if piece.rows * piece.length]

    def _num_kept(self, num: int) -> int:
        return sum(piece.rows * piece.kept for piece in self._pieces(num))

    def _coded_bytes(self, num: int) -> int:
        places = sum(piece.rows * index_bytes(piece.length, piece.kept, self.indices) for piece in self._pieces(num))
        num_kept = self._num_kept(num)
        return no_longer(self.values, num_kept).num_bytes(num_kept) + places

    def _goes_whole(self, num: int) -> bool:
        return self._coded_bytes(num) > _FLOAT32_BYTES * num
