"""A code for vectors: what a compressor puts on the wire."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Codec(ABC):
    """Codes vectors as bytes, of a size that depends only on their length.

    Each row is coded separately, so rows can go to different ranks. Frozen and stateless; it also works on
    ``device="meta"``.
    """

    @property
    def stochastic(self) -> bool:
        """Whether it rounds at random, so that decoding is unbiased. By default not."""
        return False

    @abstractmethod
    def num_bytes(self, num: int) -> int:
        """Exact size of a payload of ``num`` values; 0 for none."""

    @abstractmethod
    def contraction(self, num: int) -> float:
        """The delta in (0, 1] of ``|decode(encode(x)) - x|^2 <= (1 - delta) |x|^2``, for every x of ``num`` values.

        For codecs that round at random it holds in expectation and 1 - delta is the variance, which may exceed 1. An
        exact code has 1. It is for magnitudes that the code's floats can hold, away from their very smallest and
        largest.
        """

    @abstractmethod
    def encode(self, x: Tensor, random: torch.Generator | None = None) -> Tensor:
        """Finite floating values ``[rows, num]`` as uint8 ``[rows, num_bytes(num)]``, contiguous.

        Args:
            random: on the device of ``x``; only codecs that round at random need it.
        """

    @abstractmethod
    def decode(self, payload: Tensor, num: int) -> Tensor:
        """The float32 values ``[rows, num]`` of payloads ``[rows, num_bytes(num)]``, bitwise equal on every rank."""
