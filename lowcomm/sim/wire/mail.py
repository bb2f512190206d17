"""Point-to-point messages: pending ones, arrived ones, and posted receives."""

from __future__ import annotations

import bisect
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from lowcomm.comm.base import PeerLost, named
from lowcomm.sim.wire.clock import Clock
from lowcomm.sim.wire.collectives import Schedule
from lowcomm.sim.wire.exchange import Carrier


@dataclass(eq=False, slots=True)
class Message:
    """A pending message; it moves at once, whether or not the receiver is ready.

    Attributes:
        ended: its last byte has arrived.
        lost: it will never arrive.
        parked: whether its sender waits for its arrival.
    """

    source: int
    x: Tensor
    flow: Any = None
    ended: bool = False
    lost: bool = False
    parked: bool = False


@dataclass(eq=False, slots=True)
class Receive:
    """A posted receive and the message it got."""

    source: int | None
    message: Message | None = None

    def takes(self, source: int) -> bool:
        """Whether it accepts messages of this rank."""
        return self.source is None or self.source == source


@dataclass(eq=False)
class Mailbox:
    """All messages of one view for one rank.

    The earliest receive gets the earliest message it accepts. Messages of one sender keep their order; those of several
    senders are ordered by arrival, then by rank.

    Attributes:
        schedule: gives the latencies of a message.
        to: the receiving rank.
        members: of the view.
        lost: its lost members; the view updates it.
    """

    clock: Clock
    carrier: Carrier | None
    schedule: Schedule
    to: int
    members: tuple[int, ...]
    lost: set[int]
    _coming: dict[int, deque[Message]] = field(default_factory=dict, init=False)  # by sender, in the order sent
    _here: list[tuple[float, int, Message]] = field(default_factory=list, init=False)  # sorted by time and rank
    _posted: list[Receive] = field(default_factory=list, init=False)
    _parked: Receive | None = field(default=None, init=False)

    def send(self, source: int, x: Tensor) -> Message:
        """Start sending a message."""
        message = Message(source, x)
        if self.to in self.lost or source in self.lost:  # the last words of one that was killed
            message.lost = True
            return message
        self._coming.setdefault(source, deque()).append(message)
        if self.carrier is None or source == self.to:
            self._end(message)
        else:
            on_end = partial(self._end, message)
            num_bytes = x.numel() * x.element_size()
            message.flow = self.carrier.send(source, self.to, num_bytes, on_end, self.schedule.direct_latencies)
        return message

    def wait_sent(self, message: Message) -> None:
        """Block the sender until the message has arrived; raises `PeerLost` if the receiver is lost first."""
        if not message.ended and not message.lost:
            message.parked = True
            try:
                self.clock.park(lambda: f"the end of its message to rank {self.to}, which is under way")
            finally:
                message.parked = False
        if message.lost:
            raise PeerLost(f"rank {message.source} sends to rank {self.to}, which is gone", (self.to,))

    def post(self, source: int | None) -> Receive:
        """Post a receive."""
        receive = Receive(source)
        self._posted.append(receive)
        return receive

    def wait_received(self, receive: Receive) -> Message:
        """Block the receiver until it has its message; raises `PeerLost` if no possible sender is left."""
        while True:
            self._match()
            if receive.message is not None:
                return receive.message
            if self._nobody_left(receive):
                lost = tuple(sorted(self.lost)) if receive.source is None else (receive.source,)
                raise PeerLost(f"{self._describe(receive)} will not come: ranks {named(lost)} are gone", lost)
            self._parked = receive
            try:
                self.clock.park(lambda: self._describe(receive))
            finally:
                self._parked = None

    def lose(self, rank: int) -> None:
        """A member is lost. Arrived messages stay; pending ones from or to it are lost."""
        gone: list[Message] = []
        for source in self._coming if rank == self.to else [rank]:
            gone += self._coming.get(source, ())
            self._coming[source] = deque()
        for message in gone:
            message.lost = not message.ended
            if self.carrier is not None and message.flow is not None:
                self.carrier.cancel(message.flow)
            self._wake_sender(message)
        if self._parked is not None and self._nobody_left(self._parked):
            self._wake_receiver()

    def _end(self, message: Message) -> None:
        message.ended, message.flow = True, None
        self._wake_sender(message)
        coming = self._coming[message.source]
        while coming and coming[0].ended:  # one that overtook waits for those sent before it
            bisect.insort(self._here, (self.clock.now, message.source, coming.popleft()), key=lambda x: x[:2])
        if self._parked is not None and self._parked.takes(message.source):
            self._wake_receiver()

    def _match(self) -> None:
        """Match messages with receives, in the receiver's turn, once all arrivals of that time are known."""
        for receive in list(self._posted):
            found = next((i for i, (_, source, _) in enumerate(self._here) if receive.takes(source)), None)
            if found is not None:
                receive.message = self._here.pop(found)[2]
                self._posted.remove(receive)

    def _nobody_left(self, receive: Receive) -> bool:
        if receive.source is not None:
            return receive.source in self.lost
        return bool(self.lost) and len(self.lost) >= len(self.members) - 1

    def _wake_sender(self, message: Message) -> None:
        if message.parked:
            message.parked = False
            self.clock.wake(message.source)

    def _wake_receiver(self) -> None:
        self._parked = None
        self.clock.wake(self.to)

    def _describe(self, receive: Receive) -> str:
        source = f"rank {receive.source}" if receive.source is not None else f"anyone of ranks {named(self.members)}"
        return f"a message to rank {self.to} from {source}"


def check_like(message: Message, like: Tensor, to: int) -> Tensor:
    """The message's tensor, when it is shaped like ``like``.

    Raises:
        ValueError: when it is not.
    """
    x = message.x
    if x.shape != like.shape or x.dtype != like.dtype:
        raise ValueError(
            f"rank {message.source} sent {x.dtype} {list(x.shape)} to rank {to}, which receives it as {like.dtype} "
            f"{list(like.shape)}; both must name one shape and dtype"
        )
    return x
