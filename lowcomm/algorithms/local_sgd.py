"""Local SGD: local steps, then average the parameters (Stich 2018, arXiv:1805.09767; FedAvg: McMahan et al. 2017,
arXiv:1602.05629).

    every `every` inner steps:   local_i <- sum_j w_j local_j

It is DiLoCo with outer SGD(lr=1): the anchor, less the mean of what the replicas moved away from it, is their mean.
With `After`, which begins in data parallel, it is post-local SGD (Lin et al. 2018, arXiv:1808.07217).

Differs from the paper in: works with any inner optimizer, whose state stays local; what is sent is the difference to
the last average, so that a lossy reducer never rounds the parameters themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.qsr import QSR
from lowcomm.outer.base import Outer
from lowcomm.outer.sgd import SGD


@dataclass(frozen=True)
class LocalSGD(DiLoCo):
    """Periodic parameter averaging.

    Traffic of a round: as DiLoCo, whose options it has but for the outer optimizer.

    Attributes:
        every: inner steps a round; 1 with inner SGD is data parallel. A `QSR` lets rounds grow as the learning rate
            falls.
        outer: averages; not to be chosen.
    """

    every: int | QSR = 16
    outer: Outer = field(default=SGD(lr=1.0), init=False)
