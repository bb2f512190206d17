"""What a gradient code is, and how its messages become the sum of all gradients again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowcomm.codecs.base import Codec

Weights = tuple[tuple[int, float], ...]


class Code(ABC):
    """A code of ``num_workers`` workers and as many partitions of a batch, of whom ``num_stragglers`` may be missing.

    Each worker computes the gradients of some partitions and sends one weighted sum of them: computation grows by
    ``num_stragglers + 1``, traffic does not.
    """

    num_workers: int
    num_stragglers: int

    @abstractmethod
    def coefficients(self, worker: int) -> Weights:
        """The partitions that a worker computes, each with its factor in what it sends."""

    @abstractmethod
    def weights(self, workers: frozenset[int]) -> Weights:
        """Factors of some workers' messages, whose sum is then that of the gradients of all partitions.

        Raises:
            ValueError: when these do not suffice; any ``num_workers - num_stragglers`` do.
        """

    @property
    @abstractmethod
    def exact_wire_only(self) -> bool:
        """Whether decoding multiplies the errors of a lossy wire."""

    @property
    def load(self) -> float:
        """The share of a batch that each worker computes; 1 / num_workers without a code."""
        return (self.num_stragglers + 1) / self.num_workers

    def check_wire(self, codec: Codec | None) -> None:
        """Check that messages may go through a codec.

        Raises:
            ValueError: for a lossy one where decoding would multiply its errors.
        """
        if codec is not None and self.exact_wire_only and codec.contraction(1 << 16) < 1:
            raise ValueError(
                f"{self} with {codec}: decoding multiplies what a lossy code rounds off by 100 and more; send float32, "
                "or take FractionalRepetition, whose factors are all 1"
            )


def encode(code: Code, worker: int, gradients: Mapping[int, Sequence[Tensor]]) -> list[Tensor]:
    """What a worker sends, in float32 or wider.

    Args:
        gradients: lists of tensors by partition, at least of those that `Code.coefficients` names.
    """
    return weighted_sum(code.coefficients(worker), gradients)


def weighted_sum(weights: Weights, of: Mapping[int, Sequence[Tensor]]) -> list[Tensor]:
    """The sum of lists of tensors, each times its factor, in the order of the factors."""
    (first, factor), *others = weights
    total = [factor * x.to(torch.promote_types(x.dtype, torch.float32)) for x in of[first]]
    for i, factor in others:
        for ours, x in zip(total, of[i], strict=True):
            ours.add_(x, alpha=factor)
    return total


def check_code(code: Code) -> None:
    """Refuse a code without workers, or with fewer workers than may be missing.

    Raises:
        ValueError: naming the numbers.
    """
    if not 0 <= code.num_stragglers < code.num_workers:
        raise ValueError(f"{code}: of {code.num_workers} workers 0 to {code.num_workers - 1} may be missing")


@dataclass
class Decoder:
    """Decodes, and remembers the factors of each set of workers that was met.

    Attributes:
        code: the messages' code.
    """

    code: Code
    _weights: dict[frozenset[int], Weights] = field(default_factory=dict)

    def weights(self, workers: frozenset[int]) -> Weights:
        """As the code's, worked out once for each set."""
        if workers not in self._weights:
            self._weights[workers] = self.code.weights(workers)
        return self._weights[workers]

    def decode(self, messages: Mapping[int, Sequence[Tensor]]) -> list[Tensor]:
        """The sum of the gradients of all partitions, from the messages of those who came, by worker.

        Raises:
            ValueError: when too few came.
        """
        return weighted_sum(self.weights(frozenset(messages)), messages)
