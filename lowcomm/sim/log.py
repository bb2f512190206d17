"""What the ranks of a simulation did, in program order and without times, so that `lowcomm.sim.retime` can do it again.

The file is JSON lines, gzipped. The first line has all operations that occur, each once; every other line has the
program of some ranks as numbers of operations. Steps, messages and waits recur in any run, so this is small: a step, an
exchange and a wait are the same three numbers in every step and mostly on every rank.
"""

from __future__ import annotations

import gzip
import json
import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from lowcomm.comm.base import Call, Comm, Late, PeerLost, Work
from lowcomm.ledger import Ledger

T = TypeVar("T")

EVENTS = "events.jsonl.gz"


class Compute(NamedTuple):
    """A piece of an inner step passed.

    Attributes:
        is_first: it began the next step.
        share: of the step's seconds, in [0, 1].
    """

    is_first: bool
    share: float


class Issue(NamedTuple):
    """A call of `Comm`.

    Attributes:
        kind: the method's name.
        view: among whom, a number in `Events.views`.
        num_bytes: of its tensor.
        other: the rank that a broadcast or a receive is from, a send is to, or an exchange is with.
        tag: the purpose that the meter counts it for.
    """

    kind: str
    view: int
    num_bytes: int
    other: int | None
    tag: str


class Wait(NamedTuple):
    """A wait for the message issued ``back`` messages ago, 1 being the last."""

    back: int


class Note(NamedTuple):
    """A call of the ledger, by the name that `lowcomm.ledger.Ledger.heard` gets."""

    call: str


Operation = Compute | Issue | Wait | Note
_KINDS: dict[str, Callable[..., Operation]] = {kind.__name__: kind for kind in (Compute, Issue, Wait, Note)}


@dataclass(frozen=True)
class Books:
    """What the ledgers of a run need besides time, see `lowcomm.ledger.Ledger`."""

    num_replicas: int
    step_tokens: int
    token_flops: float | None
    peak_flops: float | None


@dataclass(frozen=True)
class Events:
    """A log that was read.

    Attributes:
        operations: that occur.
        views: members that exchanges were among.
        programs: of each rank, as numbers of operations.
    """

    books: Books
    operations: list[Operation]
    views: list[tuple[int, ...]]
    programs: list[Sequence[int]]


@dataclass
class Log:
    """All ranks' programs while they are recorded.

    Attributes:
        refusal: why they must not be replayed with other times; None when they may.
    """

    num_ranks: int
    refusal: str | None = None
    _numbers: dict[Operation, int] = field(default_factory=dict, init=False, repr=False)
    _views: list[tuple[int, ...]] = field(default_factory=list, init=False, repr=False)
    _number_of_view: dict[int, int] = field(default_factory=dict, init=False, repr=False)  # by id: hashing many is slow
    ranks: list[RankLog] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.ranks = [RankLog(self, rank) for rank in range(self.num_ranks)]

    def refuse(self, reason: str) -> None:
        """Times could have changed what was computed; the first reason is kept."""
        self.refusal = self.refusal or reason

    def number(self, operation: Operation) -> int:
        """Of an operation in the table."""
        return self._numbers.setdefault(operation, len(self._numbers))

    def view(self, members: tuple[int, ...]) -> int:
        """The number of some members in the table."""
        if id(members) not in self._number_of_view:
            self._number_of_view[id(members)] = len(self._views)
            self._views.append(members)  # which also keeps its id from being another's
        return self._number_of_view[id(members)]

    def write(self, path: Path) -> None:
        """Write a log that `read_events` reads; of one that is refused, the reason alone.

        Equal programs are equal files, whatever the times were.
        """
        for log in self.ranks:
            if log.num_reads:
                log.refuse("reads the clock, so it may do something else at other times")
        lines: list[dict[str, Any]] = [{"refusal": self.refusal}] if self.refusal is not None else self._lines()
        with path.open("wb") as raw, gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as file:
            for line in lines:
                file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def _lines(self) -> list[dict[str, Any]]:
        same: dict[bytes, list[int]] = {}
        for log in self.ranks:
            same.setdefault(log.program.tobytes(), []).append(log.rank)
        # Numbers were given in the order of time; those of the file follow the ranks and their programs.
        numbers: dict[int, int] = {}
        views: dict[int, int] = {}
        programs = []
        for program, ranks in same.items():
            for number in dict.fromkeys(array("I", program)):
                numbers.setdefault(number, len(numbers))
            programs.append({"ranks": ranks, "program": [numbers[number] for number in array("I", program)]})
        table, operations = list(self._numbers), []
        for operation in (table[number] for number in numbers):
            if isinstance(operation, Issue):
                operation = operation._replace(view=views.setdefault(operation.view, len(views)))
            operations.append([type(operation).__name__, *operation])
        members = [self._views[view] for view in views]
        return [
            {"refusal": None, "books": vars(self.ranks[0].books), "views": members, "operations": operations},
            *programs,
        ]


