"""NormalFloat of 4 bits (QLoRA, arXiv:2305.14314): 16 levels at quantiles of a normal distribution, from -1 to 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowcomm.codecs.scaled import LevelCodec
from lowcomm.codecs.scales import ScaleFormat

NEGATIVE = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004)
POSITIVE = (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)


@dataclass(frozen=True)
class NF4(LevelCodec):
    """The nearest level, times the block's largest magnitude: 4 bits a value, and the block's scale.

    Attributes:
        block: values that share a scale.
        scale: its format. float16 is as usual as bfloat16 and as large, but gradients can be too small for it.
    """

    block: int = 64
    scale: ScaleFormat = "bfloat16"

    reach: ClassVar[float] = 1.0
    levels: ClassVar[tuple[float, ...]] = (*NEGATIVE, 0.0, *POSITIVE)
