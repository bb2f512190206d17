"""Rounds whose members a rule decides: how one replica arrives, catches up and takes part."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch

from lowcomm.algorithms.base import Algorithm
from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine
from lowcomm.participation.base import Rule
from lowcomm.participation.meeting import View
from lowcomm.participation.options import Participation
from lowcomm.rounds.base import Rounds

C = TypeVar("C", bound=Comm)


class Seat(Protocol):
    """One replica's place at the meeting: in virtual time, or at a coordinator."""

    def meet(self, step: int, version: int, tokens_done: float) -> View | None:
        """Arrive, and block until a round takes this replica. None: the run has had its last round without it."""

    def end(self) -> None:
        """The run has had its last round."""


@dataclass
class Attendance(Generic[C]):
    """A replica's part in the rounds of a run.

    Attributes:
        seat: at the meeting.
        everyone: the ranks of the run.
        tokens_done: that this replica has trained on.
        version: the last round whose result it holds.
        is_over: whether the run has had its last round.
    """

    seat: Seat
    everyone: C
    options: Participation
    tokens_done: float = 0.0
    version: int = 0
    is_over: bool = False
    _committed: float = field(default=0.0, init=False)

    def meet(self, t: int, num_steps: int, algorithm: Rounds[Any], engine: Engine, state: Any) -> tuple[int, C]:
        """The members of the round that is due at step ``t``, and the run's step: a later one for who was late.

        A replica that missed rounds copies their result, and its learning rate follows. Where the run is over, that is
        all, and its step is ``num_steps``.
        """
        view = self.seat.meet(t, self.version, self.tokens_done)
        if view is None:
            self.gather(t, algorithm, engine, state)
            return num_steps, self.everyone
        comm: Any = self.everyone.sub(view.members)
        t = self._copy_result(t, algorithm, engine, state, comm, view.versions, self.options.late == "carry")
        shares = view.shares(self.options.discount, self.options.late)
        comm.share = len(shares) * shares[comm.place] if any(shares) else None
        self._committed += sum(n for n, share in zip(view.tokens, shares, strict=True) if share)
        self.version = view.round
        return t, comm

    def gather(self, t: int, algorithm: Rounds[Any], engine: Engine, state: Any) -> C:
        """Meet everyone at the end of a run; the work of who is late is dropped."""
        if not self.is_over:
            self.is_over = True
            self.seat.end()
            versions = self.everyone.all_gather(torch.tensor([self.version])).wait().flatten().tolist()
            self._copy_result(t, algorithm, engine, state, self.everyone, versions, carries=False)
        return self.everyone

    def committed(self) -> int:
        """The tokens of rounds since the last call."""
        tokens, self._committed = self._committed, 0.0
        return round(tokens)

    def _copy_result(
        self,
        t: int,
        algorithm: Rounds[Any],
        engine: Engine,
        state: Any,
        comm: Comm,
        versions: tuple[int, ...] | list[int],
        carries: bool,
    ) -> int:
        newest = max(versions)
        donor = comm.members[versions.index(newest)]
        behind = [member for member, version in zip(comm.members, versions, strict=True) if version < newest]
        if not behind:
            return t
        if comm.rank == donor or comm.rank in behind:
            at = algorithm.catch_up(t, engine, state, comm.sub([donor, *behind]), donor, carries)
            engine.skip(at - t)
            t = at
        algorithm.enter(engine, state, comm)
        return t


def attend(
    options: Participation | None, seat: Seat | None, everyone: C, algorithm: Algorithm[Any], state: Any
) -> Attendance[C] | None:
    """A replica's attendance, or None where all take part in all rounds.

    Raises:
        ValueError: when no replica may miss a round of this method.
    """
    if options is None:
        return None
    if seat is None:
        raise ValueError(
            f"participation is {options}, but nobody decides who takes part: only `lowcomm simulate` does so far; "
            "leave it out, and all take part"
        )
    if type(options.rule).learn is not Rule.learn:
        raise ValueError(
            f"participation is {options}, but this rule learns from what members measure of rounds, which runs do not "
            "tell it yet; take FirstK, Deadline or Quorum"
        )
    shared = algorithm.shared(state) if isinstance(algorithm, Rounds) and not algorithm.overlap else None
    if shared is None or getattr(algorithm, "weights", None) is not None or getattr(algorithm, "dropped", None):
        raise ValueError(
            f"participation is {options}, but a replica of {algorithm} cannot miss a round and catch up; take LocalSGD "
            "or DiLoCo without overlap, weights and dropped"
        )
    return Attendance(seat, everyone, options)
