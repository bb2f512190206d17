"""Spans of a simulated run as a picture."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence

from lowcomm.optional import require
from lowcomm.sim.record.trace import Span

TEXT_COLOUR = "#1b1f24"  # of all that is written on a picture; none of the bars has it
_COLOURS = {"compute": "#4878a8", "wait": "#d8a24a", "flow": "#6aa378"}
_HOURS_FROM_S = 36_000.0
_MAX_COLUMNS = 1000  # a picture's spans of one kind that are nearer to each other than its width over this are one


def gantt(
    spans: Sequence[Span],
    *,
    id: str = "gantt",
    start_s: float = 0.0,
    end_s: float | None = None,
    ranks: Sequence[int] | None = None,
) -> str:
    """An ``<svg>`` with a row for each rank: computing and waiting above, what it sends below.

    Args:
        id: unique on the page that it will stand in.
        start_s: where the picture begins.
        end_s: where it ends; None for the end of the last span.
        ranks: the rows from the top; None for all that have spans.

    Raises:
        ValueError: when there is nothing to show, or matplotlib is not installed.
    """
    groups: dict[tuple[int, str], list[Span]] = {}
    for span in spans:
        groups.setdefault((span.rank, span.kind), []).append(span)
    rows = sorted({rank for rank, _ in groups}) if ranks is None else list(ranks)
    end_s = max((span.end_s for span in spans), default=0.0) if end_s is None else end_s
    if not rows or not end_s > start_s:
        raise ValueError(f"no span to show from {start_s} to {end_s} s on ranks {rows}; record some, or show others")
    matplotlib = require("matplotlib", "lowcomm[report]")
    height = min(0.9 + 0.3 * len(rows), 40.0)
    figure = require("matplotlib.figure", "lowcomm[report]").Figure(figsize=(7.0, height), layout="constrained")
    ax = figure.subplots()
    unit, unit_s = ("h", 3600.0) if end_s >= _HOURS_FROM_S else ("s", 1.0)
    for kind, colour in _COLOURS.items():
        low, size = (0.05, 0.3) if kind == "flow" else (0.4, 0.5)
        for row, rank in enumerate(rows):
            merged = _merged(groups.get((rank, kind), []), start_s, end_s)
            bars = [(s / unit_s, (e - s) / unit_s) for s, e in merged]
            label = kind if row == 0 else None
            ax.broken_barh(bars, (len(rows) - 1 - row + low, size), color=colour, linewidth=0, label=label)
    ax.set_xlim(start_s / unit_s, end_s / unit_s)
    ax.set_ylim(0, len(rows))
    ax.set_yticks([len(rows) - 0.5 - row for row in range(len(rows))], [f"rank {rank}" for rank in rows])
    ax.set_xlabel(f"virtual time ({unit})", color=TEXT_COLOUR)
    ax.ticklabel_format(axis="x", style="plain", useOffset=False)
    ax.tick_params(colors=TEXT_COLOUR, labelcolor=TEXT_COLOUR)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(TEXT_COLOUR)
    figure.legend(loc="outside upper right", ncols=len(_COLOURS), frameon=False, labelcolor=TEXT_COLOUR)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": id}):
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)


def _merged(spans: Iterable[Span], start_s: float, end_s: float) -> list[tuple[float, float]]:
    """When at least one of the spans lasts, within the window; gaps too narrow to be seen are closed."""
    gap_s = (end_s - start_s) / _MAX_COLUMNS
    merged: list[tuple[float, float]] = []
    for span in sorted(spans, key=lambda s: s.start_s):
        begin, end = max(span.start_s, start_s), min(span.end_s, end_s)
        if begin >= end:
            continue
        if merged and begin - merged[-1][1] < gap_s:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged
