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

from lowcomm.codecs.blocks import Factors, Tables
from lowcomm.codecs.levels import ROUNDING, contraction_of_nearest, round_at_random, round_to_bytes
from lowcomm.codecs.scaled import ScaledCodec
from lowcomm.codecs.scales import SCALE_GROWTH, ScaleFormat


@dataclass(frozen=True)
class Absmax(ScaledCodec):
    """Integers in [-127, 127] or [-7, 7]: ``bits`` a value, and the block's scale.

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
        super().__post_init__()

    @property
    def reach(self) -> float:
        return self._limit

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

    def to_codes(self, scaled: Tensor, draws: Tensor | None, tables: Tables) -> Tensor:
        limit = self._limit
        codes = scaled if draws is None else round_at_random(scaled, draws)
        codes = codes.clamp_(-limit, limit)
        return round_to_bytes(codes if self.bits == 8 else codes.add_(limit))  # 8 bits are read back as int8

    def decode_blocks(self, header: Tensor, packed: Tensor, out: Tensor, tables: Tables) -> Factors:
        if self.bits == 8:
            return packed.view(torch.int8), header
        return super().decode_blocks(header, packed, out, tables)

    @property
    def levels(self) -> tuple[float, ...]:
        return tuple(range(-self._limit, self._limit + 1))

    @property
    def _limit(self) -> int:
        return 127 if self.bits == 8 else 7
