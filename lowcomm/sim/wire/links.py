"""What joins the ranks, and how their messages use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

Pairs = Callable[[int, int], float]  # one number for each (source, to)


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
    bandwidth_factor: float = 0.94
    half_duplex: bool = False

    def __post_init__(self) -> None:
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
        ValueError: for links of two rates that ``half_duplex`` makes one.
    """

    up_bits_per_s: Sequence[float]
    down_bits_per_s: Sequence[float]
    latency_s: Pairs
    path_bits_per_s: Pairs | None = None
    transport: Transport = Transport()

    def __post_init__(self) -> None:
        assert 0 < len(self.up_bits_per_s) == len(self.down_bits_per_s)
        if self.transport.half_duplex and list(self.up_bits_per_s) != list(self.down_bits_per_s):
            raise ValueError(
                "half_duplex needs equal up_bits_per_s and down_bits_per_s: both directions are one link; make them "
                "equal or set half_duplex to False"
            )

    @property
    def num_ranks(self) -> int:
        return len(self.up_bits_per_s)

    def latency(self, source: int, to: int) -> float:
        """Seconds one way, times the transport's ``latency_factor``."""
        return self.latency_s(source, to) * self.transport.latency_factor

    def path(self, source: int, to: int) -> float:
        """Bits per second that all flows from source to destination share; inf for no limit."""
        return inf if self.path_bits_per_s is None else self.path_bits_per_s(source, to)

    def window_bytes(self) -> float:
        """What all connections of a message together may have in flight; inf for no limit."""
        window_bytes = self.transport.window_bytes
        return inf if window_bytes is None else self.transport.streams * window_bytes
