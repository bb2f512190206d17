"""Summaries of runs as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lowcomm.metrics import Record
from lowcomm.report.si import si

# title, key, how it is written
_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("run", "run", str),
    ("algorithm", "algorithm", str),
    ("replicas", "members", str),
    ("tokens", "tokens", si),
    ("val loss (nats)", "val_loss", "{:.4f}".format),
    ("bits/byte", "val_bits_per_byte", "{:.4f}".format),
    ("sent per replica", "bytes_sent", lambda value: si(value, "B")),
    ("waiting", "comm_wait_s", "{:.1f} s".format),
    ("tokens/s", "tokens_per_s", si),
    ("MFU", "mfu", "{:.1%}".format),
)
SUMMARY_COLUMNS = tuple(title for title, _, _ in _COLUMNS)


def summary_cells(row: Record) -> list[str]:
    """The texts of a summary line with its ``run`` name, one for each of `SUMMARY_COLUMNS`; a dash for the unknown."""
    return ["–" if row.get(key) is None else write(row[key]) for _, key, write in _COLUMNS]


def summary_table(rows: Sequence[Record]) -> str:
    """Summaries of runs, each with its ``run`` name, as lines of text in aligned columns."""
    table = [list(SUMMARY_COLUMNS), *(summary_cells(row) for row in rows)]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(SUMMARY_COLUMNS))]
    table.insert(1, ["-" * width for width in widths])

    def line(cells: list[str]) -> str:
        return "  ".join(f"{c:{'<' if i < 2 else '>'}{widths[i]}}" for i, c in enumerate(cells))

    return "\n".join(line(cells) for cells in table)
