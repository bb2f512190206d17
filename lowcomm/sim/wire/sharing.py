"""Max-min fair sharing of links among flows: no flow can have more without a slower one having less."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from math import inf


@dataclass(eq=False, slots=True)
class Link:
    """Something that flows share.

    Attributes:
        bytes_per_s: what its flows have together.
        flows: those whose bytes move now, in the order in which they began.
        left: of the rate, while it is being shared out.
        num_open: flows without a rate yet, likewise.
    """

    bytes_per_s: float
    flows: dict[Flow, None] = field(default_factory=dict)
    left: float = 0.0
    num_open: int = 0


@dataclass(eq=False, slots=True)
class Flow:
    """A message under way, for reading.

    Attributes:
        number: counts the flows of a network in the order they were sent, from 0.
        start_s: when it was sent.
        as_of_s: when ``remaining_bytes`` were left; since then they move at ``rate_bytes_per_s``.
        begin_s: when its first byte moved; None before.
        cap_bytes_per_s: its rate at most, whatever the links would give.
        window_bytes_per_s: what its windows let it have; inf where it sends too little for them to matter.
        due_s: when it begins (before it has) or ends (after); inf when neither is in sight.
        over: ended or cancelled.
    """

    number: int
    source: int
    to: int
    num_bytes: float
    on_end: Callable[[], None]
    links: tuple[Link, ...]
    start_s: float
    as_of_s: float
    remaining_bytes: float
    begin_s: float | None = None
    cap_bytes_per_s: float = inf
    window_bytes_per_s: float = inf
    rate_bytes_per_s: float = 0.0
    due_s: float = inf
    over: bool = False


def fair_rates(changed: Iterable[Link]) -> Iterator[tuple[Flow, float]]:
    """New rates, in bytes per second, of all flows that shared links connect to a changed link; each once.

    Other flows keep their rates and cost no time.
    """
    seen: set[Link] = set()
    for first in changed:
        if first in seen or not first.flows:
            continue
        if len(first.flows) == 1:
            (flow,) = first.flows
            if all(len(link.flows) == 1 for link in flow.links):  # every flow of a ring, so it is worth a shortcut
                seen.update(flow.links)
                yield flow, min(flow.cap_bytes_per_s, *[link.bytes_per_s for link in flow.links])
                continue
        seen.add(first)
        links, flows = [first], dict[Flow, None]()
        for link in links:  # grows as flows lead on
            for flow in link.flows:
                if flow not in flows:
                    flows[flow] = None
                    for other in flow.links:
                        if other not in seen:
                            seen.add(other)
                            links.append(other)
        yield from _fill(links, flows).items()


def _fill(links: Sequence[Link], flows: Iterable[Flow]) -> dict[Flow, float]:
    """Progressive filling: all rates rise together, each until its cap or a full link stops it.

    O(F log F) for F flows. When a flow stops elsewhere, a link's share for each of the others only rises. So a stale
    entry of the heap is too low, and goes back with the present share.
    """
    heap: list[tuple[float, int, Link | Flow]] = []
    for link in links:
        link.left, link.num_open = link.bytes_per_s, len(link.flows)
        heap.append((link.left / link.num_open, len(heap), link))
    for flow in flows:
        if flow.cap_bytes_per_s != inf:
            heap.append((flow.cap_bytes_per_s, len(heap), flow))
    heapify(heap)
    rates: dict[Flow, float] = {}
    while heap:
        level, order, entry = heappop(heap)
        if isinstance(entry, Flow):
            stopped = [] if entry in rates else [entry]
        elif entry.num_open == 0:
            continue
        elif (share := entry.left / entry.num_open) > level:
            heappush(heap, (share, order, entry))
            continue
        else:
            level, stopped = share, [flow for flow in entry.flows if flow not in rates]
        for flow in stopped:
            rates[flow] = level
            for link in flow.links:
                link.left = max(0.0, link.left - level)
                link.num_open -= 1
    return rates
