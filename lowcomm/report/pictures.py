"""Curves as SVG that takes its colours from the page, light or dark."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowcomm.optional import require

Point = tuple[float, float]

# colours stand for the page's variables: text and frame, grid, curves; see report.css for those of the palette
_TEXT, _GRID = "#000001", "#000002"
_CURVES = tuple(f"#0000{i:02x}" for i in range(16, 22))
_DASHES = ((), (5.0, 2.0), (1.5, 1.5))
_MAX_POINTS = 400
_LOG_FROM = 30.0


@dataclass(frozen=True)
class Axis:
    """The quantity along the bottom.

    Attributes:
        key: of metrics.jsonl.
        title: of the picture and the axis.
        unit: of the numbers at the axis, which get decimal prefixes; None writes them out.
        spreads: runs differ by orders of magnitude in it, so that a logarithmic axis may be of use.
    """

    key: str
    title: str
    unit: str | None
    spreads: bool = False


AXES = (
    Axis("t", "inner steps", None),
    Axis("tokens", "tokens of all replicas", ""),
    Axis("bytes_sent", "bytes sent by a replica", "B", spreads=True),
    Axis("time_s", "seconds", None),
)


def colour(i: int) -> str:
    """The CSS colour of the i-th run."""
    return f"var(--curve-{i % len(_CURVES)})"


def dashes(i: int) -> tuple[float, ...]:
    """On and off lengths of the i-th run's curve; empty for a whole line. Where colours repeat, dashes differ."""
    return _DASHES[i // len(_CURVES) % len(_DASHES)]


def thin(points: Sequence[Point]) -> list[Point]:
    """At most 400 points: of groups of consecutive ones, equal in number, the last x and the mean of y."""
    size = max(1, math.ceil(len(points) / _MAX_POINTS))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def picture(id: str, curves: Sequence[tuple[str, Sequence[Point]]], axis: Axis, *, markers: bool) -> str:
    """An ``<svg>`` of one curve for each run, in the runs' order (a run without points keeps its colour).

    Args:
        id: unique on the page.
        curves: name and points of each run.
        markers: show the points; for curves of few.
    """
    matplotlib = require("matplotlib", "lowcomm[report]")
    figure = require("matplotlib.figure", "lowcomm[report]").Figure(figsize=(5.6, 3.3), layout="constrained")
    ticker = require("matplotlib.ticker", "lowcomm[report]")
    ax = figure.subplots()
    for i, (_, points) in enumerate(curves):
        if points:
            style: dict[str, Any] = {"dashes": dashes(i)} if dashes(i) else {}
            marker = "o" if markers and len(points) <= 60 else None
            ax.plot(
                *zip(*points, strict=True),
                color=_CURVES[i % len(_CURVES)],
                linewidth=1.6,
                marker=marker,
                markersize=3,
                gid=f"{id}-curve-{i}",
                **style,
            )
    xs = [x for _, points in curves for x, _ in points if x > 0]
    ys = [y for _, points in curves for _, y in points]
    if axis.spreads and xs and max(xs) / min(xs) > _LOG_FROM:
        # linear up to the first bytes, so that what came before them has a place at zero
        first, decades = 10 ** math.floor(math.log10(min(xs))), math.log10(max(xs) / min(xs))
        ax.set_xscale("symlog", linthresh=first, linscale=max(0.5, decades / 8))
    if ys and min(ys) > 0 and max(ys) / min(ys) > _LOG_FROM:
        ax.set_yscale("log")
    formatter = ticker.StrMethodFormatter("{x:,g}") if axis.unit is None else ticker.EngFormatter(axis.unit)
    ax.xaxis.set_major_formatter(formatter)
    ax.set_xlabel(axis.title, color=_TEXT)
    ax.tick_params(which="both", colors=_TEXT, labelcolor=_TEXT, width=0.6, length=3)
    ax.grid(color=_GRID, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(_TEXT)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": id}):
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    colours = {_TEXT: "currentColor", _GRID: "var(--grid)"} | {c: colour(i) for i, c in enumerate(_CURVES)}
    svg = for_page(file.getvalue(), id, colours)
    for i, (name, _) in enumerate(curves):
        opening = f'<g id="{id}-curve-{i}">'
        svg = svg.replace(opening, f"{opening}<title>{html.escape(name)}</title>")
    return svg


def for_page(svg: str, id: str, colours: Mapping[str, str]) -> str:
    """Matplotlib's output as a bare ``<svg>`` that takes the font of its page.

    Args:
        id: unique on the page; every id within gets it as a prefix.
        colours: the CSS colour to put in place of each drawn one.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(rf'(\bid="|url\(#|xlink:href="#)(?!{id}-)', rf"\1{id}-", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    for drawn, of_page in colours.items():
        svg = svg.replace(drawn, of_page)
    return svg
