"""The HTML page: a table, curves, and each run's config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowcomm.optional import require
from lowcomm.report.pictures import AXES, colour, dashes, picture, thin
from lowcomm.report.runs import load_runs
from lowcomm.report.table import SUMMARY_COLUMNS, summary_cells
from lowcomm.report.timeline import timeline

# title, kind of line, key
_CURVES = (
    ("Validation loss", "eval", "val_loss"),
    ("Training loss", "step", "loss"),
)


def write_report(dirs: Sequence[Path], out: Path) -> Path:
    """Compare the runs in ``dirs`` in one HTML file that loads nothing from elsewhere; returns ``out``.

    Raises:
        ValueError: when a directory holds no metrics, or a trace.json that is none, or when matplotlib or jinja2 is
            not installed.
    """
    runs = load_runs(dirs)
    sections = []
    for title, kind, key in _CURVES:
        losses = [run.points(kind, "t", key) for run in runs]
        if not any(losses):
            continue
        pictures = []
        for axis in AXES:
            curves = [(run.name, thin(run.points(kind, axis.key, key))) for run in runs]
            svg = picture(f"{key}-{axis.key}", curves, axis, markers=kind == "eval")
            pictures.append({"title": f"{title} against {axis.title}", "svg": svg})
        thinned = any(len(thin(points)) < len(points) for points in losses)
        sections.append({"title": title, "pictures": pictures, "thinned": thinned})
    jinja2 = require("jinja2", "lowcomm[report]")
    here = Path(__file__).parent
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.j2")
    text = page.render(
        css=(here / "report.css").read_text(encoding="utf-8"),
        columns=SUMMARY_COLUMNS,
        rows=[summary_cells(run.summary()) for run in runs],
        legend=[(run.name, colour(i), " ".join(map(str, dashes(i)))) for i, run in enumerate(runs)],
        sections=sections,
        timelines=[t for i, run in enumerate(runs) if (t := timeline(run, f"timeline-{i}")) is not None],
        runs=runs,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return out
