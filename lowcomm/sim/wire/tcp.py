"""What TCP and waiting for each other's words add to the time that a transfer's bytes take."""

from __future__ import annotations

from math import inf

from lowcomm.sim.wire.collectives import Turns

MIN_IDLE_S = 0.2  # Linux: what a connection waits at least, beyond a round trip, before it takes a packet for lost


class Connections:
    """The congestion windows of all connections: how much each may send before it hears back.

    A new connection, and one that was idle for long, begins with the initial window, which grows by what arrives until
    it no longer limits (Linux: tcp_slow_start_after_idle). Words of one direction keep the other from being idle.
    Losses are not modelled.

    Args:
        initial_bytes: the initial window; None: nothing limits.
    """

    def __init__(self, initial_bytes: float | None) -> None:
        self._initial_bytes = initial_bytes
        self._windows: dict[tuple[int, int], tuple[float, float]] = {}  # bytes, and when it was last used

    def wait_s(
        self, path: tuple[int, int], now_s: float, burst_bytes: float, bytes_per_s: float, round_trip_s: float
    ) -> float:
        """Seconds in which bytes that are to go on one path at once are held back; counts as the path's use."""
        if self._initial_bytes is None or round_trip_s == 0 or bytes_per_s == inf:
            return 0.0
        window, used_s = self._windows.get(path, (self._initial_bytes, now_s))
        num_idle = int(max(0.0, now_s - used_s) / (round_trip_s + MIN_IDLE_S))
        window = max(self._initial_bytes, window * 0.5 ** min(num_idle, 60))
        enough, sent, waited_s = bytes_per_s * round_trip_s, 0.0, 0.0
        while window + sent < enough and 2 * sent + window < burst_bytes:
            waited_s += round_trip_s - (window + sent) / bytes_per_s
            sent += window + sent
        self._windows[path] = (max(window, min(window + burst_bytes, 2 * enough)), now_s)
        return waited_s

    def used(self, path: tuple[int, int], now_s: float) -> None:
        """A transfer on this path has ended; it was used in both directions."""
        for way in (path, path[::-1]):
            if way in self._windows:
                self._windows[way] = (self._windows[way][0], now_s)


def turns_s(turns: Turns, bytes_per_s: float, latency_s: float, back_s: float) -> float:
    """Seconds in which a pipeline's link is silent because the next message may not leave yet.

    A message may leave when the one two before it has arrived and word of that has come back: with messages of s
    seconds, one way of a and two messages in each turn that is a + back - s, if that is positive. Where both ranks
    send to each other on one connection the word stands in line behind a message, and costs its way back each time.
    What its sender sends others before comes on top.
    """
    message_s, round_trip_s = turns.message_bytes / bytes_per_s, latency_s + back_s
    in_line = turns.both_ways and message_s >= round_trip_s / 2
    each_s = round_trip_s if in_line else max(0.0, round_trip_s - message_s)
    return turns.num * each_s + turns.behind * message_s
