"""Send random coordinates, the same on all ranks (Stich et al. 2018, arXiv:1809.07599, definition 2.2, "rand_k").

Ranks draw the places from a seed that they share and the number of the round, so that no index is sent and what was
chosen can be summed on its way. Of d values k go, each set of k as likely as any other:

    E |x - C(x)|^2 = (1 - k / d) |x|^2                  as it is: contracts, so it wants error feedback
    E d/k C(x) = x,   E |x - d/k C(x)|^2 = (d / k - 1) |x|^2        unbiased: errors average out over rounds

Differs from the paper in: the chosen values may be compressed again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowcomm.compress.chosen import Chosen
from lowcomm.tensors import rng


@dataclass(frozen=True)
class RandomK(Chosen):
    """The mean of randomly chosen coordinates, zero elsewhere; its other options are those of `Chosen`.

    With ``unbiased`` both ``sent`` and ``mean`` are d / k times the chosen values, so the law holds. But ``|x -
    sent|^2`` is then d / k - 1 times ``|x|^2`` on average; below density 1/2 that exceeds 1, and a feedback that keeps
    the residual diverges. Use it without memory, or with feedbacks for unbiased compressors, with a step below 1.

    Attributes:
        unbiased: multiply by d / k.
    """

    unbiased: bool = False

    def places(self, num: int, kept: int, round: int, device: torch.device) -> Tensor:
        """Each set as likely as any other."""
        if device.type == "meta":
            return torch.empty(kept, dtype=torch.int64, device=device)
        return draw_distinct(num, kept, rng(self.seed, "random_k", round)).to(device)

    def factor(self, num: int, kept: int) -> float:
        """With ``unbiased`` d / k."""
        return num / kept if self.unbiased and kept else 1.0


def draw_distinct(num: int, kept: int, random: torch.Generator) -> Tensor:
    """``kept`` of the numbers below ``num``, sorted, each set as likely as any other; on the CPU for all devices alike.

    A few of many are drawn with repetitions first, in a time of order ``kept``, not ``num``. The distinct ones form an
    equally likely set of their size, and so do random subsets of it.
    """
    if 0 < 4 * kept <= num:
        drawn: Tensor = torch.randint(num, (2 * kept,), generator=random).unique()
        if len(drawn) >= kept:  # hardly ever not
            return drawn[torch.randperm(len(drawn), generator=random)[:kept].sort().values]
    return torch.randperm(num, generator=random)[:kept].sort().values
