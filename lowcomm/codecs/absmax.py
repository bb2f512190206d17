"""Signed integers of 8 or 4 bits, scaled block by block to the largest magnitude.

A value x of a block with largest magnitude a becomes round(x / s) with s = a / (2^(bits - 1) - 1): symmetric, so zero
stays zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from lowcomm.codecs.blocks import BlockCodec, BlockDecoder, BlockEncoder, Layout
from lowcomm.codecs.levels import ROUNDING, contraction_of_nearest, lookup, round_at_random, round_to_bytes
from lowcomm.codecs.scales import (
    SCALE_BYTES,
    SCALE_GROWTH,
    ScaleFormat,
    check_scale,
    scale_from_bytes,
    scale_to_bytes,
)


@dataclass(frozen=True)
class Absmax(BlockCodec):
    """Integers in [-127, 127] or [-7, 7]: ``bits + 8 * SCALE_BYTES[scale] / block`` bits a value.

    Attributes:
        bits: 8 or 4.
        block: values that share a scale.
        scale: its format.
        stochastic: round up or down at random, so that the mean is exact; the error is larger.
    """

    bits: Literal[8, 4] = 8
    block: int = 256
    scale: ScaleFormat = "float32"
    stochastic: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"Absmax(bits={self.bits}): choose 8 or 4")
        check_scale(self.scale)
        self.layout()

    def layout(self) -> Layout:
        """See `BlockCodec.layout`."""
        return Layout(self.block, self.bits, SCALE_BYTES[self.scale])

    def block_contraction(self, width: int) -> float:
        """The largest magnitude is met but for the rounding of the scale; the others miss by at most half a step.

        At random, a fraction f of a step costs f (1 - f) steps squared. Below 0 where blocks are so long that this may
        exceed the values themselves: from 394 of 4 bits, 129034 of 8.
        """
        limit = self._limit
        if not self.stochastic:
            return contraction_of_nearest(range(-limit, limit + 1), width, limit, self.scale)
        # The loss l solves (width - 1) max_v(v - v^2 - l v^2) = l limit^2, with the maximum 1 / (4 (1 + l)) below one
        # step. A scale that was rounded up leaves the largest value below the limit and rounded too, for which 1 / 4 is
        # at most twice that maximum.
        rounded_up = SCALE_GROWTH[self.scale] > 1
        share = (width - 1 + 2 * rounded_up) / (limit / SCALE_GROWTH[self.scale]) ** 2
        return 1 - max((sqrt(1 + share) - 1) / 2, ROUNDING)

    def encoder(self, device: torch.device, random: torch.Generator | None) -> BlockEncoder:
        """See `BlockCodec.encoder`."""
        assert random is not None or not self.stochastic, "random rounding needs random numbers"
        limit = self._limit

        def encode(x: Tensor) -> tuple[Tensor, Tensor]:
            header = scale_to_bytes(x.abs().amax(1, keepdim=True) / limit, self.scale)
            step = scale_from_bytes(header, self.scale)
            codes = x / step.masked_fill_(step == 0, 1.0)
            if self.stochastic:
                whole = round_at_random(codes, random).add_(limit).clamp_(0, 2 * limit).to(torch.uint8)
                return header, whole.sub_(limit) if self.bits == 8 else whole
            offset = 0 if self.bits == 8 else limit  # 8 bits are read back as int8
            return header, round_to_bytes(codes.clamp_(-limit, limit).add_(offset))

        return encode

    def decoder(self, device: torch.device) -> BlockDecoder:
        """See `BlockCodec.decoder`."""
        look = lookup(range(-self._limit, self._limit + 1), 4, device) if self.bits == 4 else None

        def decode(header: Tensor, codes: Tensor, out: Tensor) -> None:
            if look:
                look(codes, out)
            else:
                out.copy_(codes.view(torch.int8))
            out.mul_(scale_from_bytes(header, self.scale))

        return decode

    @property
    def _limit(self) -> int:
        return 127 if self.bits == 8 else 7
