"""When replicas talk, and what about."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from torch import Tensor

from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine, Ready, Wanted

S = TypeVar("S")


class Algorithm(ABC, Generic[S]):
    """A frozen description of a method; what changes during a run lives in its state ``S``.

    The training loop is, for t = 1, 2, ...::

        wanted = algorithm.during_forward(t, engine, state, comm)
        ready = algorithm.during_backward(t, engine, state, comm)
        loss = engine.backward(batch, ready, wanted)
        algorithm.before_update(t, engine, state, comm)
        engine.update()
        algorithm.after_update(t, engine, state, comm)

    and the last four are the only places that talk: `backward` where it calls what the first two returned.
    """

    @abstractmethod
    def init(self, engine: Engine, comm: Comm) -> S:
        """The state at step 0, where every replica holds the same parameters. Nothing is sent.

        Raises:
            ValueError: when the method cannot run with this many members.
        """

    def sends_in_backward(self) -> bool:
        """Whether `during_backward` returns something at some steps; by default at none.

        Where it does not, `during_forward` does not either.
        """
        return False

    def during_forward(self, t: int, engine: Engine, state: S, comm: Comm) -> Wanted | None:
        """What forward of step ``t`` tells of each parameter before it uses it; by default nobody.

        This call itself changes nothing. What it returns may wait for what was sent, and change the parameters, as
        `after_update` of the step before could have done. It sends nothing.
        """
        del t, engine, state, comm
        return None

    def during_backward(self, t: int, engine: Engine, state: S, comm: Comm) -> Ready | None:
        """What backward of step ``t`` tells each gradient to as soon as it is final; by default nobody.

        This call itself changes nothing. What it returns may take the update of the parameters it was told of
        (`Engine.update_part`) and start to send, and must not wait: that is for `before_update` and `after_update`.
        """
        del t, engine, state, comm
        return None

    def before_update(self, t: int, engine: Engine, state: S, comm: Comm) -> None:
        """Between backward and the inner update of step ``t``: may replace the gradients. By default nothing."""
        del t, engine, state, comm

    @abstractmethod
    def after_update(self, t: int, engine: Engine, state: S, comm: Comm) -> None:
        """After the inner update of step ``t``, counted from 1."""

    def settle(self, state: S) -> None:
        """Wait for what is under way and keep in ``state`` what it brought, so that ``state`` can be saved.

        All ranks call it after the same step; it changes no result. By default nothing stays under way between steps.
        """
        del state

    @abstractmethod
    def finish(self, t: int, engine: Engine, state: S, comm: Comm) -> None:
        """At the end of a run of ``t`` steps: drain what is in flight and leave the same parameters everywhere.

        Methods whose replicas stay apart may be asked to leave each its own.
        """

    @abstractmethod
    def num_rounds(self, state: S) -> int:
        """Rounds completed so far."""

    @abstractmethod
    def consensus(self, engine: Engine, state: S) -> list[Tensor]:
        """The parameters that stand for the run, equal on all replicas: what to evaluate and to publish.

        Where replicas stay apart (gossip), each gives its own, and an evaluation is the mean of their losses, each on
        its share of the batches. In the order of ``engine.slots()["param"]``; may be live tensors, so copy before the
        next step. What the next `during_forward` would wait for and apply is applied now: all ranks call it after the
        same step, and it changes no result.
        """
