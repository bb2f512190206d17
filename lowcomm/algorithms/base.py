"""When replicas talk, and what about."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from torch import Tensor

from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine, Ready

S = TypeVar("S")


class Algorithm(ABC, Generic[S]):
    """A frozen description of a method; what changes during a run lives in its state ``S``.

    `step` is one step of the training loop. Its `before_update` and `after_update`, and `backward` where it calls what
    `during_backward` returned, are the only places that talk. Most methods are `lowcomm.rounds.base.Rounds`,
    which writes all of this once; others put methods together (`lowcomm.algorithms.composed`).

    Each call is a transaction: when it raises `PeerLost`, `Late` or `NonFinite`, parameters and state are as they were,
    but for what was under way. Call `forgo`, then the same method again, with a Comm of those who are left.
    """

    @abstractmethod
    def init(self, engine: Engine, comm: Comm, t: int = 0) -> S:
        """The state after step ``t``, where every replica holds the same parameters and optimizer. Nothing is sent.

        Raises:
            ValueError: when the method cannot run with this many members.
        """

    def sends_in_backward(self) -> bool:
        """Whether `during_backward` returns something at some steps; by default at none."""
        return False

    def keeps_equal(self) -> bool:
        """Whether replicas hold equal parameters and optimizer states after every step; by default not."""
        return False

    def may_skip(self) -> bool:
        """Whether a replica may take a round alone that others took together; by default not: it would part for good.

        Where replicas stay apart anyway, those who are behind after a loss do.
        """
        return False

    def during_backward(self, t: int, engine: Engine, state: S, comm: Comm) -> Ready | None:
        """What backward of step ``t`` tells each gradient to as soon as it is final; by default nobody.

        What it returns may take the update of the parameters it was told of (`Engine.update_part`) and start to send.
        It does not wait, and raises nothing: `before_update` or `after_update` of the step do.
        """
        del t, engine, state, comm
        return None

    def before_update(self, t: int, engine: Engine, state: S, comm: Comm) -> None:
        """Between backward and the inner update of step ``t``: may replace the gradients. By default nothing."""
        del t, engine, state, comm

    @abstractmethod
    def after_update(self, t: int, engine: Engine, state: S, comm: Comm) -> None:
        """After the inner update of step ``t``, counted from 1."""

    @abstractmethod
    def settle(self, state: S) -> None:
        """Wait for what is under way and keep in ``state`` what it brought, so that ``state`` can be saved.

        All ranks call it after the same step; it changes no result.
        """

    @abstractmethod
    def drain(self, t: int, engine: Engine, state: S, comm: Comm) -> None:
        """After step ``t``: wait for what is under way and take it in, though it may not be due yet."""

    @abstractmethod
    def complete(self, t: int, engine: Engine, state: S, comm: Comm) -> None:
        """At the end of a run of ``t`` steps: drain, and take the rest of a round; a second time, nothing."""

    @abstractmethod
    def finish(self, t: int, engine: Engine, state: S, comm: Comm) -> None:
        """Complete, and leave the same parameters everywhere.

        Methods whose replicas stay apart may be asked to leave each its own.
        """

    @abstractmethod
    def forgo(self, state: S) -> None:
        """Give up what is under way: somebody is lost. What it would have brought may come with a later round."""

    @abstractmethod
    def enter(self, engine: Engine, state: S, comm: Comm) -> None:
        """Go on among other members, after `forgo`: what reducers share is made anew. All members call it."""

    @abstractmethod
    def num_rounds(self, state: S) -> int:
        """Rounds so far."""

    @abstractmethod
    def consensus(self, engine: Engine, state: S) -> list[Tensor]:
        """The parameters that stand for the run, equal on all replicas: what to evaluate and to publish.

        Where replicas stay apart (gossip), each gives its own, and an evaluation is the mean of their losses, each on
        its share of the batches. In the order of ``engine.slots()["param"]``; may be live tensors, so copy before the
        next step.
        """


def step(algorithm: Algorithm[Any], t: int, engine: Engine, state: Any, comm: Comm, batch: Any) -> Tensor:
    """Step ``t`` of one replica, counted from 1; its loss, as of `Engine.backward`."""
    loss = engine.backward(batch, algorithm.during_backward(t, engine, state, comm))
    algorithm.before_update(t, engine, state, comm)
    engine.update()
    algorithm.after_update(t, engine, state, comm)
    return loss
