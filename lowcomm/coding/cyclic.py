"""Cyclic repetition (Tandon, Lei, Dimakis, Karampatziakis 2017, arXiv:1612.03301, section 4, algorithm 2).

Worker i computes partitions i, ..., i + s, modulo n, and sends sum_j B[i, j] g_j. H is s x n, normal but for its last
column, which makes H 1 = 0. Row i of B has B[i, i] = 1, and solves H[:, i+1..i+s] b = -H[:, i]. So H B^T = 0, the rows
of B span the null space of H, and 1 is a combination of any n - s of them: sum_i a_i B[i] = 1.

The factors a grow with n, to thousands at n = 64, and multiply what a lossy wire rounds off.

Differs from the paper in: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowcomm.coding.base import Code, Weights, check_code
from lowcomm.tensors import rng

_TOLERANCE = 1e-6


@dataclass(frozen=True)
class CyclicRepetition(Code):
    """Overlapping shares, for any number of stragglers.

    Attributes:
        num_workers: n.
        num_stragglers: s, how many may be missing.
        seed: of the factors.
    """

    num_workers: int
    num_stragglers: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_code(self)

    @property
    def exact_wire_only(self) -> bool:
        return self.num_stragglers > 0

    @cached_property
    def matrix(self) -> Tensor:
        """B, ``[num_workers, num_workers]`` in float64."""
        n, s = self.num_workers, self.num_stragglers
        drawn = torch.randn(s, n - 1, generator=rng(self.seed, "cyclic", n, s), dtype=torch.float64)
        h = torch.cat([drawn, -drawn.sum(1, keepdim=True)], 1)
        b = torch.eye(n, dtype=torch.float64)
        for i in range(n if s else 0):
            others = [(i + j) % n for j in range(1, s + 1)]
            b[i, others] = torch.linalg.solve(h[:, others], -h[:, i])
        return b

    def coefficients(self, worker: int) -> Weights:
        partitions = [(worker + j) % self.num_workers for j in range(self.num_stragglers + 1)]
        return tuple((j, float(self.matrix[worker, j])) for j in partitions)

    def weights(self, workers: frozenset[int]) -> Weights:
        came = sorted(workers)
        needed = self.num_workers - self.num_stragglers
        if len(came) < needed:
            raise ValueError(f"{self}: {len(came)} workers came, and {needed} are needed; wait for more")
        rows, ones = self.matrix[came], torch.ones(self.num_workers, dtype=torch.float64)
        a = torch.linalg.lstsq(rows.T, ones, driver="gelsd").solution
        off = float((a @ rows - 1).abs().max())
        if off > _TOLERANCE:
            raise ValueError(f"{self}: workers {came} decode with an error of {off:.1e}; take another seed")
        return tuple(zip(came, a.tolist(), strict=True))