class RankLog:
    """One rank's program while it is recorded.

    Attributes:
        program: numbers of operations.
        books: of its ledger; None before `listen`.
        num_reads: how often the clock was read but for timing a wait, once no wait is under way.
    """

    __slots__ = ("_issued", "_log", "_num_issued", "books", "num_reads", "program", "rank")

    def __init__(self, log: Log, rank: int) -> None:
        self.rank, self.program, self.num_reads = rank, array("I"), 0
        self.books: Books | None = None
        self._log, self._num_issued = log, 0
        self._issued: tuple[str, int, int, int | None] | None = None

    def compute(self, is_first: bool, share: float) -> None:
        """A piece of a step passes now."""
        self.program.append(self._log.number(Compute(is_first, share)))

    def listen(self, ledger: Ledger, now: Callable[[], float]) -> None:
        """Record a ledger's calls from now on; it gets a clock of its own, so that its readings are not counted."""
        self.books = Books(ledger.num_replicas, ledger.step_tokens, ledger.token_flops, ledger.peak_flops)
        ledger.heard, ledger.now = lambda call: self.program.append(self._log.number(Note(call))), now

    def issue(self, call: Call, view: int) -> int:
        """A message set out, whose purpose `count` says next; its number."""
        assert self._issued is None, "the meter has not counted the last message"
        self._issued = (call.kind, view, call.num_bytes, call.peer)
        self._num_issued += 1
        return self._num_issued

    def count(self, tag: str) -> None:
        """The meter counted the message that was issued last."""
        assert self._issued is not None
        self.program.append(self._log.number(Issue(*self._issued, tag)))
        self._issued = None

    def wait(self, number: int) -> None:
        """A wait for a message begins."""
        self.program.append(self._log.number(Wait(self._num_issued - number + 1)))

    def view(self, members: tuple[int, ...]) -> int:
        """See `Log.view`."""
        return self._log.view(members)

    def refuse(self, reason: str) -> None:
        """See `Log.refuse`."""
        self._log.refuse(f"rank {self.rank} {reason}")


class LoggedComm(Comm):
    """Another Comm whose calls are recorded.

    It belongs inside a `MeteredComm`, which reads the clock twice a wait and whose meter tells `RankLog.count`.
    """

    def __init__(self, inner: Comm, log: RankLog) -> None:
        self.rank, self.members = inner.rank, inner.members
        self._inner, self._log, self._view = inner, log, log.view(inner.members)

    def issue(self, call: Call) -> Work[Any]:
        """The inner one's, recorded; a receive from whoever comes first is the end of replaying."""
        if call.kind == "recv" and call.peer is None:
            self._log.refuse("takes messages from whoever comes first, which may be another at other times")
        return _Logged(self._inner.issue(call), self._log, self._log.issue(call, self._view))

    def sub(self, members: Sequence[int]) -> Comm:
        """See `Comm.sub`."""
        return LoggedComm(self._inner.sub(members), self._log)

    def now(self) -> float:
        """See `Comm.now`; counted."""
        self._log.num_reads += 1
        return self._inner.now()


class _Logged(Generic[T]):
    """A Work whose first wait is recorded; any other returns at once."""

    __slots__ = ("_log", "_number", "_work")

    def __init__(self, work: Work[T], log: RankLog, number: int) -> None:
        self._work, self._log = work, log
        self._number: int | None = number

    def wait(self) -> T:
        """See `Work.wait`."""
        self._log.num_reads -= 2  # the meter's, before and after
        if self._number is not None:
            self._log.wait(self._number)
            self._number = None
        try:
            return self._work.wait()
        except (PeerLost, Late) as error:
            self._log.refuse(f"met a fault, which may hit elsewhere at other times: {error}")
            raise


def read_events(path: Path) -> Events:
    """The log in a file.

    Raises:
        ValueError: when there is none, when it is broken, or when it must not be replayed.
    """
    if not path.exists():
        raise ValueError(f"there is no {path}; `lowcomm simulate` writes one at the end of a run: simulate it anew")
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            head, *lines = (json.loads(line) for line in file)
        if head["refusal"] is None:
            return _events(head, lines)
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is no log of a simulation ({error!r}); simulate the run anew") from error
    raise ValueError(f"{path.parent} cannot be timed anew: {head['refusal']}; simulate it on the other cluster instead")


def _events(head: dict[str, Any], lines: Sequence[dict[str, Any]]) -> Events:
    operations = [_operation(*operation) for operation in head["operations"]]
    programs: dict[int, Sequence[int]] = {}
    for line in lines:
        programs |= dict.fromkeys(line["ranks"], array("I", line["program"]))
    views = [tuple(members) for members in head["views"]]
    return Events(Books(**head["books"]), operations, views, [programs[rank] for rank in range(len(programs))])


def _operation(kind: str, *args: Any) -> Operation:
    operation = _KINDS[kind](*args)
    if isinstance(operation, Issue) and not isinstance(operation.num_bytes, int):
        raise TypeError(f"{kind} of {operation.num_bytes} bytes")  # older logs had those of several tensors
    return operation
