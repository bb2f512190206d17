"""Floats of 4 bits without a mantissa, e3m0: a sign and a power of two, or zero.

Streaming DiLoCo (arXiv:2501.18512) sends outer gradients in this format. It does not say how they are scaled or
rounded. Here:

- the 7 magnitudes are 2^-6 to 1 times the scale of the block, and one code is zero, exactly;
- values are rounded to the nearest, so the border between 2^-j and 2^-j-1 lies at 0.75 2^-j, and everything below 2^-7
  is zero (rounding the logarithm would put the border at 0.71 and be biased upwards);
- the scale is the block's largest magnitude, likewise rounded to a power of two, whose exponent takes one byte; in
other
  formats the scale is the largest magnitude itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowcomm.codecs.scaled import LevelCodec
from lowcomm.codecs.scales import ScaleFormat

MAGNITUDES = tuple(2.0**-j for j in range(6, -1, -1))


@dataclass(frozen=True)
class E3M0(LevelCodec):
    """The nearest signed power of two, or zero: 4 bits a value, and the block's scale.

    Attributes:
        block: values that share a scale.
        scale: its format.
    """

    block: int = 64
    scale: ScaleFormat = "e8m0"
    levels: ClassVar[tuple[float, ...]] = (*(-m for m in reversed(MAGNITUDES)), 0.0, *MAGNITUDES)

    @property
    def reach(self) -> float:
        """With a power of two as scale, the largest magnitude may be 1.5, halfway to what would be the next level."""
        return 1.5 if self.scale == "e8m0" else 1.0
