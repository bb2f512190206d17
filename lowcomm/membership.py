"""The ranks that take part in a run, and the retry of a call in which some are lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from lowcomm.algorithms.base import Algorithm
from lowcomm.comm.base import Comm, Late, PeerLost
from lowcomm.engine.base import Engine

C = TypeVar("C", bound=Comm)
T = TypeVar("T")


class Torn(Exception):
    """After a loss, some ranks have ended a round and others have not, so they cannot continue together."""


@dataclass
class Members(Generic[C]):
    """The ranks that train now.

    Attributes:
        comm: of the present members.
        goes_on: whether the run continues with the remaining members after a loss.
        num_calls: calls ended so far; equal on ranks at the same point.
        meets_at: this rank makes calls before this number alone, as the others had ended them before the loss.
    """

    comm: C
    goes_on: bool = False
    num_calls: int = 0
    meets_at: int = 0

    def take(self, algorithm: Algorithm[Any], engine: Engine, state: Any, call: Callable[[C], T]) -> T:
        """Make a call that communicates; after a loss, repeat it with the remaining members.

        Raises:
            PeerLost, Late: when the run does not continue, or cannot.
            Torn: when the remaining members are at different calls and the method cannot skip a round.
        """
        lost: PeerLost | Late | None = None
        while True:
            try:
                if lost is not None:
                    algorithm.forgo(state)
                    self._regroup(lost, algorithm.may_skip())
                    algorithm.enter(engine, state, self.comm)
                result = call(self._alone() if self.num_calls < self.meets_at else self.comm)
                self.num_calls += 1
                return result
            except (PeerLost, Late) as error:
                if not self.goes_on:
                    raise
                lost = error.with_traceback(None)  # whose frames hold messages of the old view, and it its connections
                lost.__cause__ = lost.__context__ = None

    def _regroup(self, lost: PeerLost | Late, may_skip: bool) -> None:
        """Set the view of the remaining members, once all have arrived, and the call at which they meet."""
        comm: Any = self.comm.regroup(lost)
        self.comm = comm
        places = comm.all_gather(torch.tensor([self.num_calls])).wait()
        if places.is_meta:  # without values all stand at one place, or the next exchange says that they do not
            return
        self.meets_at = int(places.max())
        if int(places.min()) < self.meets_at and not may_skip:
            raise Torn(
                f"of ranks {list(comm.members)}, who are left, some are ahead: they stand at calls "
                f"{places.flatten().tolist()}; resume all from the last checkpoint"
            ) from lost

    def _alone(self) -> Any:
        return self.comm.sub([self.comm.rank])
