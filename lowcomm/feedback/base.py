"""The interface of feedback: how a replica remembers what it has not sent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from lowcomm.comm.base import Comm, Work

S = TypeVar("S")


class Feedback(ABC, Generic[S]):
    """Functions before and after a compressor; what changes between rounds is in the state ``S``.

    Only `after` modifies a state, once all messages of the round are here: a failed round changes nothing.

    Attributes:
        keeps_mean: whether it accumulates means of what was sent, and so needs them over all ranks at every place.
        wants_sent: whether `after` uses what was sent.
    """

    keeps_mean: ClassVar[bool] = False
    wants_sent: ClassVar[bool] = True

    @abstractmethod
    def init(self, like: Tensor) -> S:
        """The state before the first round for tensors shaped like ``like``."""

    def is_dense(self, state: S) -> bool:
        """Whether the next round is uncompressed, the same on all ranks. By default not."""
        del state
        return False

    @abstractmethod
    def before(self, x: Tensor, state: S) -> tuple[Tensor, Any]:
        """The compressor's input in place of ``x``, and what `after` will need."""

    @abstractmethod
    def after(self, kept: Any, sent: Tensor, mean: Tensor, state: S) -> tuple[Tensor, S]:
        """The estimate of the mean of ``x`` over ranks, equal on all of them, and the new state.

        The new state may be the old one, modified; the estimate shares no memory with it.

        Args:
            kept: the second result of `before`.
            sent, mean: the compressor's results, see `lowcomm.compress.base.Compressor.mean`.
        """

    def resync(self, state: S, comm: Comm) -> Generator[Work[Any], Any, S]:
        """The state for new members, each with its own; a new one brings `init`'s.

        Methods that keep a mean over members must recompute it, uncompressed. By default nothing is shared.
        """
        del comm
        yield from ()
        return state
