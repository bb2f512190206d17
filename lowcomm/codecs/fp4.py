"""Floats of 4 bits, e2m1: a sign and one of 0, 0.5, 1, 1.5, 2, 3, 4 and 6, times the scale of the block.

Unlike in the OCP microscaling formats nothing saturates: the scale is the smallest with which 6 is the nearest float
to the block's largest magnitude. A power of two (e8m0) may leave it between 6 and 7; finer scales put it at 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowcomm.codecs.scaled import LevelCodec
from lowcomm.codecs.scales import ScaleFormat

MAGNITUDES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class FP4(LevelCodec):
    """The nearest float of 4 bits: 4 bits a value, and the block's scale.

    Attributes:
        block: values that share a scale.
        scale: its format; one of 2 bytes costs half a bit a value at this block and loses about 1% less of |x|.
    """

    block: int = 32
    scale: ScaleFormat = "e8m0"
    levels: ClassVar[tuple[float, ...]] = (*(-m for m in reversed(MAGNITUDES)), 0.0, *MAGNITUDES)

    @property
    def reach(self) -> float:
        return 7.0 if self.scale == "e8m0" else 6.0
