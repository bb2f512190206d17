"""Floats of 8 bits, e4m3 or e5m2, scaled block by block so that the largest magnitude is the format's largest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowcomm.codecs.blocks import BlockCodec, BlockDecoder, BlockEncoder, Layout
from lowcomm.codecs.levels import contraction_of_nearest
from lowcomm.codecs.scales import SCALE_BYTES, ScaleFormat, check_scale, scale_from_bytes, scale_to_bytes

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class FP8(BlockCodec):
    """The nearest float of 8 bits: ``8 + 8 * SCALE_BYTES[scale] / block`` bits a value.

    What a cast does beyond the format's range differs between devices, so values are limited before it.

    Attributes:
        kind: e4m3 has 3 bits of mantissa, e5m2 has 2 and more range.
        block: values that share a scale.
        scale: its format.
    """

    kind: Literal["e4m3", "e5m2"] = "e4m3"
    block: int = 256
    scale: ScaleFormat = "float32"

    def __post_init__(self) -> None:
        if self.kind not in DTYPES:
            raise ValueError(f"FP8(kind={self.kind!r}): choose one of {', '.join(DTYPES)}")
        check_scale(self.scale)
        self.layout()

    def layout(self) -> Layout:
        """See `BlockCodec.layout`."""
        return Layout(self.block, 8, SCALE_BYTES[self.scale])

    def block_contraction(self, width: int) -> float:
        """Sharp."""
        finite = sorted({value for value in self._values() if abs(value) <= self._largest})
        return contraction_of_nearest(finite, width, self._largest, self.scale)

    def encoder(self, device: torch.device, random: torch.Generator | None) -> BlockEncoder:
        """See `BlockCodec.encoder`."""
        largest = self._largest

        def encode(x: Tensor) -> tuple[Tensor, Tensor]:
            header = scale_to_bytes(x.abs().amax(1, keepdim=True) / largest, self.scale)
            step = scale_from_bytes(header, self.scale)
            scaled = (x / step.masked_fill_(step == 0, 1.0)).clamp_(-largest, largest)
            return header, scaled.to(DTYPES[self.kind]).view(torch.uint8)

        return encode

    def decoder(self, device: torch.device) -> BlockDecoder:
        """See `BlockCodec.decoder`."""
        e4m3 = self.kind == "e4m3"

        def decode(header: Tensor, codes: Tensor, out: Tensor) -> None:
            # On CPUs several times as fast as a cast: the bits stand in a float16 as they do here, those of e5m2 with
            # the same exponent, those of e4m3 with one that is 8 less. Neither code holds infinities or NaNs.
            half = codes.view(torch.int8).to(torch.int16)
            half = (half << 7) & ~0x4000 if e4m3 else half << 8
            step = scale_from_bytes(header, self.scale)
            out.copy_(half.view(torch.float16)).mul_(step * 256 if e4m3 else step)

        return decode

    @property
    def _largest(self) -> float:
        return torch.finfo(DTYPES[self.kind]).max

    def _values(self) -> list[float]:
        """What each of the 256 codes stands for."""
        return torch.arange(256, dtype=torch.uint8).view(DTYPES[self.kind]).to(torch.float32).tolist()
