"""Who takes part in a run, and what becomes of a round in which somebody is lost."""

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
    """Somebody was lost while some had ended a round and others had not: they cannot go on from one place."""


@dataclass
class Members(Generic[C]):
    """Those who train together now.

    Attributes:
        comm: of the present members.
        goes_on: whether the run goes on among those who are left when somebody is lost.
        num_calls: calls that ended so far; equal on all who stand at the same place.
        meets_at: calls before this one are made alone, as the others had made them when somebody was lost.
    """

    comm: C
    goes_on: bool = False
    num_calls: int = 0
    meets_at: int = 0

    def take(self, algorithm: Algorithm[Any], engine: Engine, state: Any, call: Callable[[C], T]) -> T:
        """Make a call that talks; when somebody is lost in it, again among those who are left.

        Raises:
            PeerLost, Late: when the run does not go on, or nobody can.
            Torn: when those who are left stand at different places, and the method cannot skip a round.
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
        """A view of those who are left, once all of them are there, and where they meet."""
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
