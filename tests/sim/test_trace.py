"""Traces: structure of the Chrome export, and what the picture shows."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lowcomm.cli import main
from lowcomm.metrics import read
from lowcomm.report.gantt import gantt
from lowcomm.sim.record.trace import Kind, Span, Trace, chrome_trace, read_chrome_trace, write_chrome_trace
from lowcomm.sim.wire.network import FlowRecord
from tests.multiprocess.launch import write_tiny


def recorded() -> Trace:
    trace = Trace()
    trace.add(1, "compute", 0.0, 2.0, "step 1")
    trace.add(0, "compute", 0.0, 1.0, "step 1")
    trace.add(0, "flow", 1.0, 3.0, "to rank 1", 4e6)
    trace.add(0, "flow", 2.0, 2.5, "to rank 2", 1e6)
    trace.add(0, "flow", 3.0, 3.5, "to rank 1", 1e6)
    trace.add(0, "wait", 1.0, 3.5, "all_sum")
    return trace


def test_chrome_trace(tmp_path: Path) -> None:
    spans = [*recorded().spans, Span(0, "flow", 3.25, 4.0, "to rank 2", 1e6)]
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


def test_a_simulation_records_every_wait(tmp_path: Path) -> None:
    """A rank computes or waits from its beginning to its end."""
    flags = ["--config", str(write_tiny(tmp_path)), "--checkpoint.every", "0", "--num_steps", "8"]
    cluster = ["--cluster", "Home", "--cluster.num_hosts", "3", "--cluster.compute", "LogNormal"]
    assert main(["simulate", *flags, *cluster, "--out", str(tmp_path / "out")]) == 0
    trace = Trace(read_chrome_trace(tmp_path / "out" / "trace.json"))
    for rank, name in enumerate(["metrics.jsonl", "metrics.replica00001.jsonl", "metrics.replica00002.jsonl"]):
        summary = read(tmp_path / "out" / name)[-1]
        waits = [
            x for x in trace.spans if x.rank == rank and x.kind == "wait" and x.name not in ("start", "evaluation")
        ]
        training_s = sum(x.end_s - x.start_s for x in waits)
        assert training_s == pytest.approx(summary["comm_wait_s"], rel=1e-9) and summary["comm_wait_s"]
        end_s = max(span.end_s for span in trace.spans if span.rank == rank and span.kind != "flow")
        total_s = math.fsum(x.end_s - x.start_s for x in trace.spans if x.rank == rank and x.kind != "flow")
        assert total_s == pytest.approx(end_s, rel=1e-9)
    assert {span.name for span in trace.spans if span.kind == "wait"} >= {"sync"}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    spans = [*recorded().spans, Span(3, "flow", 1e5 / 3, 2e5 / 3, "to rank 0", 0.1), Span(3, "wait", 7.0, 7.0, "sync")]
    write_chrome_trace(spans, tmp_path / "trace.json")
    found = read_chrome_trace(tmp_path / "trace.json")
    assert [span.start_s for span in found] == sorted(span.start_s for span in found)

    def key(span: Span) -> tuple[int, str, str, float]:
        return span.rank, span.kind, span.name, span.start_s

    for a, b in zip(sorted(found, key=key), sorted(spans, key=key), strict=True):
        assert (a.rank, a.kind, a.name, a.num_bytes) == (b.rank, b.kind, b.name, b.num_bytes)
        assert (a.start_s, a.end_s) == pytest.approx((b.start_s, b.end_s), rel=1e-14)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"traceEvents": [{"ph": "X", "pid": 0}]}'])
def test_what_is_no_trace_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with pytest.raises(ValueError, match="there is no"):
        read_chrome_trace(path)
    path.write_text(text)
    with pytest.raises(ValueError, match=r"trace\.json is no trace of lowcomm simulate"):
        read_chrome_trace(path)


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


def test_gantt_has_what_a_rank_did_beside_its_name_and_what_it_sent_below() -> None:
    done: list[tuple[int, Kind]] = [(0, "compute"), (0, "flow"), (1, "wait")]
    svg = gantt([Span(rank, kind, start_s, start_s + 1, "") for rank, kind in done for start_s in (0.0, 2.0)])
    first, second = (float(y) for y in re.findall(r' y="([\d.]+)" [^>]*>rank \d<', svg))
    tops: dict[str, float] = {}
    for path, colour in re.findall(r'<path d="(M [^"]*?)"[^>]*style="fill: (#\w{6})"', svg):
        y = min(float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", path))
        tops.setdefault(colour, y)  # the legend comes after the bars
    compute, flow, wait = (tops[colour] for colour in ("#4878a8", "#6aa378", "#d8a24a"))
    assert compute < first and compute < flow < wait < second


def test_gantt_of_a_long_run_counts_hours() -> None:
    svg = gantt([Span(0, "compute", 3_600_000.0, 3_610_800.0, "step 9")], start_s=3_600_000.0)
    assert "virtual time (h)" in svg and {"1000.0", "1003.0"} <= set(re.findall(r">([\d.]+)</text>", svg))


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


@pytest.mark.parametrize("spans", [[], [Span(0, "wait", 0.0, 0.0, "nothing")]])
def test_nothing_to_show(spans: list[Span]) -> None:
    with pytest.raises(ValueError, match="no span to show"):
        gantt(spans)
