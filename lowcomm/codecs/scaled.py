"""Codes that scale each block so that its largest magnitude is theirs: the part that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lowcomm.codecs.blocks import BlockCodec, Layout, Tables
from lowcomm.codecs.levels import cell_size, cells_of_levels, contraction_of_nearest
from lowcomm.codecs.packing import largest
from lowcomm.codecs.scales import SCALE_TYPES, ScaleFormat, check_scale, scale_to_format


class ScaledCodec(BlockCodec, ABC):
    """Codes of values between -`reach` and `reach`, and a scale of a block.

    Attributes:
        bits: of a code.
        block: values that share a scale.
        scale: its format.
    """

    bits: int
    block: int
    scale: ScaleFormat

    def __post_init__(self) -> None:
        check_scale(self.scale)
        self.layout()

    def layout(self) -> Layout:
        return Layout(self.block, self.bits, SCALE_TYPES[self.scale])

    @property
    @abstractmethod
    def reach(self) -> float:
        """The largest magnitude of a block lies at most here, after it is divided by the scale."""

    @abstractmethod
    def to_codes(self, scaled: Tensor, draws: Tensor | None, tables: Tables) -> Tensor:
        """Codes, uint8, of scaled values, which may be used up."""

    def encode_blocks(self, x: Tensor, draws: Tensor | None, tables: Tables) -> tuple[Tensor, Tensor]:
        header, step = scale_to_format(largest(x, self.bits) / self.reach, self.scale)
        return header, self.to_codes(x / step.masked_fill_(step == 0, 1.0), draws, tables)


class LevelCodec(ScaledCodec, ABC):
    """The nearest of at most 16 levels, which ascend and hold 0, in the linear domain."""

    bits = 4

    def block_contraction(self, width: int) -> float:
        """Sharp, but for the width of a cell."""
        return contraction_of_nearest(self.levels, width, self.reach, self.scale, cell_size(self.reach))

    def tables(self) -> Tables:
        """Also the level of each cell."""
        return *super().tables(), cells_of_levels(self.levels, self.reach)

    def to_codes(self, scaled: Tensor, draws: Tensor | None, tables: Tables) -> Tensor:
        last = len(tables[2]) - 1
        cells = scaled.add_(self.reach).mul_(last / (2 * self.reach)).to(torch.int32).clamp_(0, last)
        return tables[2].index_select(0, cells.view(-1)).view(cells.shape)
