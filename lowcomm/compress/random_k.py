"""Send random coordinates, the same on all ranks (Stich et al. 2018, arXiv:1809.07599, definition 2.2, "rand_k").

Ranks draw the places from a seed that they share and the number of the round, so that no index is sent and what was
chosen can be summed on its way. Of d values k go, each set of k as likely as any other:

    E |x - C(x)|^2 = (1 - k / d) |x|^2                  as it is: contracts, so it wants error feedback
    E d/k C(x) = x,   E |x - d/k C(x)|^2 = (d / k - 1) |x|^2        unbiased: errors average out over rounds

Differs from the paper in: the chosen values may be compressed again.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowcomm.comm.base import Comm, Work
from lowcomm.compress.base import Compressor
from lowcomm.compress.chosen import ChosenState, check_chosen, mean_of_chosen, num_chosen
from lowcomm.compress.identity import Identity
from lowcomm.tensors import rng


@dataclass(frozen=True)
class RandomK(Compressor[ChosenState]):
    """The mean of randomly chosen coordinates, zero elsewhere.

    With ``unbiased`` both ``sent`` and ``mean`` are d / k times the chosen values, so the law holds, but ``sent`` then
    overshoots: ``|x - sent|^2`` is d / k - 1 times ``|x|^2`` on average, and below density 1/2, where that exceeds 1, a
    feedback that remembers the residual diverges. It is for averages without memory, and for feedbacks made for
    unbiased compressors, with a step below 1.

    Attributes:
        density: k / d, the share that is sent.
        values: how the chosen values are averaged; elementwise, such as `Quantized`.
        unbiased: multiply by d / k.
        seed: of the coordinates; equal on all ranks.
    """

    density: float = 0.01
    values: Compressor = Identity()
    unbiased: bool = False
    seed: int = 0
    elementwise: ClassVar[bool] = True
    passes_nonfinite: ClassVar[bool] = False  # it vanishes where it is not chosen

    def __post_init__(self) -> None:
        check_chosen("RandomK", self.density, self.values)

    def init(self, like: Tensor) -> ChosenState:
        """Round 0."""
        return ChosenState(0, self.values.init(like.new_empty(num_chosen(like.numel(), self.density))))

    def mean(
        self, x: Tensor, state: ChosenState, comm: Comm
    ) -> Generator[Work[Any], Any, tuple[Tensor, Tensor, ChosenState]]:
        """What ``values`` needs for k values."""
        num = x.numel()
        kept = num_chosen(num, self.density)
        if x.is_meta:
            where = torch.empty(kept, dtype=torch.int64, device="meta")
        else:
            where = draw_distinct(num, kept, rng(self.seed, "random_k", state.round + 1)).to(x.device)
        factor = num / kept if self.unbiased and kept else 1.0
        return (yield from mean_of_chosen(x, where, self.values, state, comm, factor))

    def sent_bytes(self, shape: Sequence[int], element_bytes: int, num_members: int) -> float:
        """See `Compressor.sent_bytes`."""
        return self.values.sent_bytes([num_chosen(prod(shape), self.density)], element_bytes, num_members)


def draw_distinct(num: int, kept: int, random: torch.Generator) -> Tensor:
    """``kept`` of the numbers below ``num``, sorted, each set as likely as any other; on the CPU for all devices alike.

    A few of many are drawn with repetitions first, which takes a time in ``kept`` rather than ``num``: all sets of one
    size are equally likely among the distinct numbers that come out, and so are the subsets of those.
    """
    if 0 < 4 * kept <= num:
        drawn: Tensor = torch.randint(num, (2 * kept,), generator=random).unique()
        if len(drawn) >= kept:  # hardly ever not
            return drawn[torch.randperm(len(drawn), generator=random)[:kept].sort().values]
    return torch.randperm(num, generator=random)[:kept].sort().values
