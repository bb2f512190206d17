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

from lowcomm.codecs.blocks import BlockCodec, BlockDecoder, BlockEncoder, Layout
from lowcomm.codecs.levels import ROUNDING, lookup, round_at_random
from lowcomm.codecs.packing import as_bytes, from_bytes


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
        """See `BlockCodec.layout`."""
        bits = next(bits for bits in (2, 4, 8) if 2**bits > 2 * self.num_levels)
        return Layout(self.block, bits, 4)

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

    def encoder(self, device: torch.device, random: torch.Generator | None) -> BlockEncoder:
        """See `BlockCodec.encoder`."""
        assert random is not None, "random rounding needs random numbers"
        s = self.num_levels

        def encode(x: Tensor) -> tuple[Tensor, Tensor]:
            largest = x.abs().amax(1, keepdim=True)
            scaled = x / largest.masked_fill(largest == 0, 1.0)  # so that no square leaves float32's range
            norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
            levels = scaled.mul_(s / norm.masked_fill(norm == 0, 1.0))
            levels = round_at_random(levels, random).add_(s).clamp_(0, 2 * s)
            return as_bytes(norm * largest), levels.to(torch.uint8)

        return encode

    def decoder(self, device: torch.device) -> BlockDecoder:
        """See `BlockCodec.decoder`."""
        s = self.num_levels
        look = lookup([level / s for level in range(-s, s + 1)], self.layout().bits, device)

        def decode(header: Tensor, codes: Tensor, out: Tensor) -> None:
            look(codes, out)
            out.mul_(from_bytes(header, torch.float32))

        return decode
