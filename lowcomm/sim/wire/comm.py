"""Comm between the ranks of a simulation: real tensors, virtual time.

Sums are in members' order, so a simulation is bitwise reproducible. On ``device="meta"`` bytes are counted and time
passes, but nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lowcomm.comm.base import Call, Comm, Late, PeerLost, Work, named
from lowcomm.sim.wire.clock import Clock
from lowcomm.sim.wire.collectives import Schedule
from lowcomm.sim.wire.exchange import Asked, Carrier, Exchange
from lowcomm.sim.wire.gloo import Gloo
from lowcomm.sim.wire.mail import Mailbox, check_like

T = TypeVar("T")


@dataclass(eq=False)
class View:
    """State shared by all ranks of a view.

    Attributes:
        position: index of each member.
        num_calls: exchanges called so far, by member for collectives and by (rank, peer) for swaps.
        exchanges: pending exchanges, by participants and number.
        mailboxes: by receiver.
        lost: lost members.
        is_over: whether a member has left it for a view of the remaining ones.
    """

    members: tuple[int, ...]
    position: dict[int, int]
    lost: set[int]
    is_over: bool = field(default=False, init=False)
    num_calls: dict[tuple[int, int | None], int] = field(default_factory=dict)
    exchanges: dict[tuple[tuple[int, int] | None, int], Exchange] = field(default_factory=dict)
    mailboxes: dict[int, Mailbox] = field(default_factory=dict)


@dataclass(eq=False)
class World:
    """The network of a simulation.

    Attributes:
        clock: runs the ranks.
        network: carries the bytes; None: messages take no time.
        schedule: the transfers of each collective.
        lost: ranks that crashed and have not returned.
    """

    clock: Clock
    network: Carrier | None = None
    schedule: Schedule = Gloo()
    lost: set[int] = field(default_factory=set, init=False)
    _num_returns: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    _views: dict[tuple[int, ...], View] = field(default_factory=dict, init=False, repr=False)
    _over: list[View] = field(default_factory=list, init=False, repr=False)  # of members that came back anew since
    _latest: dict[int, tuple[Sequence[int], View]] = field(default_factory=dict, init=False, repr=False)

    def comm(self, rank: int, members: Sequence[int]) -> SimComm:
        """A rank's view of some members, including itself. For very many ranks, pass the same tuple or range.

        Raises:
            ValueError: when members repeat, are negative, or lack the rank.
        """
        return SimComm(self, self._view(members), rank)

    def crash(self, rank: int) -> None:
        """End a rank's program; ranks that wait for it, now or later, get `PeerLost`.

        Arrived messages stay; pending ones are lost. In a view that lost a member, collectives fail for good, as do
        waits for that member even after it returns. The others can still send, receive and exchange.
        """
        self.lost.add(rank)
        for view in [*self._views.values(), *self._over]:
            if rank not in view.position or rank in view.lost:
                continue
            view.lost.add(rank)
            for key, exchange in list(view.exchanges.items()):
                if rank in exchange.members:
                    exchange.lose(view.lost)
                    del view.exchanges[key]
            for mailbox in list(view.mailboxes.values()):
                mailbox.lose(rank)
        self.clock.kill(rank)  # at the end: it does not return when the rank crashes itself

    def leave(self, view: View) -> None:
        """Close a view: whoever waits or calls in it gets `PeerLost`."""
        view.is_over = True
        for exchange in view.exchanges.values():
            exchange.lose(view.lost)
        view.exchanges.clear()

    def rejoin(self, rank: int, program: Callable[[], Any]) -> None:
        """A crashed rank returns without state; its new program starts now.

        Views that include it and are made from now on (`comm`, `Comm.sub`) are fresh and shared. Older ones stay
        closed, so a rank that missed the crash cannot reach the new program by chance, nor can messages sent to the old
        one.

        Raises:
            ValueError: when the rank has not crashed.
        """
        if rank not in self.lost:
            raise ValueError(f"rank {rank} cannot come back: it is there; let it crash before")
        self.clock.spawn(rank, program, self.clock.now)
        self.lost.remove(rank)
        self._num_returns[rank] = self.incarnation(rank) + 1
        self._over += [view for view in self._views.values() if rank in view.lost]
        self._views = {key: view for key, view in self._views.items() if rank not in view.lost}
        self._latest.clear()

    def present(self, rank: int) -> bool:
        """Whether a rank is present now. Ranks that ask at different times may get different answers: ask once, tell
        the rest.

        For membership, which must notice returns; waiters learn of a crash by `PeerLost`.
        """
        return rank not in self.lost

    def incarnation(self, rank: int) -> int:
        """How often a rank has returned: 0 for its first program."""
        return self._num_returns.get(rank, 0)

    def _view(self, members: Sequence[int]) -> View:
        # n ranks ask for the same n members, and between them for smaller groups: hashing n each time would cost n * n
        latest = self._latest.get(len(members))
        if latest is None or latest[0] is not members:
            key = tuple(sorted(members))
            if key not in self._views:
                if not key or key[0] < 0 or len(set(key)) != len(key):
                    raise ValueError(f"members {tuple(members)} must be distinct ranks from 0 on, and at least one")
                position = {rank: i for i, rank in enumerate(key)}
                self._views[key] = View(key, position, self.lost & position.keys())
            latest = (members, self._views[key])
            if isinstance(members, (tuple, range)):  # a list may hold others when it is asked for again
                self._latest[len(members)] = latest
        return latest[1]

    def _join(self, view: View, rank: int, call: Asked, x: Tensor | None, peer: int | None = None) -> Exchange:
        """Arrive at the next exchange with all members, or with one."""
        number = view.num_calls[rank, peer] = view.num_calls.get((rank, peer), 0) + 1
        pair = None if peer is None else (min(rank, peer), max(rank, peer))
        exchange = view.exchanges.get((pair, number))
        if exchange is None:
            members, over = pair or view.members, partial(view.exchanges.pop, (pair, number), None)
            exchange = Exchange(self.clock, self.network, self.schedule, members, number, call, over)
            if view.is_over or not view.lost.isdisjoint(members):
                exchange.lose(view.lost.copy())  # who is lost after the call is no cause
                return exchange
            view.exchanges[pair, number] = exchange
        exchange.arrive(rank, call, x)
        return exchange

    def _mailbox(self, view: View, to: int) -> Mailbox:
        if to not in view.mailboxes:
            view.mailboxes[to] = Mailbox(self.clock, self.network, self.schedule, to, view.members, view.lost)
        return view.mailboxes[to]


class SimComm(Comm):
    """One rank's view in a `World`. Issuing takes no time; messages move while the rank computes.

    Collectives match by members and by how many each has called, swaps by how many each has called with the other,
    `send` and `recv` by `Mailbox`. `send`'s wait returns when the message has arrived, received or not.
    """

    def __init__(self, world: World, view: View, rank: int) -> None:
        if rank not in view.position:
            raise ValueError(f"members {named(view.members)} must hold this rank, {rank}")
        self.rank, self.members = rank, view.members
        self._world, self._view = world, view

    def issue(self, call: Call) -> Work[Any]:
        """Sums are added in members' order; swaps start when both have called."""
        if call.kind == "send":
            assert call.peer is not None
            mailbox = self._world._mailbox(self._view, call.peer)
            return _Pending(partial(mailbox.wait_sent, mailbox.send(self.rank, _copy(call.x))), lambda: None)
        if call.kind == "recv":
            return self._recv(call.x, call.peer)
        exchange = self._join(call)
        finish: dict[str, Callable[[], Tensor]] = {
            "all_sum": exchange.total,
            "all_gather": exchange.gathered,
            "all_to_all": partial(exchange.rows, self._view.position[self.rank]),
        }
        if call.kind not in finish:
            assert call.peer is not None
            finish[call.kind] = partial(exchange.copy, call.peer)
        return _Pending(partial(exchange.wait, self.rank), finish[call.kind])

    def sub(self, members: Sequence[int]) -> Comm:
        if not set(members) <= self._view.position.keys():
            raise ValueError(f"members {tuple(members)} are not all among {named(self.members)}")
        return self._world.comm(self.rank, members)

    def regroup(self, lost: PeerLost | Late) -> Comm:
        """The members that have not crashed. Ranks that wait in this view get `PeerLost` and so join."""
        self._world.leave(self._view)
        return self._world.comm(self.rank, [rank for rank in self.members if self._world.present(rank)])

    def now(self) -> float:
        """Virtual seconds since the start of the simulation."""
        return self._world.clock.now

    def _recv(self, like: Tensor, source: int | None) -> Work[tuple[int, Tensor]]:
        mailbox = self._world._mailbox(self._view, self.rank)
        receive = mailbox.post(source)

        def finish() -> tuple[int, Tensor]:
            message = mailbox.wait_received(receive)
            return message.source, check_like(message, like, self.rank)

        return _Pending(lambda: None, finish)

    def _join(self, call: Call) -> Exchange:
        swaps, is_read = call.kind == "exchange", call.kind != "broadcast" or call.peer == self.rank
        asked = Asked(call.kind, call.x.shape, call.x.dtype, None if swaps else call.peer)
        brought = _copy(call.x) if is_read else None
        return self._world._join(self._view, self.rank, asked, brought, call.peer if swaps else None)


class _Pending(Generic[T]):
    """A Work made of a blocking function and its result."""

    def __init__(self, block: Callable[[], None], finish: Callable[[], T]) -> None:
        self._block, self._finish = block, finish

    def wait(self) -> T:
        self._block()
        return self._finish()


def _copy(x: Tensor) -> Tensor:
    """A contiguous copy, as real messages arrive."""
    x = x.detach()
    return x.contiguous() if x.is_meta else x.clone(memory_format=torch.contiguous_format)
