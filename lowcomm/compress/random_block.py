"""Send a run of neighbouring coordinates, the same on all ranks ("random block" of Vogels et al. 2019,
arXiv:1905.13727, section 4.1).

Ranks draw its start from a shared seed and the number of the round. A block that reaches the end goes on at the
beginning, so each coordinate is sent with probability k / d and ``E |x - C(x)|^2 = (1 - k / d) |x|^2``. It is quicker
than `RandomK`, as it reads and writes memory in one sweep. But neighbours, such as the weights of one layer, are left
out together for long.

Differs from the paper in: one block of the whole bucket rather than of each tensor, and it wraps around.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowcomm.compress.chosen import Chosen
from lowcomm.tensors import rng


@dataclass(frozen=True)
class RandomBlock(Chosen):
    """The mean of a randomly placed block, zero elsewhere; its options are those of `Chosen`."""

    def places(self, num: int, kept: int, round: int, device: torch.device) -> Tensor:
        where = torch.arange(kept, device=device)
        if num:
            start = torch.randint(num, (), generator=rng(self.seed, "random_block", round)).to(device)
            where = (where + start) % num
        return where
