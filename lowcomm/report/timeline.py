"""A picture of what the ranks of a simulated run did in a few rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowcomm.report.gantt import TEXT_COLOUR, gantt
from lowcomm.report.pictures import for_page
from lowcomm.report.runs import Run
from lowcomm.sim.record.trace import Span, read_chrome_trace

_NUM_ROUNDS = 3
_MAX_ROWS = 16


@dataclass(frozen=True)
class Timeline:
    """A picture of a run.

    Attributes:
        name: of the run.
        svg: the picture, an ``<svg>``.
        window: a sentence that says what part of the run it shows.
    """

    name: str
    svg: str
    window: str


def timeline(run: Run, id: str) -> Timeline | None:
    """Three rounds from the middle of the run, of at most 16 ranks; None for a run without a trace.

    Args:
        id: unique on the page.

    Raises:
        ValueError: when its trace.json is no trace, or matplotlib is not installed.
    """
    spans = read_chrome_trace(run.trace) if run.trace is not None else []
    latest = run.summary()
    first, last = middle_steps(latest["t"], latest.get("round") or 1)
    window_s = span_of_steps(spans, first, last)
    if window_s is None:
        return None
    start_s, end_s = window_s
    ranks = sorted({span.rank for span in spans})
    picture = gantt(spans, id=id, start_s=start_s, end_s=end_s, ranks=ranks[:_MAX_ROWS])
    window = (
        f"Inner steps {first:,} to {last:,} of {latest['t']:,}, from {start_s:,.1f} to {end_s:,.1f} virtual seconds. "
        f"Rounds of the whole run: {latest.get('round', 0):,}."
    )
    if len(ranks) > _MAX_ROWS:
        window += f" Shown are the first {_MAX_ROWS} of {len(ranks):,} ranks."
    return Timeline(run.name, for_page(picture, id, {TEXT_COLOUR: "currentColor"}), window)


def middle_steps(num_steps: int, num_rounds: int) -> tuple[int, int]:
    """The first and the last inner step of three whole rounds in the middle, or of all when there are fewer."""
    every = max(1, round(num_steps / num_rounds))
    num_rounds = -(-num_steps // every)
    num_shown = min(_NUM_ROUNDS, num_rounds)
    before = (num_rounds - num_shown) // 2 * every
    return before + 1, min(before + num_shown * every, num_steps)


def span_of_steps(spans: Sequence[Span], first: int, last: int) -> tuple[float, float] | None:
    """When the first rank begins step ``first``, and when the first begins the step after ``last``, or the end of all.

    None when no rank computed ``first``.
    """
    starts: dict[int, float] = {}
    for span in spans:
        if span.kind == "compute":
            t = int(span.name.removeprefix("step "))
            starts[t] = min(span.start_s, starts.get(t, span.start_s))
    return (starts[first], starts.get(last + 1, max(span.end_s for span in spans))) if first in starts else None
