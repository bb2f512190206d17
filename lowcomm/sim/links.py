"""What joins the ranks, and how their messages use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

# one number for each (source, to): rows of a matrix or a function
Pairs = Sequence[Sequence[float]] | Callable[[int, int], float]


@dataclass(frozen=True)
class Transport:
    """How messages use the links; the defaults are those of TCP on Linux (benchmarks/network_model.py).

    Attributes:
        streams: connections per message; they multiply the windows.
        window_bytes: what one connection may have in flight at most: by default what Linux's send buffers hold. None
            for no limit.
        initial_window_bytes: what one connection may have in flight when it was idle: ten full segments. None for no
            slow start.
        latency_factor: multiplies all latencies.
        bandwidth_factor: the part of a link's bits that carries payload; the rest are headers and acknowledgements.
        half_duplex: sending and receiving share one link per rank, as on Wi-Fi.

    Raises:
        ValueError: for numbers out of range.
    """

    streams: int = 1
    window_bytes: float | None = 2.8e6
    initial_window_bytes: float | None = 14_480.0
    latency_factor: float = 1.0
    bandwidth_factor: float = 0.95
    half_duplex: bool = False

    def __post_init__(self) -> None:
        """Check every number."""
        if self.streams < 1:
            raise ValueError(f"streams is {self.streams}; a flow needs at least 1 connection")
        for name in ("window_bytes", "initial_window_bytes"):
            num_bytes = getattr(self, name)
            if num_bytes is not None and not num_bytes > 0:
                raise ValueError(f"{name} is {num_bytes}; it must be above 0, or None for no limit")
        if not 0 <= self.latency_factor < inf:
            raise ValueError(f"latency_factor is {self.latency_factor}; it must be at least 0 (1: as it is)")
        if not 0 < self.bandwidth_factor <= 1:
            raise ValueError(f"bandwidth_factor is {self.bandwidth_factor}; it must be above 0 and at most 1")


# Links that carry nothing but payload, and make no connection wait: for sums on paper.
BARE = Transport(window_bytes=None, initial_window_bytes=None, bandwidth_factor=1.0)


@dataclass(frozen=True)
class Links:
    """What connects the ranks.

    Attributes:
        up_bits_per_s: what each rank can send, over all its flows.
        down_bits_per_s: what each rank can receive.
        latency_s: one way, from source to destination; not the round trip.
        path_bits_per_s: what all flows from one source to one destination share; None or inf: no limit of its own.
        transport: how messages use them.

    Raises:
        ValueError: for rates of zero, negative latencies, and lists or matrices whose sizes disagree.
    """

    up_bits_per_s: Sequence[float]
    down_bits_per_s: Sequence[float]
    latency_s: Pairs
    path_bits_per_s: Pairs | None = None
    transport: Transport = Transport()

    def __post_init__(self) -> None:
        """Check every number that is there; those of functions are checked when they are asked for."""
        n = len(self.up_bits_per_s)
        if n == 0 or len(self.down_bits_per_s) != n:
            raise ValueError(
                f"up_bits_per_s has {n} ranks and down_bits_per_s {len(self.down_bits_per_s)}; give both one rate for "
                "each rank, and at least one rank"
            )
        for name, rates in (("up_bits_per_s", self.up_bits_per_s), ("down_bits_per_s", self.down_bits_per_s)):
            for rank, rate in enumerate(rates):
                check_rate(f"{name}[{rank}]", rate)
        for name, pairs in (("latency_s", self.latency_s), ("path_bits_per_s", self.path_bits_per_s)):
            if isinstance(pairs, Sequence) and (len(pairs) != n or any(len(row) != n for row in pairs)):
                sizes = sorted({len(row) for row in pairs})
                raise ValueError(
                    f"{name} has {len(pairs)} rows of lengths {sizes}; {n} ranks need {n} rows of {n} numbers"
                )
        if isinstance(self.latency_s, Sequence):
            for source in range(n):
                for to in range(n):
                    self.latency(source, to)
        if isinstance(self.path_bits_per_s, Sequence):
            for source in range(n):
                for to in range(n):
                    if source != to:
                        self.path(source, to)
        if self.transport.half_duplex and list(self.up_bits_per_s) != list(self.down_bits_per_s):
            raise ValueError(
                "half_duplex needs equal up_bits_per_s and down_bits_per_s: both directions are one link; make them "
                "equal or set half_duplex to False"
            )

    @property
    def num_ranks(self) -> int:
        """How many ranks are connected."""
        return len(self.up_bits_per_s)

    def latency(self, source: int, to: int) -> float:
        """Seconds one way, as they count; ValueError when negative."""
        latency_s = _of(self.latency_s, source, to) * self.transport.latency_factor
        if not 0 <= latency_s < inf:
            raise ValueError(f"latency_s from rank {source} to rank {to} is {latency_s}; it must be 0 or more, finite")
        return latency_s

    def path(self, source: int, to: int) -> float:
        """Bits per second that all flows from source to destination share; inf for no limit; ValueError for zero."""
        rate = inf if self.path_bits_per_s is None else _of(self.path_bits_per_s, source, to)
        if rate != inf:
            check_rate(f"path_bits_per_s from rank {source} to rank {to}", rate)
        return rate

    def window_bytes(self) -> float:
        """What all connections of a message may have in flight; inf for no limit."""
        window_bytes = self.transport.window_bytes
        return inf if window_bytes is None else self.transport.streams * window_bytes


def _of(pairs: Pairs, source: int, to: int) -> float:
    return pairs(source, to) if callable(pairs) else pairs[source][to]


def check_rate(name: str, bits_per_s: float) -> None:
    """Refuse a rate of zero, of less, or without end.

    Raises:
        ValueError: naming it.
    """
    if not (bits_per_s > 0 and math.isfinite(bits_per_s)):
        raise ValueError(
            f"{name} is {bits_per_s} bits/s; a link's rate must be above 0 and finite. To cut a connection, block it "
            "or let its rank crash"
        )
