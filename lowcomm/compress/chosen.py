"""The mean of a few coordinates that all ranks know without being told."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowcomm.comm.base import Comm, Work
from lowcomm.compress.base import Compressor


@dataclass
class ChosenState:
    """What changes between rounds.

    Attributes:
        round: the number of rounds so far, equal on all ranks: it decides the coordinates.
        values: of the compressor of the chosen values.
    """

    round: int
    values: Any


def check_chosen(name: str, density: float, values: Compressor) -> None:
    """Refuse a density that is none, and values that are averaged by looking at shapes.

    Raises:
        ValueError: with the value, the limit and the remedy.
    """
    if not 0 < density <= 1:
        raise ValueError(f"{name}(density={density}): it is the share that is sent, above 0 and at most 1")
    if not values.elementwise:
        raise ValueError(f"{name}(values={values}): what was chosen has no shape; take an elementwise compressor")


def num_chosen(num: int, density: float) -> int:
    """How many of ``num`` coordinates go: at least 1, if there is any."""
    return min(num, max(1, round(num * density)))


def mean_of_chosen(
    x: Tensor, where: Tensor, values: Compressor, state: ChosenState, comm: Comm, factor: float
) -> Generator[Work[Any], Any, tuple[Tensor, Tensor, ChosenState]]:
    """`Compressor.mean` on the coordinates ``where`` (int64, distinct, equal on all ranks), zero elsewhere.

    Both ``sent`` and ``mean`` are multiplied by ``factor``.
    """
    chosen = x.reshape(-1).index_select(0, where)
    sent, mean, inner = yield from values.mean(chosen, state.values, comm)

    def spread(picked: Tensor) -> Tensor:
        whole = torch.zeros(x.numel(), dtype=x.dtype, device=x.device)
        return whole.index_copy_(0, where, picked if factor == 1 else picked * factor).view(x.shape)

    return spread(sent), spread(mean), ChosenState(state.round + 1, inner)
