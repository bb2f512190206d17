"""Summaries as a table, numbers with prefixes."""

from __future__ import annotations

import pytest

from lowcomm.report.si import si
from lowcomm.report.table import summary_table


def test_summary_table() -> None:
    row = {"run": "a", "algorithm": "DiLoCo", "members": 4, "tokens": 13_000_000, "val_loss": 1.23456}
    row |= {"bytes_sent": 999_600, "comm_wait_s": 1.25, "tokens_per_s": 12345.6, "mfu": 0.4567}
    lines = summary_table([row, {"run": "a longer name"}]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert " ".join(lines[2].split()) == "a DiLoCo 4 13.0 M 1.2346 – 1.00 MB 1.2 s 12.3 k 45.7%"
    assert lines[3].split() == ["a", "longer", "name", *"–––––––––"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (7, "7 B"), (999, "999 B"), (999.6, "1.00 kB"), (12_345, "12.3 kB"), (999_600, "1.00 MB"),
     (123_400_000, "123 MB"), (5e9, "5.00 GB"), (5e15, "5.00 PB")],
)  # fmt: skip
def test_si(value: float, text: str) -> None:
    assert si(value, "B") == text
