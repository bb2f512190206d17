"""How replicas average one vector each with few bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from lowcomm.comm.base import Comm, Work

S = TypeVar("S")


class Compressor(ABC, Generic[S]):
    """An approximate mean over ranks. What changes between rounds lives in the state ``S``.

    Attributes:
        elementwise: whether shapes do not matter, so that many tensors may be joined in one vector.
    """

    elementwise: ClassVar[bool]

    @abstractmethod
    def init(self, like: Tensor) -> S:
        """The state before the first round for tensors shaped like ``like``."""

    @abstractmethod
    def mean(self, x: Tensor, state: S, comm: Comm) -> Generator[Work[Any], Any, tuple[Tensor, Tensor, S]]:
        """Yield each Work that is needed; return ``(sent, mean, state)``. ``x`` and ``state`` are not modified.

        Law: the mean over ranks of ``sent`` equals ``mean``, which is the same on every rank, bit for bit.
        ``sent`` and ``mean`` have the shape and dtype of ``x``; ``sent`` may be ``x`` itself.
        """
