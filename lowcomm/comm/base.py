"""What a rank can say to the others. Everything that talks, talks through `Comm`.

Calls return at once with a `Work`; the message is on its way. Nobody can ask whether it has arrived: order is a
function of the step number, so that one program gives one result in every world.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Generator, Iterable, Sequence
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, final

import torch
from torch import Tensor

_MANY = 16

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class PeerLost(Exception):
    """Raised by `Work.wait` when a rank that it waits for is gone.

    Attributes:
        ranks: those known to be lost; empty when the transport cannot tell which.
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class Late(Exception):
    """Raised by `Work.wait` when a message did not arrive by its deadline; the sender may still live."""


class Work(Protocol[T_co]):
    """Something under way. Wait for every one, also for what was sent: a message may leave no sooner."""

    def wait(self) -> T_co:
        """Block until it is done and return its result; raises `PeerLost` or `Late`."""
        ...


Kind = Literal["all_sum", "all_gather", "all_to_all", "broadcast", "send", "recv", "exchange"]


class Call(NamedTuple):
    """What a rank asks of the wire.

    Attributes:
        x: what it brings; of "recv" and, elsewhere than at its source, of "broadcast", what comes is shaped like it.
        peer: the source of a "broadcast" and of a "recv" (None: whoever comes first), whom a "send" goes to, the other
            of an "exchange".
    """

    kind: Kind
    x: Tensor
    peer: int | None = None

    @property
    def num_bytes(self) -> int:
        return self.x.numel() * self.x.element_size()


class Comm(ABC):
    """One rank's view of the ranks that it talks to.

    All exchanges are calls of one primitive, `issue`, which a world implements: its calls have been checked.

    Attributes:
        rank: this process, constant for its life; ranks of all views count in one numbering.
        members: the sorted ranks of this view, this one included.
    """

    rank: int
    members: tuple[int, ...]

    @property
    def place(self) -> int:
        """Where this rank stands among the members, from 0; quick also among very many."""
        return bisect_left(self.members, self.rank)

    @abstractmethod
    def issue(self, call: Call) -> Work[Any]:
        """Start a call; its Work's result is that of the method of its name."""

    @abstractmethod
    def sub(self, members: Sequence[int]) -> Comm:
        """A view with fewer members, this rank among them. Nothing is built before its first use."""

    @abstractmethod
    def now(self) -> float:
        """Seconds since some fixed moment; virtual in the simulator."""

    def regroup(self, lost: PeerLost | Late) -> Comm:
        """A view of those who are left, after ``lost``; all of them call it, and what is under way here is over.

        By default there is none.

        Raises:
            PeerLost, Late: ``lost``, where nobody can go on without who is gone.
        """
        raise lost

    def agree(self, error: Exception | None) -> None:
        """Raise ``error``, if there is one; where a replica is many ranks, something also when another of them has one.

        For what a replica must decide once, such as whether an exchange has come to its end.
        """
        if error is not None:
            raise error

    @final
    def all_sum(self, x: Tensor) -> Work[Tensor]:
        """The sum of every member's ``x`` (one shape, a dtype of `SUMMABLE`) as a fresh tensor; ``x`` is not modified.

        Raises:
            ValueError: for another dtype.
        """
        if x.dtype not in SUMMABLE:
            raise ValueError(f"{x.dtype} cannot be summed on the wire; convert to one of {SUMMABLE}")
        return self.issue(Call("all_sum", x))

    @final
    def all_gather(self, x: Tensor) -> Work[Tensor]:
        """Every member's ``x`` (one shape and dtype): rows of a fresh ``[n, *x.shape]``, in members' order."""
        return self.issue(Call("all_gather", x))

    @final
    def all_to_all(self, x: Tensor) -> Work[Tensor]:
        """Row i of ``x`` goes to the i-th member; row i of the result, which is fresh, came from the i-th member.

        All members' ``x`` have one shape, ``[n, ...]``, and dtype, and so has the result. One tensor, not n of them:
        each of very many ranks would make as many.

        Raises:
            ValueError: when there is not one row for each member.
        """
        num = len(self.members)
        if x.dim() == 0 or len(x) != num:
            raise ValueError(f"all_to_all got shape {list(x.shape)} for {num} members; give one row for each")
        return self.issue(Call("all_to_all", x))

    @final
    def broadcast(self, x: Tensor, source: int) -> Work[Tensor]:
        """The ``x`` of rank ``source``, as a fresh tensor shaped like ``x``."""
        self._check(source)
        return self.issue(Call("broadcast", x, source))

    @final
    def send(self, x: Tensor, to: int) -> Work[None]:
        """Send ``x`` to rank ``to``, which must `recv` it; messages between two ranks keep their order."""
        self._check(to)
        return self.issue(Call("send", x, to))

    @final
    def recv(self, like: Tensor, source: int | None = None) -> Work[tuple[int, Tensor]]:
        """The sender and a tensor shaped like ``like``, from rank ``source`` or, if None, from whoever comes first."""
        if source is not None:
            self._check(source)
        return self.issue(Call("recv", like, source))

    @final
    def exchange(self, x: Tensor, peer: int) -> Work[Tensor]:
        """Swap with rank ``peer``, which calls it for this rank: both get the other's ``x`` (one shape and dtype).

        Both directions go at once, and nobody else takes part. Exchanges of two ranks are matched in order, and with
        nothing else. With oneself it is a copy.
        """
        self._check(peer)
        if peer == self.rank:
            return Done(x.detach().clone(memory_format=torch.contiguous_format))
        return self.issue(Call("exchange", x, peer))

    def _check(self, rank: int) -> None:
        place = bisect_left(self.members, rank)
        if place == len(self.members) or self.members[place] != rank:
            raise ValueError(f"rank {rank} is not among the members {named(self.members)}")


