"""The lifecycle shared by methods that average at rounds: timing, pending exchanges, partial last rounds, losses.

A method defines what it sends (`Rounds.round`), how it uses the means (`commit`), and what is evaluated (`stands`).
Each exchange is *talk, then commit*: everything that can fail comes before any change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor

from lowcomm.algorithms.base import Algorithm
from lowcomm.comm.base import Comm, Late, PeerLost
from lowcomm.engine.base import Engine, Ready
from lowcomm.reduce import NonFinite, Reducer, ReducerState
from lowcomm.rounds.exchanges import Exchange, Sending, Turn, in_turn
from lowcomm.rounds.qsr import QSR, round_steps
from lowcomm.tensors import add_, copy_


@dataclass(kw_only=True)
class RoundsState(ABC):  # noqa: B024  # what states are made from, and none itself
    """The state that every method keeps; a method's own state inherits from it.

    Attributes:
        kept: reducer states by slot, one for each group of values sent together.
        under_way: pending exchanges, oldest first.
        leaving: exchanges being sent during this step's backward.
        replicas: the initial members, if the method has per-replica options; otherwise empty.
        round: rounds so far.
        begun_t: the step after which the method began.
        synced_t: the step of the last round.
        ends_t: the step at which the present round ends.
        completed_t: the step of the last `complete`; None before.
        is_checked: whether a method that minds the optimizer's states has seen them, after a first real step.
    """

    kept: dict[str, list[ReducerState]] = field(default_factory=dict)
    under_way: list[Exchange] = field(default_factory=list)
    leaving: list[Exchange] = field(default_factory=list)
    replicas: list[int] = field(default_factory=list)
    round: int = 0
    begun_t: int = 0
    synced_t: int = 0
    ends_t: int = 0
    completed_t: int | None = None
    is_checked: bool = False


S = TypeVar("S", bound=RoundsState)


class Rounds(Algorithm[S], ABC):
    """A method of rounds.

    Attributes:
        overlap: send values with `Sending.numbers` during backward of the step at which they are due, after their
            parameters' update, in groups of the reducer's ``bucket_bytes``.
        averages: "param": rounds come after the inner update; "grad": before it.
    """

    # only names that every module knows: the command line reads annotations in the module of the method
    overlap: bool = False
    averages: str = "param"

    # What a method writes.

    @property
    @abstractmethod
    def every(self) -> int | QSR:
        """Inner steps of a round; a field of most methods."""

    @abstractmethod
    def begin(self, engine: Engine, comm: Comm) -> S:
        """The method's own state, when all replicas hold the same parameters. Sends nothing."""

    @abstractmethod
    def round(self, t: int, engine: Engine, state: S, comm: Comm) -> list[Sending]:
        """What is averaged in the round that ends with step ``t``. Changes nothing and may be called twice."""

    @abstractmethod
    def commit(self, t: int, engine: Engine, state: S, sent: Exchange, means: list[Tensor]) -> None:
        """Use the means of an exchange that arrived at step ``t``. Sends nothing and cannot fail."""

    @abstractmethod
    def stands(self, engine: Engine, state: S) -> list[Tensor]: ...

    def departed(self, t: int, engine: Engine, state: S, sent: Exchange, has_arrived: bool) -> None:
        """Runs when an exchange has been sent, after all commits. By default nothing.

        Args:
            has_arrived: whether the slot's previous exchange arrived at the same step.
        """
        del t, engine, state, sent, has_arrived

    def abandoned(self, state: S, lost: Exchange) -> None:
        """Runs for each exchange that is dropped. By default nothing."""
        del state, lost

    def rest(self, t: int, engine: Engine, state: S, comm: Comm) -> list[Sending] | None:
        """What is averaged at the end of a run of ``t`` steps; None: nothing. By default the partial round."""
        return self.round(t, engine, state, comm) if t > state.synced_t else None

    def shared(self, state: S) -> list[Tensor] | None:
        """What is equal on all replicas between rounds, an anchor of each parameter first; None: none may miss a round.

        By default None.
        """
        del state
        return None

    def drains_first(self, state: S, comm: Comm) -> bool:
        """Whether pending exchanges are applied before, not after, the rest is sent at the end of a run."""
        del state, comm
        return True

    def close(self, engine: Engine, state: S, comm: Comm) -> None:
        """The last exchange of a run. By default nothing. It changes nothing before its exchange has succeeded."""
        del engine, state, comm

    def reducer_of(self, slot: str) -> Reducer:
        """The reducer of ``slot``."""
        del slot
        return cast(Reducer, getattr(self, "reducer"))  # noqa: B009  # a field of most methods, and of no base

    def is_due(self, t: int, state: S) -> bool:
        """Whether a round ends with step ``t``."""
        return t == state.ends_t

    # What it gets.

    def init(self, engine: Engine, comm: Comm, t: int = 0) -> S:
        """Call `begin` and set the length of the first round.

        Raises:
            ValueError: as `begin`, and with `overlap` when parameters cannot be updated during backward.
        """
        reason = engine.needs_all_gradients() if self.overlap and self.averages == "param" else None
        if reason is not None:
            raise ValueError(
                f"{type(self).__name__}(overlap=True) updates parameters while backward goes on, but {reason}, or set "
                "overlap to False"
            )
        state = self.begin(engine, comm)
        state.begun_t = state.synced_t = t
        state.ends_t = t + round_steps(self.every, t, engine.lr())
        return state

    def keep(self, like: Sequence[Tensor], slot: str = "") -> list[ReducerState]:
        """Initial reducer states of ``slot``, for values shaped like the parameters ``like``."""
        reducer, like = self.reducer_of(slot), list(like)
        sending = Sending(slot, reducer, like, numbers=range(len(like)))
        return [reducer.init([like[i] for i in group]) for group in sending.cut(self.overlap)]

    def sends_in_backward(self) -> bool:
        return self.overlap

    def during_backward(self, t: int, engine: Engine, state: S, comm: Comm) -> Ready | None:
        """With `overlap`, start each group's average in order, the same on all ranks."""
        if not (self.overlap and self.is_due(t, state)):
            return None
        turns: list[Turn] = []
        for sending in self.round(t, engine, state, comm):
            if sending.numbers is None:
                continue
            exchange = sending.exchange(t)
            state.leaving.append(exchange)
            for k, group in enumerate(sending.cut(overlap=True)):
                numbers = [sending.numbers[i] for i in group]
                turns.append((numbers, partial(self._leave, engine, state, comm, sending, exchange, k, group)))
        if not turns:
            return None

        def failed(error: Exception) -> None:
            for exchange in state.leaving:
                exchange.failure = error

        final = in_turn(sorted(turns, key=lambda turn: min(turn[0]), reverse=True), failed)
        return lambda i, gradient: final(i)

    def _leave(
        self, engine: Engine, state: S, comm: Comm, sending: Sending, exchange: Exchange, k: int, group: list[int]
    ) -> None:
        assert sending.numbers is not None
        if self.averages == "param":
            engine.update_part([sending.numbers[i] for i in group])
        exchange.add(group, sending.start(group, state.kept[sending.slot][k], comm))

    def loads(self, t: int, state: S) -> bool:
        """At the end of a round, and when an average arrives."""
        is_due = self.is_due(t, state) or any(sent.due_t <= t for sent in state.under_way)
        return self.averages == "param" and is_due

    def before_update(self, t: int, engine: Engine, state: S, comm: Comm) -> None:
        """Do the step's round and pending exchanges here if it averages gradients."""
        if self.averages == "grad":
            self._step(t, engine, state, comm)

    def after_update(self, t: int, engine: Engine, state: S, comm: Comm) -> None:
        """Do the step's round and pending exchanges here if it averages parameters."""
        if self.averages == "param":
            self._step(t, engine, state, comm)

    def settle(self, state: S) -> None:
        for exchange in state.under_way:
            exchange.settle()

    def drain(self, t: int, engine: Engine, state: S, comm: Comm) -> None:
        self.exchange(t, engine, state, comm, [], is_last=True)

    def complete(self, t: int, engine: Engine, state: S, comm: Comm) -> None:
        if state.completed_t == t:
            return
        if self.drains_first(state, comm):
            self.drain(t, engine, state, comm)
        rest = self.rest(t, engine, state, comm)
        self.exchange(t, engine, state, comm, rest or [], is_last=True)
        if rest is not None:
            state.round, state.synced_t = state.round + 1, t
        state.completed_t = t

    def finish(self, t: int, engine: Engine, state: S, comm: Comm) -> None:
        """Complete, `close`, and load `stands`."""
        self.complete(t, engine, state, comm)
        self.close(engine, state, comm)
        params, standing = engine.slots()["param"], self.stands(engine, state)
        if any(x is not p for x, p in zip(standing, params, strict=True)):
            copy_(params, standing)

    def forgo(self, state: S) -> None:
        for exchange in state.under_way:
            self.abandoned(state, exchange)
        state.under_way, state.leaving = [], []

    def enter(self, engine: Engine, state: S, comm: Comm) -> None:
        assert not state.under_way, "forgo first"
        state.kept = {
            slot: [self.reducer_of(slot).resync(kept, comm).result() for kept in groups]
            for slot, groups in state.kept.items()
        }

    def catch_up(self, t: int, engine: Engine, state: S, comm: Comm, donor: int, carries: bool) -> int:
        """Copy the result of rounds that this replica missed, and return the step of the last one's end.

        All members of ``comm`` call it: ``donor``, who has the result, and those who miss it.

        Args:
            carries: keep this replica's difference to its anchor, as one to the new anchor.
        """
        mine = self.shared(state)
        assert mine is not None and not state.under_way, "refused at the start"
        counts = torch.tensor([t, state.round, state.synced_t, state.ends_t])
        works = [comm.broadcast(x, donor) for x in [counts, *mine]]
        counts, *theirs = [work.wait() for work in works]
        if comm.rank == donor:
            return t
        params = engine.slots()["param"]
        anchors = theirs[: len(params)]
        if carries:
            add_(params, [y - x for x, y in zip(mine, anchors, strict=False)])
        else:
            copy_(params, anchors)
        copy_(mine, theirs)
        t, state.round, state.synced_t, state.ends_t = counts.tolist()
        return t

    def num_rounds(self, state: S) -> int:
        return state.round

    def consensus(self, engine: Engine, state: S) -> list[Tensor]:
        return self.stands(engine, state)

    def _step(self, t: int, engine: Engine, state: S, comm: Comm) -> None:
        is_due = self.is_due(t, state)
        self.exchange(t, engine, state, comm, self.round(t, engine, state, comm) if is_due else [])
        if is_due:
            state.round, state.synced_t = state.round + 1, t
            state.ends_t = t + round_steps(self.every, t, engine.lr())
        elif isinstance(self.every, QSR):  # a rate that has risen since the round began asks for a shorter one
            length = self.every.round_steps(state.synced_t, engine.lr())
            state.ends_t = min(state.ends_t, max(t + 1, state.synced_t + length))

    def exchange(
        self, t: int, engine: Engine, state: S, comm: Comm, sendings: list[Sending], is_last: bool = False
    ) -> None:
        """Send, wait for what is due (at the end for all), then commit."""
        due, failure = [x for x in state.under_way if is_last or x.due_t <= t], None
        sent, arrived = list[Exchange](), list[Exchange]()
        try:
            sent, arrived = self._talk(t, state, comm, sendings, due, is_last)
        except (PeerLost, Late, NonFinite) as error:
            failure = NonFinite(error.ranks, t) if isinstance(error, NonFinite) else error
        comm.agree(failure)

        state.leaving = []
        state.under_way = [x for x in [*state.under_way, *sent] if x not in arrived]
        for exchange in arrived:
            exchange.settle(in_place=True)
            state.kept[exchange.slot] = exchange.kept()
            self.commit(t, engine, state, exchange, exchange.means())
        for exchange in sent:
            self.departed(t, engine, state, exchange, any(x.slot == exchange.slot for x in due))

    def _talk(
        self, t: int, state: S, comm: Comm, sendings: list[Sending], due: list[Exchange], is_last: bool
    ) -> tuple[list[Exchange], list[Exchange]]:
        """The exchanges that were sent and those that arrived; changes nothing but the pending ones."""
        if is_last:  # before anybody sends: ranks drain at times of their own, and messages must have one order
            for exchange in due:
                exchange.settle()
        kept, sent = dict(state.kept), list[Exchange]()
        for sending in sendings:
            for exchange in due:
                if exchange.slot == sending.slot:
                    exchange.settle()
                    kept[exchange.slot] = exchange.kept()
            sent.append(self._sent(t, sending, kept, state, comm))
        for exchange in [*state.under_way, *sent]:
            exchange.advance(t)
        arrived = [*due, *(x for x in sent if is_last or x.due_t <= t)]
        for exchange in arrived:
            exchange.arrive()
        return sent, arrived

    def _sent(self, t: int, sending: Sending, kept: dict[str, list[ReducerState]], state: S, comm: Comm) -> Exchange:
        """Send the groups that were not sent during backward."""
        exchange = next((x for x in state.leaving if x.slot == sending.slot), None) or sending.exchange(t)
        if exchange.failure is not None:
            raise exchange.failure
        groups = sending.cut(self.overlap)
        if sending.slot not in kept:
            kept[sending.slot] = [sending.reducer.init([sending.like[i] for i in group]) for group in groups]
        for k in range(len(exchange.parts), len(groups)):
            exchange.add(groups[k], sending.start(groups[k], kept[sending.slot][k], comm))
        return exchange


@dataclass
class GradientsState(RoundsState):
    """The state of `GradientRounds`."""


class GradientRounds(Rounds[GradientsState], ABC):
    """A method that averages gradients at every step, so parameters and optimizer states stay equal."""

    averages = "grad"

    @property
    def every(self) -> int:
        return 1

    def stands(self, engine: Engine, state: GradientsState) -> list[Tensor]:
        """The live parameters."""
        return engine.slots()["param"]

    def keeps_equal(self) -> bool:
        return True
