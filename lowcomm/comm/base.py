"""Communication between ranks, all of it through `Comm`.

Calls return at once with a `Work`. Nobody can ask whether a message has arrived: the order of messages depends only on
the step number, so a program gives the same result in every world.
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
    """Raised by `Work.wait` when a rank it waits for is lost.

    Attributes:
        ranks: those known to be lost; empty when the transport cannot tell which.
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class Late(Exception):
    """Raised by `Work.wait` when a message did not arrive by its deadline; the sender may still live."""


class Work(Protocol[T_co]):
    """A pending call. Wait for every one, also for sends: a message may not leave before."""

    def wait(self) -> T_co:
        """Block until it is done and return its result; raises `PeerLost` or `Late`."""
        ...


Kind = Literal["all_sum", "all_gather", "all_to_all", "broadcast", "send", "recv", "exchange"]


class Call(NamedTuple):
    """A call of a Comm's method.

    Attributes:
        x: the input; for "recv", and for "broadcast" except at its source, only the result's shape and dtype.
        peer: the source of a "broadcast" or "recv" (None: any), the destination of a "send", the partner of an
            "exchange".
    """

    kind: Kind
    x: Tensor
    peer: int | None = None

    @property
    def num_bytes(self) -> int:
        return self.x.numel() * self.x.element_size()


class Comm(ABC):
    """One rank's view of the ranks that it communicates with.

    All methods check their arguments and call `issue`, which each world implements.

    Attributes:
        rank: of this process, constant; all views use the same numbering.
        members: the sorted ranks of this view, this one included.
        share: this rank's weight in averages over the view, times the number of members; None: nobody brings anything.
    """

    rank: int
    members: tuple[int, ...]
    share: float | None = 1.0

    @property
    def place(self) -> int:
        """The index of this rank among the members; fast also for very many ranks."""
        return bisect_left(self.members, self.rank)

    @abstractmethod
    def issue(self, call: Call) -> Work[Any]:
        """Start a call; its Work's result is that of the method of the same name."""

    @abstractmethod
    def sub(self, members: Sequence[int]) -> Comm:
        """A view of fewer members, including this rank. Nothing is built before its first use."""

    @abstractmethod
    def now(self) -> float:
        """Seconds since some fixed time; virtual in the simulator."""

    def regroup(self, lost: PeerLost | Late) -> Comm:
        """A view of the remaining members after ``lost``; all of them call it. Pending calls of this view are void.

        By default there is none.

        Raises:
            PeerLost, Late: ``lost``, when continuing is impossible.
        """
        raise lost

    def agree(self, error: Exception | None) -> None:
        """Raise ``error`` if not None; where a replica has many ranks, raise also if another of them has an error.

        For decisions that a replica makes once, such as whether an exchange succeeded.
        """
        if error is not None:
            raise error

    @final
    def all_sum(self, x: Tensor) -> Work[Tensor]:
        """The sum of all members' ``x`` (same shape, a dtype of `SUMMABLE`) as a fresh tensor; ``x`` is not modified.

        Raises:
            ValueError: for another dtype.
        """
        if x.dtype not in SUMMABLE:
            raise ValueError(f"{x.dtype} cannot be summed on the wire; convert to one of {SUMMABLE}")
        return self.issue(Call("all_sum", x))

    @final
    def all_gather(self, x: Tensor) -> Work[Tensor]:
        """All members' ``x`` (same shape and dtype) as rows of a fresh ``[n, *x.shape]``, in members' order."""
        return self.issue(Call("all_gather", x))

    @final
    def all_to_all(self, x: Tensor) -> Work[Tensor]:
        """Send row i of ``x`` to the i-th member; row i of the fresh result is from the i-th member.

        All members' ``x`` and the results have the same shape ``[n, ...]`` and dtype.

        Raises:
            ValueError: unless there is one row for each member.
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
        """Send ``x`` to rank ``to``, which must `recv` it. Messages between two ranks keep their order."""
        self._check(to)
        return self.issue(Call("send", x, to))

    @final
    def recv(self, like: Tensor, source: int | None = None) -> Work[tuple[int, Tensor]]:
        """The sender and a tensor shaped like ``like``, from rank ``source`` or, if None, from any."""
        if source is not None:
            self._check(source)
        return self.issue(Call("recv", like, source))

    @final
    def exchange(self, x: Tensor, peer: int) -> Work[Tensor]:
        """Swap ``x`` (same shape and dtype) with rank ``peer``, which calls it for this rank.

        Both directions are sent at once. Exchanges of a pair match in order, and only each other. With oneself it is a
        copy.
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
    """Ranks in order as text, "0, 1, 2"; only the first ones of many."""
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

    ``steps`` is a generator that yields each Work and receives its result. Construction issues the first Work;
    `advance` finishes one and issues the next; `result` finishes all. Call them at fixed step numbers.

    Attributes:
        pending: the pending Work; None once finished.
    """

    def __init__(self, steps: Generator[Work[Any], Any, T]) -> None:
        self.pending: Work[Any] | None = None
        self._steps = steps
        self._result: T
        self.resume(None)

    def resume(self, value: Any) -> None:
        """Pass in the result of `pending` and run to the next Work or the end."""
        try:
            self.pending = self._steps.send(value)
        except StopIteration as stop:
            self.pending, self._result = None, stop.value

    def advance(self) -> None:
        """Wait for the pending Work, if any, and issue the next."""
        if self.pending is not None:
            self.resume(self.pending.wait())

    def steps(self) -> Generator[Work[Any], Any, T]:
        """The remaining steps, for use within another generator: ``result = yield from task.steps()``."""
        while self.pending is not None:
            self.resume((yield self.pending))
        return self._result

    def result(self) -> T:
        """Finish all Works and return the result; later calls return it again."""
        while self.pending is not None:
            self.advance()
        return self._result
