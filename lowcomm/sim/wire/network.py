"""The simulated network: flows that share links fairly.

A message is a flow. It first waits for its latencies and for TCP and readiness waits (`lowcomm.sim.wire.tcp`, as if it
were alone on its links); then its bytes move at

    rate = min(max-min fair share of the source's up-link, the destination's down-link and the path,
               streams * window_bytes / round-trip time, if it sends more than two windows at once)

Shares change only when a flow begins or ends or a link changes, and only for flows connected to it by shared links.
Changes at one instant are handled together. A flow that shares no link costs O(1).

Not modelled: packets, loss, other traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import NamedTuple

from lowcomm.sim.wire.clock import Alarm, Clock
from lowcomm.sim.wire.collectives import Turns
from lowcomm.sim.wire.links import Links
from lowcomm.sim.wire.sharing import Flow, Link, fair_rates
from lowcomm.sim.wire.tcp import Connections, turns_s

# How much more than a window a connection takes before it is held to one for each round trip: the first leaves at once,
# and the second as room is made for it.
FREE_WINDOWS = 2


class FlowRecord(NamedTuple):
    """The record of an ended flow.

    Attributes:
        start_s: when it was sent.
        begin_s: when its first byte moved; equal to ``end_s`` when none ever did.
        moved_bytes: equal to ``num_bytes`` unless it was cancelled.
    """

    source: int
    to: int
    num_bytes: float
    start_s: float
    begin_s: float
    end_s: float
    moved_bytes: float


@dataclass(eq=False, slots=True)
class _Instant:
    """All changes at one time: flows that begin or end, and changed links."""

    alarm: Alarm
    flows: dict[Flow, None] = field(default_factory=dict)
    changed: dict[Link, None] = field(default_factory=dict)


class Network:
    """Carries flows on a clock.

    Args:
        clock: gives the time.
        links: between the ranks.
        on_flow: called with the record of every flow that ended or was cancelled.

    Attributes:
        num_flows: sent so far.
    """

    def __init__(self, clock: Clock, links: Links, on_flow: Callable[[FlowRecord], None] | None = None) -> None:
        self.links = links
        self._clock, self._on_flow = clock, on_flow
        self._up = [Link(self._bytes_per_s(rate)) for rate in links.up_bits_per_s]
        half = links.transport.half_duplex
        self._down = self._up if half else [Link(self._bytes_per_s(rate)) for rate in links.down_bits_per_s]
        self._paths: dict[tuple[int, int], Link] = {}
        self._blocked: set[tuple[int, int]] = set()
        self._agenda: dict[float, _Instant] = {}
        initial_bytes = links.transport.initial_window_bytes
        self._connections = Connections(None if initial_bytes is None else initial_bytes * links.transport.streams)
        self.num_flows = 0

    def send(
        self,
        source: int,
        to: int,
        num_bytes: float,
        on_end: Callable[[], None],
        num_latencies: float = 1.0,
        turns: Turns | None = None,
    ) -> Flow:
        """Start a flow; ``on_end`` is called at the virtual time of its last byte, between ranks' turns.

        Flows that end at one instant end in the order in which they were sent.

        Args:
            num_latencies: how many one-way trips pass before the bytes move: the steps of a pipelined collective.
            turns: what it waits on the way, which passes before the bytes move too.
        """
        assert source != to and min(source, to, num_bytes, num_latencies) >= 0, (source, to, num_bytes, num_latencies)
        now = self._clock.now
        links = [self._up[source], self._down[to]]
        if self.links.path_bits_per_s is not None and (path := self.links.path(source, to)) != inf:
            links.append(self._paths.setdefault((source, to), Link(self._bytes_per_s(path))))
        flow = Flow(self.num_flows, source, to, num_bytes, on_end, tuple(links), now, now, num_bytes)
        self.num_flows += 1
        waits_s = self._waits_s(flow, turns)
        self._put(flow, now + num_latencies * self.links.latency(source, to) + waits_s)
        return flow

    def cancel(self, flow: Flow) -> None:
        """Stop a flow without calling its ``on_end``; no effect if it has ended."""
        if flow.over:
            return
        self._move(flow)
        self._drop(flow)
        if flow.begin_s is not None:
            self._leave(flow)
            self._change(flow.links)
        self._close(flow)

    def set_rate(self, rank: int, up_bits_per_s: float | None = None, down_bits_per_s: float | None = None) -> None:
        """Change a rank's link rates from now on, also for pending flows; None leaves one unchanged.

        Under ``half_duplex`` either sets the one link that there is.
        """
        for links, rate in ((self._up, up_bits_per_s), (self._down, down_bits_per_s)):
            if rate is not None:
                links[rank].bytes_per_s = self._bytes_per_s(rate)
                self._change([links[rank]])

    def block(self, source: int, to: int) -> None:
        """Let no byte pass from source to destination until `unblock`; flows wait where they are."""
        self._blocked.add((source, to))
        self._change_pair(source, to)

    def unblock(self, source: int, to: int) -> None:
        """Let bytes pass again; no effect if not blocked."""
        self._blocked.discard((source, to))
        self._change_pair(source, to)

    def _waits_s(self, flow: Flow, turns: Turns | None) -> float:
        """Seconds for which the flow's bytes wait as if alone on its links; also sets its window limit."""
        there_s, back_s = self.links.latency(flow.source, flow.to), self.links.latency(flow.to, flow.source)
        bytes_per_s = min(link.bytes_per_s for link in flow.links)
        turns_wait_s = 0.0 if turns is None else turns_s(turns, bytes_per_s, there_s, back_s)
        if there_s + back_s == 0:
            return turns_wait_s
        at_once = flow.num_bytes if turns is None or turns.num * turns_wait_s == 0 else 2.0 * turns.message_bytes
        if at_once > FREE_WINDOWS * self.links.window_bytes():
            flow.window_bytes_per_s = self.links.window_bytes() / (there_s + back_s)
        path = (flow.source, flow.to)
        return turns_wait_s + self._connections.wait_s(path, flow.start_s, at_once, bytes_per_s, there_s + back_s)

    # what happens at an instant

    def _happen(self, time_s: float) -> None:
        """Begin and end due flows, share the links anew, then call ``on_end`` of those that ended."""
        instant = self._agenda.pop(time_s)
        ended = []
        for flow in instant.flows:
            flow.due_s = inf
            if flow.begin_s is None:
                flow.begin_s = flow.as_of_s = time_s
                flow.cap_bytes_per_s = self._cap(flow)
                for link in flow.links:
                    link.flows[flow] = instant.changed[link] = None
            else:
                flow.remaining_bytes, flow.rate_bytes_per_s = 0.0, 0.0
                self._leave(flow)
                instant.changed.update(dict.fromkeys(flow.links))
                ended.append(flow)
        for flow, rate in fair_rates(instant.changed):
            if rate != flow.rate_bytes_per_s:
                self._move(flow)
                self._drop(flow)
                flow.rate_bytes_per_s = rate
                if rate > 0:
                    self._put(flow, time_s + flow.remaining_bytes / rate)
        for flow in sorted(ended, key=lambda flow: flow.number):
            self._connections.used((flow.source, flow.to), time_s)
            if not flow.over:  # the end of another may have cancelled it
                self._close(flow)
                flow.on_end()

    def _move(self, flow: Flow) -> None:
        """Update the remaining bytes to now."""
        now = self._clock.now
        flow.remaining_bytes = max(0.0, flow.remaining_bytes - flow.rate_bytes_per_s * (now - flow.as_of_s))
        flow.as_of_s = now

    def _leave(self, flow: Flow) -> None:
        for link in flow.links:
            link.flows.pop(flow, None)

    def _close(self, flow: Flow) -> None:
        flow.over, flow.rate_bytes_per_s = True, 0.0
        if self._on_flow is not None:
            end_s = self._clock.now
            begin_s = end_s if flow.begin_s is None else flow.begin_s
            moved = flow.num_bytes - flow.remaining_bytes
            record = FlowRecord(flow.source, flow.to, flow.num_bytes, flow.start_s, begin_s, end_s, moved)
            self._on_flow(record)

    # the agenda: one alarm for each moment at which something is due

    def _at(self, time_s: float) -> _Instant:
        instant = self._agenda.get(time_s)
        if instant is None:
            instant = self._agenda[time_s] = _Instant(self._clock.at(time_s, partial(self._happen, time_s)))
        return instant

    def _put(self, flow: Flow, time_s: float) -> None:
        self._at(time_s).flows[flow] = None
        flow.due_s = time_s

    def _drop(self, flow: Flow) -> None:
        if flow.due_s == inf:
            return
        instant = self._agenda[flow.due_s]
        del instant.flows[flow]
        if not instant.flows and not instant.changed:
            instant.alarm.cancel()
            del self._agenda[flow.due_s]
        flow.due_s = inf

    def _change(self, links: Iterable[Link]) -> None:
        self._at(self._clock.now).changed.update(dict.fromkeys(links))

    def _change_pair(self, source: int, to: int) -> None:
        for flow in self._up[source].flows:
            if flow.to == to:
                flow.cap_bytes_per_s = self._cap(flow)
                self._change(flow.links)

    def _cap(self, flow: Flow) -> float:
        return 0.0 if (flow.source, flow.to) in self._blocked else flow.window_bytes_per_s

    # numbers

    def _bytes_per_s(self, bits_per_s: float) -> float:
        return bits_per_s / 8 * self.links.transport.bandwidth_factor
