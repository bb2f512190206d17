"""Send a run of neighbouring coordinates, the same on all ranks ("random block" of Vogels et al. 2019,
arXiv:1905.13727, section 4.1).

Ranks draw where it begins from a seed that they share and the number of the round; a run that meets the end goes on at
the beginning, so each coordinate goes with probability k / d and ``E |x - C(x)|^2 = (1 - k / d) |x|^2``. It reads
and writes memory in one sweep, which makes it quicker than `RandomK`; but neighbours, such as the weights of one layer,
stay away together for long.

Differs from the paper in: one block of the whole bucket rather than of each tensor, and it wraps around.
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
class RandomBlock(Compressor[ChosenState]):
    """The mean of a randomly placed block, zero elsewhere.

    Attributes:
        density: k / d, the share that is sent.
        values: how the chosen values are averaged; elementwise, such as `Quantized`.
        seed: of the places; equal on all ranks.
    """

    density: float = 0.01
    values: Compressor = Identity()
    seed: int = 0
    elementwise: ClassVar[bool] = True
    passes_nonfinite: ClassVar[bool] = False  # it vanishes where it is not chosen

    def __post_init__(self) -> None:
        check_chosen("RandomBlock", self.density, self.values)

    def init(self, like: Tensor) -> ChosenState:
        """Round 0."""
        return ChosenState(0, self.values.init(like.new_empty(num_chosen(like.numel(), self.density))))

    def mean(
        self, x: Tensor, state: ChosenState, comm: Comm
    ) -> Generator[Work[Any], Any, tuple[Tensor, Tensor, ChosenState]]:
        """What ``values`` needs for k values."""
        num = x.numel()
        where = torch.arange(num_chosen(num, self.density), device=x.device)
        if num:
            start = torch.randint(num, (), generator=rng(self.seed, "random_block", state.round + 1)).to(x.device)
            where = (where + start) % num
        return (yield from mean_of_chosen(x, where, self.values, state, comm, 1.0))

    def sent_bytes(self, shape: Sequence[int], element_bytes: int, num_members: int) -> float:
        """See `Compressor.sent_bytes`."""
        return self.values.sent_bytes([num_chosen(prod(shape), self.density)], element_bytes, num_members)
