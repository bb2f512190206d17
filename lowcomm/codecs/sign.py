"""One bit a value: its sign, times the mean magnitude of the block.

The mean magnitude is the best of all scales: |x|^2 shrinks by |x|_1^2 / num. There is no zero. In a block that is not
zero throughout, each zero comes back as the scale, so entries that must stay zero need error feedback, or a block, of
their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowcomm.codecs.blocks import BlockCodec, Layout, Tables
from lowcomm.codecs.packing import total


@dataclass(frozen=True)
class Sign(BlockCodec):
    """Signs with a float32 scale: ``1 + 32 / block`` bits a value.

    Attributes:
        block: values that share a scale.
    """

    block: int = 4096
    levels: ClassVar[tuple[float, ...]] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        self.layout()

    def layout(self) -> Layout:
        return Layout(self.block, 1, torch.float32)

    def block_contraction(self, width: int) -> float:
        """A single value among zeros; for a normal distribution it is 2 / pi."""
        return (1 - 1e-6) / width

    def encode_blocks(self, x: Tensor, draws: Tensor | None, tables: Tables) -> tuple[Tensor, Tensor]:
        size = x.abs().mul_(1 / x.shape[1])  # divided before they are added, for sums beyond float32
        return total(size, 1), x >= 0
