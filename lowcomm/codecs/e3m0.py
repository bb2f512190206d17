"""Floats of 4 bits without a mantissa, e3m0: a sign and a power of two, or zero.

Streaming DiLoCo (arXiv:2501.18512) sends outer gradients so. It does not say how they are scaled or rounded; here:

- the 7 magnitudes are 2^-6 to 1 times the scale of the block, and one code is zero, exactly;
- rounding is to the nearest in the linear domain, so the border between 2^-j and 2^-j-1 lies at 0.75 2^-j (rounding
  of the logarithm would put it at 0.71 and be biased upwards), and below 2^-7 everything is zero;
- the scale is the largest magnitude of the block, rounded likewise to a power of two, of which one byte keeps the
  exponent; scales of other formats are the largest magnitude itself.
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
        """A power of two may leave the largest magnitude at up to 1.5, the middle to what would be the next level."""
        return 1.5 if self.scale == "e8m0" else 1.0
