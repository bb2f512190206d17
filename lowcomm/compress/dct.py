"""Compress frequencies instead of values (the transform of DeMo, Peng et al. 2024, arXiv:2411.19870, section 3).

Matrices are cut into tiles of at most 64 x 64, each of which goes through the orthonormal discrete cosine transform
(DCT-II) along both sides; vectors go in one-dimensional tiles. What an inner compressor makes of the coefficients
comes back through the inverse:

    X = B_n x B_m^T,   B_t[j, i] = sqrt((1 + [j > 0]) / t) cos(pi (i + 1/2) j / t),   sent = B_n^T sent_X B_m

The transform is linear and keeps lengths, and there are as many coefficients as values, so the inner compressor's law,
contraction and bytes carry over, to rounding.
The inverse is a matrix product that every rank computes for itself: ranks are equal bit for bit as far as their
libraries, thread counts and kinds of processor are.

Differs from the paper in: tile sides need not divide a tensor's: n is cut into ceil(n / 64) tiles, the first of which
may be longer by one; convolution kernels count as matrices of their first side; the optimizer is not part of it.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowcomm.comm.base import Comm, Work
from lowcomm.compress.base import Compressor
from lowcomm.compress.top_k import TopK


@dataclass(frozen=True)
class _Run:
    """Tiles of one length along a side: ``count`` of them, from place ``start``."""

    start: int
    count: int
    length: int

    @property
    def places(self) -> slice:
        """What they cover."""
        return slice(self.start, self.start + self.count * self.length)


@dataclass(frozen=True)
class DCT(Compressor[Any]):
    """The mean of cosine coefficients that an inner compressor makes, transformed back.

    Attributes:
        inner: elementwise; gets the coefficients of all tiles as one vector, tile by tile. 64 x 64 tiles are the 4,096
            values of one chunk of `TopK`.
        tile: the longest side of a tile.
    """

    inner: Compressor = TopK()
    tile: int = 64
    elementwise: ClassVar[bool] = False
    passes_nonfinite: ClassVar[bool] = False  # infinities of both signs meet in a sum

    def __post_init__(self) -> None:
        if self.tile < 1:
            raise ValueError(f"DCT(tile={self.tile}): a tile has at least 1 value a side; the default is 64")
        if not self.inner.elementwise:
            raise ValueError(f"DCT(inner={self.inner}): coefficients have no shape; take an elementwise compressor")

    def init(self, like: Tensor) -> Any:
        """The inner compressor's, for the coefficients."""
        return self.inner.init(like.new_empty(like.numel()))

    def mean(
        self, x: Tensor, state: Any, comm: Comm, wants_sent: bool = True
    ) -> Generator[Work[Any], Any, tuple[Tensor, Tensor, Any]]:
        steps, shape = self.inner.mean(self.transform(x), state, comm, wants_sent), x.shape
        del x
        sent, mean, state = yield from steps
        mean = self.inverse(mean, shape)
        return self.inverse(sent, shape) if wants_sent else mean, mean, state

    def keeps_values(self) -> bool:
        return self.inner.keeps_values()

    def num_messages(self) -> int:
        return self.inner.num_messages()

    def divides_by_all(self) -> bool:
        return self.inner.divides_by_all()

    def sent_bytes(self, shape: Sequence[int], element_bytes: int, num_members: int) -> float:
        return self.inner.sent_bytes([prod(shape)], element_bytes, num_members)

    def resync(self, state: Any, comm: Comm) -> Generator[Work[Any], Any, Any]:
        return (yield from self.inner.resync(state, comm))

    def transform(self, x: Tensor) -> Tensor:
        """The coefficients of a stack, as one vector: tile by tile, those of one shape together."""
        num, n, m = _as_matrices(x.shape)
        stack, pieces = x.reshape(num, n, m), [x.new_empty(0)]
        for rows, columns in self._tiles(n, m):
            part = stack[:, rows.places, columns.places]
            tiles = part.reshape(num, rows.count, rows.length, columns.count, columns.length).transpose(2, 3)
            pieces.append((_basis(rows.length, x) @ tiles @ _basis(columns.length, x).T).reshape(-1))
        return torch.cat(pieces)

    def inverse(self, coefficients: Tensor, shape: Sequence[int]) -> Tensor:
        """The stack that has these coefficients."""
        num, n, m = _as_matrices(shape)
        stack, at = coefficients.new_empty(num, n, m), 0
        for rows, columns in self._tiles(n, m):
            part = stack[:, rows.places, columns.places]
            tiles = coefficients[at : at + part.numel()].view(num, rows.count, columns.count, rows.length, -1)
            values = _basis(rows.length, coefficients).T @ tiles @ _basis(columns.length, coefficients)
            part.copy_(values.transpose(2, 3).reshape(part.shape))
            at += part.numel()
        return stack.view(*shape)

    def _tiles(self, n: int, m: int) -> Iterator[tuple[_Run, _Run]]:
        """Rows and columns of tiles of one shape: all of a matrix has at most 4 shapes."""
        yield from product(self._runs(n), self._runs(m))

    def _runs(self, side: int) -> list[_Run]:
        """As few tiles as there can be, as equal as they can be: longer ones, then shorter ones."""
        count = -(-side // self.tile)
        if count == 0:
            return []
        length, num_longer = divmod(side, count)
        start = num_longer * (length + 1)
        runs = [_Run(0, num_longer, length + 1), _Run(start, count - num_longer, length)]
        return [run for run in runs if run.count]


def _as_matrices(shape: Sequence[int]) -> tuple[int, int, int]:
    """A stack of matrices, vectors as matrices of one row."""
    num, *sides = shape
    if len(sides) < 2:
        return num, 1, prod(sides)
    return num, sides[0], prod(sides[1:])


def _basis(size: int, like: Tensor) -> Tensor:
    """The matrix B of the orthonormal DCT-II: row j is the j-th wave; computed on the CPU for all devices alike."""
    places = torch.arange(size, dtype=torch.float64)
    step = math.pi / max(size, 1)
    waves = torch.cos(step * places[:, None] * (places + 0.5)) * math.sqrt(2 / max(size, 1))
    waves[:1] /= math.sqrt(2)
    return waves.to(like.device, like.dtype)
