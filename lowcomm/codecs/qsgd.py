"""QSGD (arXiv:1610.02132): a sign and one of a few evenly spaced levels up to the block's L2 norm, at random.

The mean of what comes back is x itself, so no error feedback is needed, and with few levels none would converge:
`QSGD.contraction` is below 0 then. Codes have a fixed width here; the paper codes them by Elias' integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor

from lowcomm.codecs.blocks import BlockCodec, Layout, Tables
from lowcomm.codecs.levels import ROUNDING, round_at_random


@dataclass(frozen=True)
class QSGD(BlockCodec):
    """Levels in [-num_levels, num_levels]: 2, 4 or 8 bits a value and ``32 / block`` for the norm.

    Attributes:
        num_levels: 1 needs 2 bits, at most 7 need 4, at most 127 need 8.
        block: values that share a norm.
    """

    num_levels: int = 127
    block: int = 512
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= self.num_levels <= 127:
            raise ValueError(f"QSGD(num_levels={self.num_levels}): choose 1 to 127; 1, 7 and 127 use their bits best")
        self.layout()

    def layout(self) -> Layout:
        bits = next(bits for bits in (2, 4, 8) if 2**bits > 2 * self.num_levels)
        return Layout(self.block, bits, torch.float32)

    def variance(self, width: int) -> float:
        """The sharp omega of E|decode(encode(x)) - x|^2 <= omega |x|^2, for one block of ``width`` values.

        A fraction f between two levels costs f (1 - f). Values v in units of a level have v^2 = num_levels^2 in sum;
        the worst are equal ones, at half a level or, where they are too many for that, as large as they can be.
        """
        s = self.num_levels
        return sqrt(width) / s - 1 if width >= 4 * s * s else width / (4 * s * s)

    def block_contraction(self, width: int) -> float:
        """1 - `variance`."""
        return 1 - max(self.variance(width), ROUNDING)

    def encode_blocks(self, x: Tensor, draws: Tensor | None, tables: Tables) -> tuple[Tensor, Tensor]:
        assert draws is not None
        s = self.num_levels
        largest = x.abs().amax(1, keepdim=True)
        scaled = x / largest.masked_fill(largest == 0, 1.0)  # so that no square leaves float32's range
        norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
        levels = round_at_random(scaled.mul_(s / norm.masked_fill(norm == 0, 1.0)), draws)
        return norm * largest, levels.add_(s).clamp_(0, 2 * s).to(torch.uint8)

    @property
    def levels(self) -> tuple[float, ...]:
        return tuple(level / self.num_levels for level in range(-self.num_levels, self.num_levels + 1))
