"""A dense sketch: few random combinations of all values, by fast Walsh-Hadamard transforms.

The vector is cut in blocks of a power of two; each is multiplied by random signs, transformed by the orthonormal
Hadamard matrix H, and a random few of its rows are kept: y = S H D x. All ranks share signs and rows, which are fresh
each round, so sketches can be added on the way; the mean comes back by the transpose. The random matrix
(S H D)^T (S H D) is a projection onto ``density`` of the dimensions, the expectation of which is ``density`` times the
identity. As it is, it never adds error (delta = density in expectation) and goes with error feedback; divided by the
density (``unbiased``) its expectation is the identity and its variance omega = 1 / density - 1.

Sketching as in Song, Wang, Yu and Zhang, "Sketching for First Order Method" (2022, arXiv:2210.08371); the transform is
the subsampled randomised Hadamard transform (Ailon and Chazelle 2006; Tropp 2011, arXiv:1011.1595).

Differs from the paper in: blocks, so that the cost is that of small transforms; scaled down by default; one choice of
rows for all blocks of a round.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowcomm.comm.base import Comm, Work
from lowcomm.compress.base import Compressor, first_count
from lowcomm.compress.identity import Identity
from lowcomm.tensors import rng


@dataclass(frozen=True)
class Sketch(Compressor[int]):
    """The mean of random projections; the state is the number of rounds so far.

    Attributes:
        density: values sent for each value of the vector.
        block: a power of two, the largest size of a transform.
        unbiased: divide by the density: right in expectation, but far larger than the vector.
        seed: of signs and rows; the same on all ranks.
    """

    density: float = 0.1
    block: int = 4096
    unbiased: bool = False
    seed: int = 0
    elementwise: ClassVar[bool] = True
    passes_nonfinite: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"Sketch(density={self.density}): it must lie above 0 and be at most 1")
        if self.block < 1 or self.block & (self.block - 1):
            raise ValueError(f"Sketch(block={self.block}): it must be a power of two, such as 4096")

    def init(self, like: Tensor) -> int:
        """No rounds so far."""
        return 0

    def mean(
        self, x: Tensor, state: int, comm: Comm, wants_sent: bool = True
    ) -> Generator[Work[Any], Any, tuple[Tensor, Tensor, int]]:
        """One sum of sketches."""
        num_blocks, size, num_kept = self._cut(x.numel())
        if self._goes_whole(x.numel()):
            sent, mean, _ = yield from Identity().mean(x, None, comm, wants_sent)
            return sent, mean, state + 1
        signs, rows = self._drawn(x, num_blocks, size, num_kept, state + 1)
        blocks = x.new_zeros(num_blocks * size)
        blocks[: x.numel()] = x.reshape(-1)
        sketch = _hadamard(blocks.view(num_blocks, size) * signs)[:, rows]

        total = yield comm.all_sum(sketch)
        mean = self._expand(total / len(comm.members), signs, rows, x)
        return self._expand(sketch, signs, rows, x) if wants_sent else mean, mean, state + 1

    def keeps_values(self) -> bool:
        return False

    def sent_bytes(self, shape: Sequence[int], element_bytes: int, num_members: int) -> float:
        num_blocks, _, num_kept = self._cut(prod(shape))
        num_values = min(num_blocks * num_kept, prod(shape))
        return Identity().sent_bytes((num_values,), element_bytes, num_members)

    def resync(self, state: int, comm: Comm) -> Generator[Work[Any], Any, int]:
        """The first member's count of rounds, on which the random numbers depend."""
        return (yield from first_count(state, comm))

    def _goes_whole(self, num: int) -> bool:
        num_blocks, _, num_kept = self._cut(num)
        return num_blocks * num_kept >= num

    def _cut(self, num: int) -> tuple[int, int, int]:
        """How many blocks, their size, and how many values are kept of each."""
        if num == 0:
            return 0, 1, 0
        size = min(self.block, 1 << (num - 1).bit_length())
        return -(-num // size), size, max(1, round(self.density * size))

    def _drawn(self, like: Tensor, num_blocks: int, size: int, num_kept: int, round: int) -> tuple[Tensor, Tensor]:
        """Signs and the rows that are kept, drawn on the CPU, as all ranks must have the same."""
        if like.is_meta:
            return like.new_empty(num_blocks, size), torch.empty(num_kept, dtype=torch.int64, device="meta")
        random = rng(self.seed, "sketch", round)
        signs = torch.randint(2, (num_blocks, size), generator=random, dtype=torch.int8).to(like.device)
        rows = torch.randperm(size, generator=random)[:num_kept].to(like.device)
        return (2 * signs - 1).to(like.dtype), rows

    def _expand(self, sketch: Tensor, signs: Tensor, rows: Tensor, like: Tensor) -> Tensor:
        """The transpose of the sketch, in the shape of ``like``."""
        kept = torch.zeros_like(signs)
        kept[:, rows] = sketch
        blocks = _hadamard(kept) * signs
        if self.unbiased:
            blocks = blocks * (signs.shape[1] / rows.numel())
        return blocks.reshape(-1)[: like.numel()].view(like.shape)


def _hadamard(x: Tensor) -> Tensor:
    """Each row of ``[rows, 2^p]`` times the orthonormal Hadamard matrix, which is its own inverse."""
    num, size = x.shape
    half = 1
    while half < size:
        a, b = x.reshape(num, -1, 2, half).unbind(2)
        x = torch.stack([a + b, a - b], 2)
        half *= 2
    return x.reshape(num, size).mul(size**-0.5)
