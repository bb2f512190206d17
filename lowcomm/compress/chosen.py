"""Averages of a few coordinates that all ranks derive from a seed and the round."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowcomm.comm.base import Comm, Work
from lowcomm.compress.base import Compressor, first_count
from lowcomm.compress.identity import Identity


@dataclass
class ChosenState:
    """What changes between rounds.

    Attributes:
        round: the number of rounds so far, equal on all ranks: it decides the coordinates.
        values: state of the compressor of the chosen values.
    """

    round: int
    values: Any


@dataclass(frozen=True)
class Chosen(Compressor[ChosenState], ABC):
    """The mean at chosen coordinates, zero elsewhere.

    Attributes:
        density: k / d, the share that is sent.
        values: how the chosen values are averaged; elementwise, such as `Quantized`.
        seed: of the coordinates; equal on all ranks.
    """

    density: float = 0.01
    values: Compressor = Identity()
    seed: int = 0
    elementwise: ClassVar[bool] = True
    passes_nonfinite: ClassVar[bool] = False  # it vanishes where it is not chosen

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not 0 < self.density <= 1:
            raise ValueError(f"{name}(density={self.density}): it is the share that is sent, above 0 and at most 1")
        if not self.values.elementwise:
            raise ValueError(
                f"{name}(values={self.values}): what was chosen has no shape; take an elementwise compressor"
            )

    @abstractmethod
    def places(self, num: int, kept: int, round: int, device: torch.device) -> Tensor:
        """The ``kept`` of ``num`` coordinates sent in a round: int64 ``[kept]``, distinct, equal on all ranks."""

    def factor(self, num: int, kept: int) -> float:
        """What both ``sent`` and ``mean`` are multiplied by; 1 by default."""
        del num, kept
        return 1.0

    def num_kept(self, num: int) -> int:
        """How many of ``num`` coordinates are sent: at least 1, if there is any."""
        return min(num, max(1, round(num * self.density)))

    def init(self, like: Tensor) -> ChosenState:
        """Round 0."""
        return ChosenState(0, self.values.init(like.new_empty(self.num_kept(like.numel()))))

    def mean(
        self, x: Tensor, state: ChosenState, comm: Comm, wants_sent: bool = True
    ) -> Generator[Work[Any], Any, tuple[Tensor, Tensor, ChosenState]]:
        num, kept, shape, dtype, device = x.numel(), self.num_kept(x.numel()), x.shape, x.dtype, x.device
        where, factor = self.places(num, kept, state.round + 1, device), self.factor(num, kept)
        picked = x.reshape(-1).index_select(0, where)
        del x
        sent, mean, inner = yield from self.values.mean(picked, state.values, comm, wants_sent)

        def spread(picked: Tensor) -> Tensor:
            whole = torch.zeros(num, dtype=dtype, device=device)
            return whole.index_copy_(0, where, picked if factor == 1 else picked * factor).view(shape)

        mean = spread(mean)
        return spread(sent) if wants_sent else mean, mean, ChosenState(state.round + 1, inner)

    def keeps_values(self) -> bool:
        return False

    def num_messages(self) -> int:
        return self.values.num_messages()

    def divides_by_all(self) -> bool:
        return self.values.divides_by_all()

    def sent_bytes(self, shape: Sequence[int], element_bytes: int, num_members: int) -> float:
        return self.values.sent_bytes([self.num_kept(prod(shape))], element_bytes, num_members)

    def resync(self, state: ChosenState, comm: Comm) -> Generator[Work[Any], Any, ChosenState]:
        """The first member's count of rounds, on which the coordinates depend."""
        count = yield from first_count(state.round, comm)
        return ChosenState(count, (yield from self.values.resync(state.values, comm)))
