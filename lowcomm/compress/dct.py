"""Compress frequencies instead of values (the transform of DeMo, Peng et al. 2024, arXiv:2411.19870, section 3).

Matrices are cut into tiles of at most 64 x 64, each of which goes through the orthonormal discrete cosine transform
(DCT-II) along both sides; vectors go in one-dimensional tiles. What an inner compressor makes of the coefficients
comes back through the inverse:

    X = B_n x B_m^T,   B_t[j, i] = sqrt((1 + [j > 0]) / t) cos(pi (i + 1/2) j / t),   sent = B_n^T sent_X B_m

The transform is linear and keeps lengths, so the inner compressor's law and contraction carry over, to rounding.
The inverse is a matrix product that every rank computes for itself: ranks are equal bit for bit as far as their
libraries, thread counts and kinds of processor are.

Differs from the paper in: tile sides need not divide a tensor's: n is cut into ceil(n / 64) tiles of equal size, the
last filled up with fewer zeros than there are tiles; convolution kernels count as matrices of their first side; the
optimizer is not part of it.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowcomm.comm.base import Comm, Work
from lowcomm.compress.base import Compressor
from lowcomm.compress.top_k import TopK


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
        return self.inner.init(like.new_empty(self.num_coefficients(like.shape)))

    def mean(self, x: Tensor, state: Any, comm: Comm) -> Generator[Work[Any], Any, tuple[Tensor, Tensor, Any]]:
        """What ``inner`` needs."""
        sent, mean, state = yield from self.inner.mean(self.transform(x), state, comm)
        return self.inverse(sent, x.shape), self.inverse(mean, x.shape), state

    def sent_bytes(self, shape: Sequence[int], element_bytes: int, num_members: int) -> float:
        """See `Compressor.sent_bytes`."""
        return self.inner.sent_bytes([self.num_coefficients(shape)], element_bytes, num_members)

    def resync(self, state: Any, comm: Comm) -> Generator[Work[Any], Any, Any]:
        """That of ``inner``."""
        return (yield from self.inner.resync(state, comm))

    def num_coefficients(self, shape: Sequence[int]) -> int:
        """How many coefficients a stack ``[num, *shape]`` has: as many as values, and a few for the filling."""
        num, *sides = _as_matrices(shape)
        return num * prod(count * size for count, size in map(self._tiles, sides))

    def transform(self, x: Tensor) -> Tensor:
        """The coefficients of a stack, as one vector."""
        num, n, m = _as_matrices(x.shape)
        (rows, height), (columns, width) = self._tiles(n), self._tiles(m)
        padded = x.new_zeros(num, rows * height, columns * width)
        padded[:, :n, :m] = x.reshape(num, n, m)
        tiles = padded.view(num, rows, height, columns, width).transpose(2, 3)
        return (_basis(height, x) @ tiles @ _basis(width, x).T).reshape(-1)

    def inverse(self, coefficients: Tensor, shape: Sequence[int]) -> Tensor:
        """The stack that has these coefficients, but for the filling."""
        num, n, m = _as_matrices(shape)
        (rows, height), (columns, width) = self._tiles(n), self._tiles(m)
        tiles = coefficients.view(num, rows, columns, height, width)
        values = _basis(height, coefficients).T @ tiles @ _basis(width, coefficients)
        return values.transpose(2, 3).reshape(num, rows * height, columns * width)[:, :n, :m].reshape(*shape)

    def _tiles(self, side: int) -> tuple[int, int]:
        """How many tiles a side has, and their size: as equal as can be, so that the filling stays small."""
        count = -(-side // self.tile)
        return count, -(-side // max(count, 1))


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
