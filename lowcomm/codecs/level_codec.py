"""Codes of 4 bits that name one of at most 16 levels, times the scale of the block: the part that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lowcomm.codecs.blocks import BlockCodec, BlockDecoder, BlockEncoder, Layout
from lowcomm.codecs.levels import cell_size, contraction_of_nearest, lookup, nearest_level
from lowcomm.codecs.scales import SCALE_BYTES, ScaleFormat, scale_from_bytes, scale_to_bytes


@dataclass(frozen=True)
class Levels:
    """What a code can say.

    Attributes:
        values: at most 16, ascending, with 0.
        reach: the largest magnitude of a block lies at most here, after it is divided by the scale.
        block: values that share a scale.
        scale: its format.
    """

    values: tuple[float, ...]
    reach: float
    block: int
    scale: ScaleFormat


class LevelCodec(BlockCodec, ABC):
    """The nearest level of each value, in the linear domain."""

    @abstractmethod
    def levels(self) -> Levels:
        """What a code can say."""

    def layout(self) -> Layout:
        """See `BlockCodec.layout`."""
        return Layout(self.levels().block, 4, SCALE_BYTES[self.levels().scale])

    def block_contraction(self, width: int) -> float:
        """Sharp, but for the width of a cell of `nearest_level`."""
        levels = self.levels()
        return contraction_of_nearest(levels.values, width, levels.reach, levels.scale, cell_size(levels.reach))

    def encoder(self, device: torch.device, random: torch.Generator | None) -> BlockEncoder:
        """See `BlockCodec.encoder`."""
        levels = self.levels()
        nearest = nearest_level(levels.values, levels.reach, device)

        def encode(x: Tensor) -> tuple[Tensor, Tensor]:
            header = scale_to_bytes(x.abs().amax(1, keepdim=True) / levels.reach, levels.scale)
            step = scale_from_bytes(header, levels.scale)
            return header, nearest(x / step.masked_fill_(step == 0, 1.0))

        return encode

    def decoder(self, device: torch.device) -> BlockDecoder:
        """See `BlockCodec.decoder`."""
        levels = self.levels()
        look = lookup(levels.values, 4, device)

        def decode(header: Tensor, codes: Tensor, out: Tensor) -> None:
            look(codes, out)
            out.mul_(scale_from_bytes(header, levels.scale))

        return decode
