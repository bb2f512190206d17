"""How long transfers wait for TCP's windows and for the receiver's word that it is ready."""

from __future__ import annotations

from math import inf

from lowcomm.sim.wire.collectives import Turns

MIN_IDLE_S = 0.2  # Linux: the least time beyond a round trip after which a packet counts as lost


class Connections:
    """The congestion windows of all connections: how much each may send before an acknowledgement.

    A connection begins with the initial window. The window grows by what arrives, until it no longer limits. An idle
    one is halved for each round trip and `MIN_IDLE_S`, down to the initial window (Linux: tcp_slow_start_after_idle).
    Use of one direction counts for both. Losses are not modelled.

    Args:
        initial_bytes: the initial window; None: no limit.
    """

    def __init__(self, initial_bytes: float | None) -> None:
        self._initial_bytes = initial_bytes
        self._windows: dict[tuple[int, int], tuple[float, float]] = {}  # bytes, and when it was last used

    def wait_s(
        self, path: tuple[int, int], now_s: float, burst_bytes: float, bytes_per_s: float, round_trip_s: float
    ) -> float:
        """Seconds for which the window holds back a burst of bytes on a path. Updates the window."""
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
        """Note the end of a transfer, which used the path in both directions."""
        for way in (path, path[::-1]):
            if way in self._windows:
                self._windows[way] = (self._windows[way][0], now_s)


def turns_s(turns: Turns, bytes_per_s: float, latency_s: float, back_s: float) -> float:
    """Seconds for which a pipeline's link is silent because the next message may not leave yet.

    A message may leave when the one two before it has arrived and word of that has come back. A message takes s
    seconds, and the way there and back a round trip. So in each turn, of two messages, the link is silent for a round
    trip less s, if that is positive. Where both ranks send on one connection, and s is at least half a round trip, the
    word queues behind a message: then each turn costs a whole round trip. Messages that the sender first sends to
    others are added.
    """
    message_s, round_trip_s = turns.message_bytes / bytes_per_s, latency_s + back_s
    in_line = turns.both_ways and message_s >= round_trip_s / 2
    each_s = round_trip_s if in_line else max(0.0, round_trip_s - message_s)
    return turns.num * each_s + turns.behind * message_s
