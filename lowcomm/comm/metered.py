"""Counts what a Comm carries: bytes and messages by purpose, and the time spent waiting.

Counted are payload bytes under each exchange's bandwidth-optimal schedule among n members with S bytes each. That is
what gloo and NCCL move, apart from headers; benchmarks/wire_bytes.py checks it against the kernel's counters.

    all_sum      sends and receives 2 (n - 1) / n S
    all_gather   sends and receives (n - 1) S
    all_to_all   sends and receives (n - 1) / n S, the rows for and from others
    broadcast    the source sends (n - 1) S, the others receive S
    exchange     sends and receives S, with oneself nothing

A simulation may use other schedules (``cluster.schedule``): these bytes do not change, so methods stay comparable; the
flows in its trace are what moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from lowcomm.comm.base import Call, Comm, Late, PeerLost, Work

T = TypeVar("T")


@dataclass
class Traffic:
    """What one rank exchanged for one purpose."""

    bytes_sent: int = 0
    bytes_received: int = 0
    num_exchanges: int = 0


@dataclass
class Meter:
    """Running totals of one rank; shared by all views of one `MeteredComm`.

    Attributes:
        by_tag: traffic by purpose.
        wait_s: seconds spent in `Work.wait`; on a GPU stream, up to the last call of `settle`.
        on_timely: called with what makes a program depend on timing: it "reads the clock" or "takes messages from
            whoever comes first"; or None.
        on_wait: called after each wait on the host that took time, with its purpose, start and end; or None.
    """

    by_tag: dict[str, Traffic] = field(default_factory=dict)
    wait_s: float = 0.0
    on_timely: Callable[[str], None] | None = field(default=None, repr=False)
    on_wait: Callable[[str, float, float], None] | None = field(default=None, repr=False)
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list, repr=False)

    @property
    def bytes_sent(self) -> int:
        """Over all purposes."""
        return sum(traffic.bytes_sent for traffic in self.by_tag.values())

    @property
    def bytes_received(self) -> int:
        """Over all purposes."""
        return sum(traffic.bytes_received for traffic in self.by_tag.values())

    def count(self, tag: str, sent: int, received: int) -> None:
        """Add one exchange."""
        traffic = self.by_tag.setdefault(tag, Traffic())
        traffic.bytes_sent += sent
        traffic.bytes_received += received
        traffic.num_exchanges += 1

    def settle(self) -> None:
        """Add the finished waits of GPU streams; waits for the GPU."""
        for start, end in self._events:
            end.synchronize()
            self.wait_s += start.elapsed_time(end) / 1e3
        self._events.clear()

    def state_dict(self) -> dict[str, Any]:
        """The totals."""
        self.settle()
        by_tag = {tag: [x.bytes_sent, x.bytes_received, x.num_exchanges] for tag, x in self.by_tag.items()}
        return {"by_tag": by_tag, "wait_s": self.wait_s}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from these totals."""
        self.by_tag = {tag: Traffic(*counts) for tag, counts in state["by_tag"].items()}
        self.wait_s = state["wait_s"]


class MeteredComm(Comm):
    """Counts the traffic of another Comm.

    Args:
        inner: carries the messages.
        meter: the totals.
        tag: the purpose of this view's messages; `tagged` gives a view for another.
        stream: the GPU whose current stream waits (NCCL); None when waits block the host.
    """

    def __init__(self, inner: Comm, meter: Meter, tag: str = "sync", stream: torch.device | None = None) -> None:
        self.rank, self.members = inner.rank, inner.members
        self.meter = meter
        self._inner, self._tag, self._stream = inner, tag, stream

    def tagged(self, tag: str) -> MeteredComm:
        """The same members and meter under another purpose."""
        return MeteredComm(self._inner, self.meter, tag, self._stream)

    def issue(self, call: Call) -> Work[Any]:
        if self.meter.on_timely is not None and call.kind == "recv" and call.peer is None:
            self.meter.on_timely("takes messages from whoever comes first")
        work = self._inner.issue(call)
        self.meter.count(self._tag, *traffic(call, len(self.members), self.rank))
        return _Timed(work, self.meter, self._inner, self._tag, self._stream)

    def sub(self, members: Sequence[int]) -> Comm:
        """A smaller view with the same meter."""
        return MeteredComm(self._inner.sub(members), self.meter, self._tag, self._stream)

    def regroup(self, lost: PeerLost | Late) -> MeteredComm:
        """The remaining members, with the same meter."""
        return MeteredComm(self._inner.regroup(lost), self.meter, self._tag, self._stream)

    def agree(self, error: Exception | None) -> None:
        """Not counted, as it stays within a replica."""
        self._inner.agree(error)

    def now(self) -> float:
        if self.meter.on_timely is not None:
            self.meter.on_timely("reads the clock")
        return self._inner.now()


def traffic(call: Call, num_members: int, rank: int) -> tuple[int, int]:
    """Bytes that a rank sends and receives in a call among this many members."""
    size, others = call.num_bytes, num_members - 1
    if call.kind == "broadcast":
        return (others * size, 0) if call.peer == rank else (0, size)
    if call.kind in ("send", "recv"):
        return (size, 0) if call.kind == "send" else (0, size)
    each = {"all_sum": 2 * others * size // num_members, "all_gather": others * size}
    each |= {"all_to_all": others * size // num_members, "exchange": size}
    return each[call.kind], each[call.kind]


class _Timed(Generic[T]):
    """A Work whose waits are timed."""

    def __init__(self, work: Work[T], meter: Meter, comm: Comm, tag: str, stream: torch.device | None) -> None:
        self._work, self._meter, self._comm, self._tag, self._stream = work, meter, comm, tag, stream

    def wait(self) -> T:
        """Wait, and add the time to the meter."""
        if self._stream is not None:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            result = self._work.wait()
            end.record()
            self._meter._events.append((start, end))
            return result
        start_s = self._comm.now()
        try:
            return self._work.wait()
        finally:
            end_s = self._comm.now()
            self._meter.wait_s += end_s - start_s
            if self._meter.on_wait is not None and end_s > start_s:
                self._meter.on_wait(self._tag, start_s, end_s)
