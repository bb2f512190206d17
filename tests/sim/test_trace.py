"""Traces: structure of the Chrome export, and what the picture shows."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lowcomm.sim.network import FlowRecord
from lowcomm.sim.trace import Span, Trace, chrome_trace, gantt, write_chrome_trace


def recorded() -> Trace:
    trace = Trace()
    trace.add(1, "compute", 0.0, 2.0, "step 1")
    trace.add(0, "compute", 0.0, 1.0, "step 1")
    trace.add(0, "flow", 1.0, 3.0, "to rank 1", 4e6)
    trace.add(0, "flow", 2.0, 2.5, "to rank 2", 1e6)
    trace.add(0, "flow", 3.0, 3.5, "to rank 1", 1e6)
    trace.add(0, "wait", 1.0, 3.5, "all_sum")
    return trace


def test_totals() -> None:
    trace = recorded()
    assert (trace.total_s(0, "flow"), trace.total_s(0, "wait"), trace.total_s(1, "wait")) == (3.0, 2.5, 0.0)


def test_chrome_trace(tmp_path: Path) -> None:
    spans = recorded().spans
    write_chrome_trace(spans, tmp_path / "trace.json")
    document = json.loads((tmp_path / "trace.json").read_text())
    assert document == chrome_trace(spans) and set(document) == {"traceEvents", "displayTimeUnit"}
    events = document["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) == len(spans)
    for event in complete:
        assert set(event) - {"args"} == {"name", "cat", "ph", "pid", "tid", "ts", "dur"}
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int) and event["dur"] >= 0
    first = next(event for event in complete if event["name"] == "to rank 1")
    assert (first["ts"], first["dur"], first["args"]) == (1e6, 2e6, {"bytes": 4e6})
    # every line has a name, and no two spans of a line overlap
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    lines: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in complete:
        lines.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    assert named == set(lines) == {(0, 0), (0, 1), (0, 2), (1, 0)}
    for of_line in lines.values():
        assert all(a[1] <= b[0] for a, b in zip(sorted(of_line), sorted(of_line)[1:], strict=False))
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {"rank 0", "rank 1"}


def test_flow_of_a_network() -> None:
    trace = Trace()
    trace.add_flow(FlowRecord(source=2, to=0, num_bytes=8.0, start_s=1.0, begin_s=1.5, end_s=2.0, moved_bytes=6.0))
    assert trace.spans == [Span(2, "flow", 1.0, 2.0, "to rank 0", 6.0)]


def test_order_of_recording_does_not_matter() -> None:
    spans = recorded().spans
    assert json.dumps(chrome_trace(spans)) == json.dumps(chrome_trace(spans[::-1]))


def bars(svg: str) -> int:
    """Filled shapes other than the background and the legend's three."""
    root = ElementTree.fromstring(svg)
    return len(
        [path for path in root.iter("{http://www.w3.org/2000/svg}path") if "fill: #" in path.get("style", "")]
    ) + len([use for use in root.iter("{http://www.w3.org/2000/svg}use") if "fill: #" in use.get("style", "")])


def test_gantt() -> None:
    svg = gantt(recorded().spans)
    assert svg.startswith("<svg") and svg == gantt(recorded().spans)
    assert re.findall(r">(rank \d)<", svg) == ["rank 0", "rank 1"]
    for word in ("compute", "wait", "flow", "virtual time"):
        assert word in svg
    with_more = [*recorded().spans, Span(1, "wait", 2.5, 3.5, "all_sum")]
    assert bars(gantt(with_more)) == bars(svg) + 1


def test_gantt_shows_a_window_of_some_ranks() -> None:
    svg = gantt(recorded().spans, start_s=0.0, end_s=0.5, ranks=[1])
    assert re.findall(r">(rank \d)<", svg) == ["rank 1"]


def test_gantt_of_many_spans_stays_small() -> None:
    spans = [Span(0, "compute", i * 1.0, i + 0.9, f"step {i}") for i in range(5000)]
    assert bars(gantt(spans)) < 100
    assert bars(gantt(spans, end_s=50.0)) - bars(gantt(spans, end_s=1.0)) == 49


@pytest.mark.parametrize(
    ("start_s", "end_s"), [(2.0, 1.0), (-1.0, 1.0), (0.0, math.inf), (math.nan, 1.0), (0.0, math.nan)]
)
def test_times_must_not_go_back(start_s: float, end_s: float) -> None:
    with pytest.raises(ValueError, match="not go back"):
        Trace().add(0, "compute", start_s, end_s, "step 1")


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="kind is 'sleep'"):
        Span(0, "sleep", 0.0, 1.0, "nap")  # type: ignore[arg-type]


@pytest.mark.parametrize("spans", [[], [Span(0, "wait", 0.0, 0.0, "nothing")]])
def test_nothing_to_show(spans: list[Span]) -> None:
    with pytest.raises(ValueError, match="no span to show"):
        gantt(spans)
