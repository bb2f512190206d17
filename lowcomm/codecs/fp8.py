"""Floats of 8 bits, e4m3 or e5m2, scaled block by block so that the largest magnitude is the format's largest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowcomm.codecs.blocks import Factors, Tables
from lowcomm.codecs.levels import contraction_of_nearest
from lowcomm.codecs.scaled import ScaledCodec
from lowcomm.codecs.scales import ScaleFormat

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class FP8(ScaledCodec):
    """The nearest float of 8 bits: 8 bits a value, and the block's scale.

    What a cast does beyond the format's range differs between devices, so values are limited before it.

    Attributes:
        kind: e4m3 has 3 bits of mantissa, e5m2 has 2 and more range.
        block: values that share a scale.
        scale: its format.
    """

    kind: Literal["e4m3", "e5m2"] = "e4m3"
    block: int = 256
    scale: ScaleFormat = "float32"
    bits = 8

    def __post_init__(self) -> None:
        if self.kind not in DTYPES:
            raise ValueError(f"FP8(kind={self.kind!r}): choose one of {', '.join(DTYPES)}")
        super().__post_init__()

    @property
    def reach(self) -> float:
        """The format's largest."""
        return torch.finfo(DTYPES[self.kind]).max

    def block_contraction(self, width: int) -> float:
        """Sharp."""
        finite = sorted({value for value in self._values() if abs(value) <= self.reach})
        return contraction_of_nearest(finite, width, self.reach, self.scale)

    def to_codes(self, scaled: Tensor, draws: Tensor | None, tables: Tables) -> Tensor:
        if not torch.compiler.is_compiling():  # where it is, GPUs' casts limit
            scaled.clamp_(-self.reach, self.reach)
        return scaled.to(DTYPES[self.kind]).view(torch.uint8)

    def decode_blocks(self, header: Tensor, packed: Tensor, out: Tensor, tables: Tables) -> Factors:
        # On CPUs several times as fast as a cast: the bits stand in a float16 as they do here, those of e5m2 with the
        # same exponent, those of e4m3 with one that is 8 less. Neither code holds infinities or NaNs.
        half = packed.view(torch.int8).to(torch.int16)
        if self.kind == "e4m3":
            return ((half << 7) & ~0x4000).view(torch.float16), header * 256
        return (half << 8).view(torch.float16), header

    def _values(self) -> list[float]:
        """What each of the 256 codes stands for."""
        return torch.arange(256, dtype=torch.uint8).view(DTYPES[self.kind]).to(torch.float32).tolist()
