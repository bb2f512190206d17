"""What a block keeps as its scale: a positive number in a small format, rounded up."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lowcomm.codecs.packing import as_bytes, from_bytes

ScaleFormat = Literal["float32", "bfloat16", "float16", "e8m0"]
SCALE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "e8m0": 1}
# How much larger than what it stands for a rounded scale can be. In float16 only between 6.1e-5 and 65504: larger
# scales take the largest, so that their block saturates, and smaller ones are coarse.
SCALE_GROWTH: dict[str, float] = {"float32": 1.0, "bfloat16": 1 + 2**-7, "float16": 1 + 2**-10, "e8m0": 2.0}


def check_scale(scale: str) -> None:
    """Refuse a format that is not known.

    Raises:
        ValueError: naming the choices.
    """
    if scale not in SCALE_BYTES:
        raise ValueError(f"scale is {scale!r}; choose one of {', '.join(SCALE_BYTES)}")


def scale_to_bytes(scale: Tensor, how: ScaleFormat) -> Tensor:
    """Nonnegative float32 ``[num, 1]`` as uint8 ``[num, SCALE_BYTES[how]]``; 0 stays 0.

    Rounded up, so that no value of the block lies beyond what the scale allows; scales too large for the format take
    its largest.
    """
    if how == "float32":
        return as_bytes(scale)
    if how == "float16":
        limited = scale.clamp(max=torch.finfo(torch.float16).max)
        half = limited.to(torch.float16)
        return as_bytes(half.view(torch.int16) + (half.float() < limited))  # the next float is the next integer
    pattern = scale.contiguous().view(torch.int32)
    if how == "bfloat16":
        return as_bytes(((pattern + 0xFFFF) >> 16).clamp_(max=0x7F7F).to(torch.int16))
    return ((pattern + 0x7FFFFF) >> 23).clamp_(max=254).to(torch.uint8)  # the exponent, biased by 127; 0 stands for 0


def scale_from_bytes(raw: Tensor, how: ScaleFormat) -> Tensor:
    """The inverse of `scale_to_bytes`, float32 ``[num, 1]``."""
    if how == "e8m0":
        return (raw.to(torch.int32) << 23).view(torch.float32)
    return from_bytes(raw, getattr(torch, how)).float()
