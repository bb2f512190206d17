"""The report shows what the ranks of a simulation did in three rounds of its middle."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lowcomm.metrics import Metrics
from lowcomm.report.page import write_report
from lowcomm.report.runs import load_runs
from lowcomm.report.timeline import middle_steps, span_of_steps, timeline
from lowcomm.sim.record.trace import Span, write_chrome_trace


def write_simulation(dir: Path, num_ranks: int = 2, num_rounds: int = 10, *, traced: bool = True) -> Path:
    """Rounds of four steps of 1 s, then 2 s of messages; rank 1 begins a quarter of a second after rank 0."""
    file, spans = Metrics(dir / "metrics.jsonl"), []
    for t in range(1, 4 * num_rounds + 1):
        start_s = (t - 1) + (t - 1) // 4 * 2.0
        file.write({"kind": "step", "t": t, "rank": 0, "round": t // 4, "loss": 3.0, "time_s": start_s + 1})
        for rank in range(num_ranks):
            late_s = rank / 4
            spans.append(Span(rank, "compute", start_s + late_s, start_s + late_s + 1, f"step {t}"))
            if t % 4 == 0:
                spans.append(Span(rank, "wait", start_s + late_s + 1, start_s + late_s + 3, "sync"))
                spans.append(Span(rank, "flow", start_s + 1.5, start_s + 2.5, "to rank 0", 1e6))
    file.close()
    if traced:
        write_chrome_trace(spans, dir / "trace.json")
    return dir


@pytest.mark.parametrize(
    ("num_steps", "num_rounds", "steps"),
    [
        (40, 10, (13, 24)),  # rounds 4, 5 and 6 of ten
        (980, 35, (449, 532)),
        (100, 100, (49, 51)),
        (10, 3, (1, 9)),  # a last round of one step
        (8, 2, (1, 8)),
        (5, 1, (1, 5)),
        (1, 1, (1, 1)),
    ],
)
def test_middle_steps(num_steps: int, num_rounds: int, steps: tuple[int, int]) -> None:
    assert middle_steps(num_steps, num_rounds) == steps


def test_steps_last_until_a_rank_begins_the_next_one() -> None:
    spans = [
        Span(1, "compute", 2.0, 3.0, "step 2"),
        Span(1, "compute", 0.5, 1.0, "step 1"),
        Span(0, "compute", 1.0, 2.0, "step 1"),
        Span(0, "wait", 0.0, 9.0, "start"),
    ]
    assert span_of_steps(spans, 1, 1) == (0.5, 2.0)
    assert span_of_steps(spans, 2, 2) == (2.0, 9.0), "to the end"
    assert span_of_steps(spans, 3, 4) is None and span_of_steps([], 1, 1) is None


def test_the_picture_shows_three_rounds_and_says_which(tmp_path: Path) -> None:
    (run,) = load_runs([write_simulation(tmp_path / "run")])
    found = timeline(run, "here")
    assert found is not None and found.name == "run"
    assert found.window == (
        "Inner steps 13 to 24 of 40, from 18.0 to 36.0 virtual seconds. Rounds of the whole run: 10."
    )
    assert re.findall(r">(rank \d+)<", found.svg) == ["rank 0", "rank 1"]
    ElementTree.fromstring(found.svg)
    ids = re.findall(r'\bid="([^"]+)"', found.svg)
    assert ids and all(id.startswith("here-") for id in ids)
    assert "currentColor" in found.svg and "#1b1f24" not in found.svg


def test_the_page_has_a_timeline_for_each_simulated_run(tmp_path: Path) -> None:
    simulated = [write_simulation(tmp_path / name) for name in ("one", "two")]
    real = write_simulation(tmp_path / "three", traced=False)
    text = write_report([*simulated, real], tmp_path / "r.html").read_text(encoding="utf-8")
    assert re.findall(r'aria-label="What each rank of (\w+) did when"', text) == ["one", "two"]
    assert text.count("Inner steps 13 to 24 of 40") == 2
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert "Timeline" not in write_report([real], tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_broken_trace_is_named(tmp_path: Path) -> None:
    dir = write_simulation(tmp_path / "run")
    (dir / "trace.json").write_text("{")
    with pytest.raises(ValueError, match=r"trace\.json is no trace"):
        write_report([dir], tmp_path / "r.html")
