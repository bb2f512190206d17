"""Compute times drawn at random, a function of (seed, rank, t) whatever was asked before.

A block of steps of one rank is drawn at once. As factors of a `Product` the models take their default of one second.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowcomm.sim.cluster.compute import ComputeModel
from lowcomm.sim.cluster.inputs import check_positive
from lowcomm.tensors import rng

_BLOCK = 64  # steps drawn at once: the cost of a generator, some 20 microseconds, is paid once for all of them


@dataclass(frozen=True, kw_only=True)
class Drawn(ComputeModel, ABC):
    """Times drawn at random, a block of steps of one rank at a time; only the last block of each rank is kept.

    Attributes:
        seed: two factors of one class need different seeds, or they draw the same numbers.
    """

    seed: int = 0
    _kept: dict[int, tuple[int, Sequence[float]]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def seconds(self, rank: int, t: int, start: float) -> float:
        """The draw of (seed, rank, t)."""
        block, i = divmod(t - 1, _BLOCK)
        kept = self._kept.get(rank)
        if kept is None or kept[0] != block:
            assert t >= 1, "inner steps count from 1"
            kept = self._kept[rank] = (block, array("d", self.block_seconds(rank, block).tolist()))
        return kept[1][i]

    def streams(self) -> Sequence[tuple[str, int]]:
        return ((type(self).__name__, self.seed),)

    def uniforms(self, rank: int, block: int) -> Tensor:
        """Independent uniform numbers in (0, 1), one for each step of a block; float64 [64]."""
        generator = rng(self.seed, "compute", type(self).__name__, rank, block)
        # the device is said because timing-only runs may have made "meta" the default
        u = torch.rand(_BLOCK, dtype=torch.float64, generator=generator, device="cpu")
        return u.clamp_(min=2.0**-54)

    @abstractmethod
    def block_seconds(self, rank: int, block: int) -> Tensor:
        """Seconds of the steps of ``block`` = 0, 1, ... on a rank; float64 [64]."""


@dataclass(frozen=True)
class LogNormal(Drawn):
    """Log-normal times, as FedScale draws them (arXiv:2105.11367; its log-normal has sigma 0.6).

    Attributes:
        mean_s: the mean; the median is ``mean_s * exp(-sigma**2 / 2)``.
        sigma: standard deviation of the logarithm.
    """

    mean_s: float = 1.0
    sigma: float = 0.6

    def __post_init__(self) -> None:
        check_positive("mean_s", self.mean_s)
        check_positive("sigma", self.sigma)

    def block_seconds(self, rank: int, block: int) -> Tensor:
        normals = torch.special.ndtri(self.uniforms(rank, block))
        return self.mean_s * torch.exp(self.sigma * normals - self.sigma**2 / 2)


@dataclass(frozen=True)
class ShiftedExponential(Drawn):
    """``mean_s * ((1 - a) + a * Exp(1))``, the times of the DBW experiments with a = 0.2, 0.5, 1 (arXiv:2004.14696).

    Attributes:
        mean_s: the mean whatever ``a``.
        a: the random share of the mean, in (0, 1].
    """

    mean_s: float = 1.0
    a: float = 0.2

    def __post_init__(self) -> None:
        check_positive("mean_s", self.mean_s)
        if not 0 < self.a <= 1:
            raise ValueError(f"a is {self.a}; the random share must lie in (0, 1] (for no randomness take Constant)")

    def block_seconds(self, rank: int, block: int) -> Tensor:
        return self.mean_s * ((1 - self.a) - self.a * torch.log(self.uniforms(rank, block)))


@dataclass(frozen=True)
class Pareto(Drawn):
    """Heavy tails: P(time > x) = (x_min / x)^alpha for x >= x_min = mean_s (alpha - 1) / alpha.

    Attributes:
        mean_s: the mean.
        alpha: the tail; 1.5, 2 and 3 are usual. At 2 or less the variance is infinite.
    """

    mean_s: float = 1.0
    alpha: float = 2.0

    def __post_init__(self) -> None:
        check_positive("mean_s", self.mean_s)
        if not 1 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}; it must be above 1, below which the mean is infinite, and finite")

    def block_seconds(self, rank: int, block: int) -> Tensor:
        shortest = self.mean_s * (self.alpha - 1) / self.alpha
        return shortest * self.uniforms(rank, block) ** (-1 / self.alpha)


@dataclass(frozen=True)
class Bimodal(Drawn):
    """Some ranks are slow for the whole run.

    Attributes:
        usual_s: a step on the others.
        probability: that a rank is slow, drawn for each on its own.
        factor: a slow rank takes this times ``usual_s``.
    """

    usual_s: float = 1.0
    probability: float = 0.1
    factor: float = 5.0

    def __post_init__(self) -> None:
        check_positive("usual_s", self.usual_s)
        check_positive("factor", self.factor)
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability is {self.probability}; it must lie in [0, 1]")

    def block_seconds(self, rank: int, block: int) -> Tensor:
        is_slow = bool(self.uniforms(rank, 0)[0] < self.probability)
        seconds = self.usual_s * (self.factor if is_slow else 1.0)
        return torch.full((_BLOCK,), seconds, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class Markov(Drawn):
    """Bursts of slowness: a two-state Markov chain over the steps of each rank, stationary from its first step.

    Sequential gradient coding measures bursts of mostly one or two rounds (arXiv:2211.13802) and codes for 27
    stragglers of 256; a round of many inner steps needs a ``mean_burst`` of as many times more.

    Attributes:
        usual_s: a step outside a burst.
        factor: a step in a burst takes this times ``usual_s``.
        slow_share: the share of steps that lie in bursts.
        mean_burst: mean length of a burst in inner steps; lengths are geometric.
    """

    usual_s: float = 1.0
    factor: float = 5.0
    slow_share: float = 0.1
    mean_burst: float = 1.5

    def __post_init__(self) -> None:
        check_positive("usual_s", self.usual_s)
        check_positive("factor", self.factor)
        if not 1 <= self.mean_burst < math.inf:
            raise ValueError(f"mean_burst is {self.mean_burst}; a burst lasts at least 1 step, and ends")
        if not (0 < self.slow_share < 1 and self._start_probability() < 1):
            limit = self.mean_burst / (self.mean_burst + 1)
            raise ValueError(
                f"slow_share is {self.slow_share}; it must lie between 0 and {limit:.4g}, as "
                f"bursts of {self.mean_burst} steps are at least 1 step apart: lengthen mean_burst for a larger share"
            )

    def _start_probability(self) -> float:
        # in balance as many bursts start as end: (1 - share) start = share / mean_burst
        return self.slow_share / (1 - self.slow_share) / self.mean_burst

    def block_seconds(self, rank: int, block: int) -> Tensor:
        start, stay = self._start_probability(), 1 - 1 / self.mean_burst
        low, high = min(start, stay), max(start, stay)
        # A step is slow when u < (stay if the last was slow, else start), so a u outside [low, high) settles its step
        # whatever came before. Looking back for the last such one, into blocks before the run if need be, gives the
        # chain at any block without walking there from the first step.
        us = self.uniforms(rank, block).tolist()
        history, before = [us[0]], block
        blocks = [us]
        while all(low <= u < high for u in history):
            before -= 1
            history = self.uniforms(rank, before).tolist()
            blocks.append(history)
        is_slow, slow = False, []
        for u in (u for part in reversed(blocks) for u in part):
            is_slow = u < (stay if is_slow else start)
            slow.append(is_slow)
        return self.usual_s * (1 + (self.factor - 1) * torch.tensor(slow[-_BLOCK:], dtype=torch.float64, device="cpu"))
