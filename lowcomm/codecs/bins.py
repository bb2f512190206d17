"""Two bits a value: which of four bins around the block's mean it lies in; the mean of each bin is sent with them.

Two bins lie on each side of the mean, and the borders of the outer ones some standard deviations away. Since a bin
stands for its own mean, what is lost is only the spread inside bins, whatever the distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from lowcomm.codecs.blocks import BlockCodec, Factors, Layout, Tables
from lowcomm.codecs.levels import look_up


@dataclass(frozen=True)
class Bins(BlockCodec):
    """The mean of one of four bins, all of them in float32: ``2 + 128 / block`` bits a value.

    A row of zeros stays zero and a constant row what it is, exactly.

    Attributes:
        sigmas: width of all four bins together in standard deviations, if they were equally wide; so the borders are
            the mean, and a quarter of this on both sides of it. 4 is close to the best for a normal distribution.
        block: values that share four means.
    """

    sigmas: float = 4.0
    block: int = 4096

    def __post_init__(self) -> None:
        if not self.sigmas > 0:
            raise ValueError(f"Bins(sigmas={self.sigmas}): it must be above 0; 4 suits most values")
        self.layout()

    def layout(self) -> Layout:
        return Layout(self.block, 2, torch.float32, 4)

    def block_contraction(self, width: int) -> float:
        """What the bins' means keep of the spread d around the mean, of which |d|^2 = width sigma^2.

        No |d| exceeds M = sigma sqrt(width - 1). In an outer bin all |d| lie in [c sigma, M], so its mean keeps
        4 r / (1 + r)^2 of the sum of squares there, r = c / sqrt(width - 1) (Cassels' inequality). The inner bins, with
        the part i of |d|^2, keep at least (sum |d|)^2 / width >= i^2 / c^2 of |d|^2. The least of the sum over i is
        the bound. It is met nearly by one large value among many of one standard deviation.
        """
        border = self.sigmas / 4
        ratio = min(1.0, border / sqrt(max(width - 1, 1)))
        kept = 4 * ratio / (1 + ratio) ** 2
        inner = min(1.0, kept * border**2 / 2)
        return min(1.0, kept * (1 - inner) + (inner / border) ** 2) * (1 - 1e-4)

    def encode_blocks(self, x: Tensor, draws: Tensor | None, tables: Tables) -> tuple[Tensor, Tensor]:
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        largest = torch.maximum(high, -low)
        scaled = x / largest.masked_fill(largest == 0, 1.0)  # so that no sum or square leaves float32's range
        mean = scaled.mean(1, keepdim=True)
        deviation = torch.linalg.vector_norm(scaled - mean, dim=1, keepdim=True) / sqrt(x.shape[1])
        border = deviation * (self.sigmas / 4)
        codes = (scaled >= mean).to(torch.uint8)
        codes += scaled >= mean + border
        codes += scaled >= mean - border
        means = []
        for code in range(4):
            inside = codes == code
            total = torch.where(inside, scaled, 0.0).sum(1, keepdim=True)
            means.append(total / inside.sum(1, keepdim=True).clamp_(min=1) * largest)
        # rounding must not move a mean out of where the values are: so constants stay what they are
        return torch.cat(means, 1).clamp_(low, high), codes

    def decode_blocks(self, header: Tensor, packed: Tensor, out: Tensor, tables: Tables) -> Factors:
        return look_up(header, packed, out), 1.0
