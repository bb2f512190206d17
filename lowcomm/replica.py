"""A training replica: the parts of a run that change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lowcomm.algorithms.base import Algorithm
from lowcomm.attendance import Attendance
from lowcomm.comm.metered import MeteredComm
from lowcomm.engine.base import Engine
from lowcomm.ledger import Ledger
from lowcomm.membership import Members
from lowcomm.rounds.base import Rounds

T = TypeVar("T")


class Stream(Protocol):
    """Endless training batches."""

    def next(self) -> Tensor:
        """The next batch, on the CPU."""

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from that position."""


@dataclass(frozen=True)
class Replica:
    """A training replica: all that changes during a run.

    Attributes:
        members: the ranks that train now.
        attendance: of rounds whose members a rule decides; None: all take part in all.
    """

    algorithm: Algorithm[Any]
    engine: Engine
    state: Any
    stream: Stream
    ledger: Ledger
    members: Members[MeteredComm]
    device: torch.device
    attendance: Attendance[MeteredComm] | None = None

    @property
    def comm(self) -> MeteredComm:
        """The Comm of the present members."""
        return self.members.comm

    def talk(self, call: Callable[[MeteredComm], T]) -> T:
        """Make a call that communicates, see `Members.take`."""
        return self.members.take(self.algorithm, self.engine, self.state, call)

    def meet(self, t: int, num_steps: int) -> int:
        """Where a rule decides who takes part in the round of step ``t``, wait until it does.

        Returns the step that the run is at, a later one for a replica that was late.
        """
        attendance, algorithm = self.attendance, self.algorithm
        if attendance is not None:
            assert isinstance(algorithm, Rounds), "refused at the start"
            attendance.tokens_done += self.ledger.step_tokens
            if algorithm.is_due(t, self.state):
                t, self.members.comm = attendance.meet(t, num_steps, algorithm, self.engine, self.state)
        return t

    def committed(self) -> int:
        """Training tokens that the run has gained since the last call, one step ago."""
        if self.attendance is not None:
            return self.attendance.committed()
        return len(self.comm.members) * self.ledger.step_tokens

    def gather(self, t: int) -> None:
        """Meet everyone for the end of the run."""
        if self.attendance is not None:
            assert isinstance(self.algorithm, Rounds), "refused at the start"
            self.members.comm = self.attendance.gather(t, self.algorithm, self.engine, self.state)
