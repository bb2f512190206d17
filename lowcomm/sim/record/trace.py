"""Spans of what every rank did, written as a Chrome/Perfetto trace and read back.

Times are virtual seconds. A written trace opens in ui.perfetto.dev or chrome://tracing; a rank is a process there, with
one line for computing and waiting, and as many for flows as it had at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from lowcomm.sim.wire.network import FlowRecord

Kind = Literal["compute", "wait", "flow"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Span:
    """Something that a rank did for a while.

    Attributes:
        rank: for a flow, who sends.
        name: its label: the "step 3" that was computed, the purpose of the exchange waited for, "to rank 2".
        num_bytes: of a flow; 0 for others.
    """

    rank: int
    kind: Kind
    start_s: float
    end_s: float
    name: str
    num_bytes: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if not 0 <= self.start_s <= self.end_s < math.inf:
            raise ValueError(
                f"a span of rank {self.rank} goes from {self.start_s} to {self.end_s} s; times must be finite, at "
                "least 0, and not go back"
            )


@dataclass
class Trace:
    """Spans as they are recorded, in no order."""

    spans: list[Span] = field(default_factory=list)

    def add(self, rank: int, kind: Kind, start_s: float, end_s: float, name: str, num_bytes: float = 0.0) -> None:
        self.spans.append(Span(rank, kind, start_s, end_s, name, num_bytes))

    def interrupt(self, place: int, at_s: float, until_s: float) -> int:
        """Split the span at this place of the list, which was recorded before its end, around a pause.

        Returns the place of the second half.
        """
        span = self.spans[place]
        self.spans[place] = replace(span, end_s=at_s)
        self.spans.append(replace(span, start_s=until_s, end_s=span.end_s + (until_s - at_s)))
        return len(self.spans) - 1

    def stop(self, at_s: Mapping[int, float]) -> None:
        """End the computing of these ranks, which were stopped at these moments."""
        for place, span in enumerate(self.spans):
            if span.kind == "compute" and span.end_s > at_s.get(span.rank, math.inf):
                self.spans[place] = replace(span, end_s=at_s[span.rank])

    def add_flow(self, flow: FlowRecord) -> None:
        """Record a message that arrived or was cancelled; a `Network` calls it as its ``on_flow``."""
        self.add(flow.source, "flow", flow.start_s, flow.end_s, f"to rank {flow.to}", flow.moved_bytes)


def chrome_trace(spans: Iterable[Span]) -> dict[str, Any]:
    """The spans in Chrome's trace event format (an object with ``traceEvents``); times there are microseconds."""
    events: list[dict[str, Any]] = []
    lines: dict[int, list[float]] = {}  # of each rank: when the last flow on each of its lines ends
    for span in sorted(spans, key=lambda s: (s.start_s, s.rank, s.kind, s.end_s, s.name, s.num_bytes)):
        busy = lines.setdefault(span.rank, [])
        line = 0
        if span.kind == "flow":
            line = next((i for i, end_s in enumerate(busy, start=1) if end_s <= span.start_s), len(busy) + 1)
            busy[line - 1 : line] = [span.end_s]
        event = {"name": span.name, "cat": span.kind, "ph": "X", "pid": span.rank, "tid": line}
        event |= {"ts": span.start_s * 1e6, "dur": (span.end_s - span.start_s) * 1e6}
        events.append(event | ({"args": {"bytes": span.num_bytes}} if span.kind == "flow" else {}))
    return {"traceEvents": [*_names(lines), *events], "displayTimeUnit": "ms"}


def _names(lines: dict[int, list[float]]) -> list[dict[str, Any]]:
    named: list[dict[str, Any]] = []
    for rank in sorted(lines):
        named.append({"name": "process_name", "ph": "M", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}})
        named.append({"name": "process_sort_index", "ph": "M", "pid": rank, "tid": 0, "args": {"sort_index": rank}})
        for line in range(len(lines[rank]) + 1):
            name = {"name": f"flows {line}" if line else "compute and wait"}
            named.append({"name": "thread_name", "ph": "M", "pid": rank, "tid": line, "args": name})
    return named


def write_chrome_trace(spans: Iterable[Span], path: Path) -> None:
    """Write `chrome_trace` as JSON; equal spans give equal bytes."""
    path.write_text(json.dumps(chrome_trace(spans), separators=(",", ":")) + "\n", encoding="utf-8")


def read_chrome_trace(path: Path) -> list[Span]:
    """The spans of a file of `write_chrome_trace`, by start; times to within rounding.

    Raises:
        ValueError: when there is no such file, or something else than a trace of ours in it.
    """
    if not path.exists():
        raise ValueError(f"there is no {path}; lowcomm simulate writes a trace.json into its --out directory")
    try:
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        return [_span(event) for event in events if event["ph"] == "X"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no trace of lowcomm simulate ({type(error).__name__}: {error}); simulate again, or delete it"
        ) from error


def _span(event: dict[str, Any]) -> Span:
    start_s, num_bytes = event["ts"] / 1e6, event.get("args", {}).get("bytes", 0.0)
    return Span(event["pid"], event["cat"], start_s, start_s + event["dur"] / 1e6, event["name"], num_bytes)
