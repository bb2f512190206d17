"""The interface of a method: when replicas communicate, and what."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine, Ready

S = TypeVar("S")


class Algorithm(ABC, Generic[S]):
    """A frozen description of a method; what changes during a run is in its state ``S``.

    `step` is one step of the training loop. Only `before_update`, `after_update` and the callback of `during_backward`
    communicate. Most methods are `lowcomm.rounds.base.Rounds`; `lowcomm.algorithms.composed` combines methods.

    Each call is a transaction: when it raises `PeerLost`, `Late` or `NonFinite`, parameters and state are unchanged
    except for pending exchanges. Then call `forgo`, and the same method again with a Comm of the remaining members.
    """

    @abstractmethod
    def init(self, engine: Engine, comm: Comm, t: int = 0) -> S:
        """The state after step ``t``, when all replicas hold the same parameters and optimizer state. Sends nothing.

        Raises:
            ValueError: when the method cannot run with this many members.
        """

    def sends_in_backward(self) -> bool:
        """Whether `during_backward` returns a callback at some steps. By default never."""
        return False

    def keeps_equal(self) -> bool:
        """Whether replicas have equal parameters and optimizer states after every step. By default not."""
        return False

    def ends_apart(self) -> bool:
        """Whether `finish` leaves each replica parameters of its own. By default not."""
        return False

    def may_skip(self) -> bool:
        """Whether a replica may take alone a round that others finished before a loss.

        By default not: it would diverge for good. It may where replicas differ anyway.
        """
        return False

    def loads(self, t: int, state: S) -> bool:
        """Whether `after_update` of step ``t`` may set parameters; the same on all ranks. By default always.

        What a method before it in `Then` has under way is applied first.
        """
        del t, state
        return True

    def during_backward(self, t: int, engine: Engine, state: S, comm: Comm) -> Ready | None:
        """A callback for each gradient that becomes final in backward of step ``t``. By default None.

        It may update the parameters it is called for (`Engine.update_part`) and start to send. It neither waits nor
        raises; `before_update` or `after_update` of the step do.
        """
        del t, engine, state, comm
        return None

    def before_update(self, t: int, engine: Engine, state: S, comm: Comm) -> None:
        """Runs between backward and the inner update of step ``t``; may replace the gradients. By default nothing."""
        del t, engine, state, comm

    @abstractmethod
    def after_update(self, t: int, engine: Engine, state: S, comm: Comm) -> None:
        """Runs after the inner update of step ``t``, counted from 1."""

    @abstractmethod
    def settle(self, state: S) -> None:
        """Wait for pending exchanges and keep their results in ``state``, so that it can be saved.

        All ranks call it after the same step. It does not change the results of training.
        """

    @abstractmethod
    def drain(self, t: int, engine: Engine, state: S, comm: Comm) -> None:
        """After step ``t``: wait for pending exchanges and apply them, also those not due yet."""

    @abstractmethod
    def complete(self, t: int, engine: Engine, state: S, comm: Comm) -> None:
        """At the end of a run of ``t`` steps: drain and do the rest of a round. A second call does nothing."""

    @abstractmethod
    def finish(self, t: int, engine: Engine, state: S, comm: Comm) -> None:
        """Complete, and give all replicas the same parameters.

        Methods whose replicas differ may have an option to leave them so.
        """

    @abstractmethod
    def forgo(self, state: S) -> None:
        """Drop pending exchanges after a loss. A later round may send their content again."""

    @abstractmethod
    def enter(self, engine: Engine, state: S, comm: Comm) -> None:
        """Continue with other members, after `forgo`: rebuild the state that reducers share. All members call it."""

    @abstractmethod
    def num_rounds(self, state: S) -> int:
        """Rounds so far."""

    @abstractmethod
    def consensus(self, engine: Engine, state: S) -> list[Tensor]:
        """The parameters to evaluate and publish, equal on all replicas.

        Where replicas differ (gossip), each returns its own, and an evaluation averages their losses, each on its share
        of the batches. In the order of ``engine.slots()["param"]``. They may be live: copy them before the next step.
        """


def step(algorithm: Algorithm[Any], t: int, engine: Engine, state: Any, comm: Comm, batch: Any) -> Tensor:
    """Take step ``t``, from 1, of one replica and return its loss, as `Engine.backward` does."""
    loss = engine.backward(batch, algorithm.during_backward(t, engine, state, comm))
    algorithm.before_update(t, engine, state, comm)
    engine.update()
    algorithm.after_update(t, engine, state, comm)
    return loss


@contextmanager
def standing(algorithm: Algorithm[Any], engine: Engine, state: Any, comm: Comm) -> Iterator[None]:
    """Inside, the model holds what stands for the run, to evaluate or save. All members call it together.

    Schedule-free optimizers evaluate at x, made of the parameters y and a state z that replicas may not share: x would
    be far from the mean, and differ. As x is linear in both, the mean of the ways from y to x leads to the mean x; it
    sends a float32 model.
    """
    with engine.standing(algorithm.consensus(engine, state)) as ways:
        if ways and len(comm.members) > 1 and not algorithm.keeps_equal():
            sums = [comm.all_sum(way) for way in ways]
            means = [work.wait() / len(comm.members) for work in sums]
            for x, way, mean in zip(engine.slots()["param"], ways, means, strict=True):
                x.add_(mean - way)
        yield


def share_states(engine: Engine, comm: Comm) -> None:
    """Give all members the means of the optimizer's states, each over those who have it."""
    slots = engine.slots()
    for name in sorted(slots.keys() - {"param", "grad"}):
        for x, p in zip(slots[name], slots["param"], strict=True):
            is_there = x.shape == p.shape
            total = comm.all_sum(x if is_there else torch.zeros_like(p))
            num = comm.all_sum(x.new_tensor(float(is_there)))
            mean = total.wait() / num.wait()
            if is_there:
                x.copy_(mean)
