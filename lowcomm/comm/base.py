"""What a rank can say to the others. Everything that talks, talks through `Comm`.

Calls return at once with a `Work`; the message is on its way. Nobody can ask whether it has arrived: order is a
function of the step number, so that one program gives one result in every world.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Generator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

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


class Comm(ABC):
    """One rank's view of the ranks that it talks to.

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
    def all_sum(self, x: Tensor) -> Work[Tensor]:
        """The sum of every member's ``x`` (one shape, a dtype of `SUMMABLE`) as a fresh tensor; ``x`` is not modified.

        Raises:
            ValueError: for another dtype.
        """

    @abstractmethod
    def all_gather(self, x: Tensor) -> Work[Tensor]:
        """Every member's ``x`` (one shape and dtype): rows of a fresh ``[n, *x.shape]``, in members' order."""

    @abstractmethod
    def all_to_all(self, x: Tensor) -> Work[Tensor]:
        """Row i of ``x`` goes to the i-th member; row i of the result, which is fresh, came from the i-th member.

        All members' ``x`` have one shape, ``[n, ...]``, and dtype, and so has the result. One tensor, not n of them:
        each of very many ranks would make as many.

        Raises:
            ValueError: when there is not one row for each member.
        """

    @abstractmethod
    def broadcast(self, x: Tensor, source: int) -> Work[Tensor]:
        """The ``x`` of rank ``source``, as a fresh tensor shaped like ``x``."""

    @abstractmethod
    def send(self, x: Tensor, to: int) -> Work[None]:
        """Send ``x`` to rank ``to``, which must `recv` it; messages between two ranks keep their order."""

    @abstractmethod
    def recv(self, like: Tensor, source: int | None = None) -> Work[tuple[int, Tensor]]:
        """The sender and a tensor shaped like ``like``, from rank ``source`` or, if None, from whoever comes first."""

    @abstractmethod
    def exchange(self, x: Tensor, peer: int) -> Work[Tensor]:
        """Swap with rank ``peer``, which calls it for this rank: both get the other's ``x`` (one shape and dtype).

        Both directions go at once, and nobody else takes part. Exchanges of two ranks are matched in order, and with
        nothing else. With oneself it is a copy.
        """

    @abstractmethod
    def sub(self, members: Sequence[int]) -> Comm:
        """A view with fewer members, this rank among them. Nothing is built before its first use."""

    @abstractmethod
    def now(self) -> float:
        """Seconds since some fixed moment; virtual in the simulator."""


# What both gloo and NCCL can add; other worlds refuse the rest alike.
SUMMABLE = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.uint8, torch.int8),
)


def check_summable(x: Tensor) -> None:
    """Refuse a tensor that not every world can sum.

    Raises:
        ValueError: naming the dtypes that can be.
    """
    if x.dtype not in SUMMABLE:
        raise ValueError(f"{x.dtype} cannot be summed on the wire; convert to one of {SUMMABLE}")


def check_rows(x: Tensor, num_members: int) -> None:
    """Refuse for `Comm.all_to_all` what has not one row for each member.

    Raises:
        ValueError: saying so.
    """
    if x.dim() == 0 or len(x) != num_members:
        raise ValueError(f"all_to_all got shape {list(x.shape)} for {num_members} members; give one row for each")


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
