"""How a replica remembers what it has not yet sent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from lowcomm.comm.base import Comm, Work

S = TypeVar("S")


class Feedback(ABC, Generic[S]):
    """A pair of functions around a compressor; what changes between rounds lives in the state ``S``.

    States are not modified: a round that fails leaves the old one as it was.

    Attributes:
        keeps_mean: whether it adds up means of what was sent, and so needs those over all ranks at every place.
        wants_sent: whether `after` looks at what was sent.
    """

    keeps_mean: ClassVar[bool] = False
    wants_sent: ClassVar[bool] = True

    @abstractmethod
    def init(self, like: Tensor) -> S:
        """The state before the first round for tensors shaped like ``like``."""

    def is_dense(self, state: S) -> bool:
        """Whether the coming round goes uncompressed, the same on all ranks. By default none does."""
        del state
        return False

    @abstractmethod
    def before(self, x: Tensor, state: S) -> tuple[Tensor, Any]:
        """What to hand to the compressor in place of ``x``, and what `after` will need of this."""

    @abstractmethod
    def after(self, kept: Any, sent: Tensor, mean: Tensor, state: S) -> tuple[Tensor, S]:
        """The estimate of the mean of ``x`` over ranks, equal on all of them, and the new state.

        Args:
            kept: what `before` returned beside what was to be sent.
            sent, mean: what became of that, see `lowcomm.compress.base.Compressor.mean`.
        """

    def resync(self, state: S, comm: Comm) -> Generator[Work[Any], Any, S]:
        """The state to go on with among new members, of which each brings its own; a fresh one brings `init`'s.

        Methods that hold a mean over the members must make it anew, uncompressed. By default nothing is shared.
        """
        del comm
        yield from ()
        return state
