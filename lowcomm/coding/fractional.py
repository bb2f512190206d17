"""Fractional repetition (Tandon, Lei, Dimakis, Karampatziakis 2017, arXiv:1612.03301, section 3).

Workers form groups of s + 1, which all compute the same s + 1 partitions and send their sum. Any s may be missing, as
one of each group is left; often more. All factors are 1, so that a lossy wire costs no more than without a code.

Differs from the paper in: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lowcomm.coding.base import Code, Weights, check_code


@dataclass(frozen=True)
class FractionalRepetition(Code):
    """Groups that do the same work.

    Attributes:
        num_workers: a multiple of num_stragglers + 1.
        num_stragglers: how many may be missing.
    """

    num_workers: int
    num_stragglers: int

    def __post_init__(self) -> None:
        check_code(self)
        if self.num_workers % (self.num_stragglers + 1):
            raise ValueError(
                f"{self}: groups of {self.num_stragglers + 1} do not divide {self.num_workers} workers; change a "
                "number, or take CyclicRepetition"
            )

    @property
    def exact_wire_only(self) -> bool:
        return False

    def group(self, worker: int) -> range:
        """Those who do the same work, and also the partitions that they compute."""
        size = self.num_stragglers + 1
        return range(worker // size * size, (worker // size + 1) * size)

    def coefficients(self, worker: int) -> Weights:
        return tuple((partition, 1.0) for partition in self.group(worker))

    def weights(self, workers: frozenset[int]) -> Weights:
        """1 for the first who came of each group."""
        first = {self.group(worker).start: worker for worker in sorted(workers, reverse=True)}
        missing = [i for i in range(0, self.num_workers, self.num_stragglers + 1) if i not in first]
        if missing:
            raise ValueError(f"{self}: nobody came of the groups of {missing}; wait for one of each")
        return tuple((first[i], 1.0) for i in sorted(first))

    def disagreeing(self, digests: Mapping[int, str]) -> list[int]:
        """The workers whose message is another than that of the first of their group.

        What is not gradients, such as the deltas of local steps, may be coded as well, if it follows bit by bit from
        parameters, partition and seed. This tells whether it did.

        Args:
            digests: of the messages that came, by worker.
        """
        first = {self.group(worker): digest for worker, digest in sorted(digests.items(), reverse=True)}
        return sorted(worker for worker, digest in digests.items() if digest != first[self.group(worker)])