def named(ranks: Iterable[int]) -> str:
    """Ranks in order, for people: "0, 1, 2", and only the first ones of many."""
    ordered = sorted(ranks)
    first = ", ".join(map(str, ordered[:_MANY]))
    return first if len(ordered) <= _MANY else f"{first}, ... ({len(ordered)} ranks)"


# What both gloo and NCCL can add; other worlds refuse the rest alike.
SUMMABLE = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.uint8, torch.int8),
)


class Done(Generic[T]):
    """A `Work` whose result is already here."""

    def __init__(self, result: T) -> None:
        self._result = result

    def wait(self) -> T:
        """The result, at once."""
        return self._result


class Task(Generic[T]):
    """A computation that pauses at each `Work` it depends on.

    ``steps`` is a generator that yields every Work and is sent its result. The first Work is issued on construction;
    `advance` finishes one and issues the next; `result` drains the rest. When to call them is fixed by step number.

    Attributes:
        pending: the Work under way; None once the result is there.
    """

    def __init__(self, steps: Generator[Work[Any], Any, T]) -> None:
        self.pending: Work[Any] | None = None
        self._steps = steps
        self._result: T
        self.resume(None)

    def resume(self, value: Any) -> None:
        """Hand in what `pending` brought and run to the next Work or to the end."""
        try:
            self.pending = self._steps.send(value)
        except StopIteration as stop:
            self.pending, self._result = None, stop.value

    def advance(self) -> None:
        """Wait for the Work under way, if there is one, and issue the next."""
        if self.pending is not None:
            self.resume(self.pending.wait())

    def steps(self) -> Generator[Work[Any], Any, T]:
        """What is left to do, for a generator of which this is a part: ``result = yield from task.steps()``."""
        while self.pending is not None:
            self.resume((yield self.pending))
        return self._result

    def result(self) -> T:
        """Wait for all that is left and return the result; a second call returns it again."""
        while self.pending is not None:
            self.advance()
        return self._result
