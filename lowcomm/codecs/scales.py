"""The scale of a block: a nonnegative number in a small format, rounded up."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ScaleFormat = Literal["float32", "bfloat16", "float16", "e8m0"]
SCALE_TYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
SCALE_TYPES["e8m0"] = torch.uint8
# By how much rounding can enlarge a scale. In float16 that holds between 6.1e-5 and 65504: larger scales become the
# largest, so that their block saturates, and smaller ones are coarse.
SCALE_GROWTH: dict[str, float] = {"float32": 1.0, "bfloat16": 1 + 2**-7, "float16": 1 + 2**-10, "e8m0": 2.0}


def check_scale(scale: str) -> None:
    """Refuse a format that is not known.

    Raises:
        ValueError: naming the choices.
    """
    if scale not in SCALE_TYPES:
        raise ValueError(f"scale is {scale!r}; choose one of {', '.join(SCALE_TYPES)}")


def scale_to_format(scale: Tensor, how: ScaleFormat) -> tuple[Tensor, Tensor]:
    """Nonnegative float32 scales ``[num, 1]`` in the format, and as float32 after it; 0 stays 0, NaN is kept as NaN.

    They are rounded up, so that the scale covers every value of its block. Scales too large for the format become its
    largest number.
    """
    if how == "float32":
        return scale, scale.clone()
    if how == "float16":
        limited = scale.clamp(max=torch.finfo(torch.float16).max)
        half = limited.to(torch.float16)
        # the next float is the next integer
        kept = (half.view(torch.int16) + (half.float() < limited)).view(torch.float16)
        return kept, kept.float()
    if how == "bfloat16":
        pattern = scale.clamp(max=torch.finfo(torch.bfloat16).max).view(torch.int32).clamp_(max=0x7FFF0000)
        upper = (pattern + 0xFFFF) >> 16
        return upper.to(torch.int16).view(torch.bfloat16), (upper << 16).view(torch.float32)
    # the exponent, biased by 127; 0 stands for 0, 255 for NaN, whose sum wraps around
    exponent = ((scale.contiguous().view(torch.int32) + 0x7FFFFF) >> 23).clamp_(-1, 254)
    return exponent.to(torch.uint8), (exponent << 23).view(torch.float32)


def scale_from_format(kept: Tensor) -> Tensor:
    """Scales in a format as float32, in the same shape."""
    if kept.dtype != torch.uint8:
        return kept.float()
    return ((kept.to(torch.int32) << 23) | (kept == 255)).view(torch.float32)
