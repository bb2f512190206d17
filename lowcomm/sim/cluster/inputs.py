"""Checks of numbers and tables that a user gives to the simulator."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

N = TypeVar("N", int, float)


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless a number is positive and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it must be positive and finite")


def of_rank(name: str, values: Sequence[float], rank: int) -> float:
    """A rank's value in a list with one for each rank; ValueError when it has none."""
    if not 0 <= rank < len(values):
        raise ValueError(f"{name} has {len(values)} values, none for rank {rank}; give one for each rank")
    return values[rank]


def parsed(where: str, text: str, kind: type[N]) -> N:
    """``text`` as a number; ValueError, naming ``where`` it stands, when it is none."""
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{where}: {text!r} is not a number of type {kind.__name__}") from error


def read_csv(path: str, columns: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The rows of a CSV file under a header that names exactly ``columns``, each with "path:line".

    Raises:
        ValueError: when the file cannot be read, has another header, or a row of another length.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); give a CSV file with the header {','.join(columns)}"
        ) from error
    if not rows or [name.strip() for name in rows[0]] != list(columns):
        raise ValueError(
            f"{path}:1: the header must be {','.join(columns)}, not {','.join(rows[0]) if rows else 'empty'}"
        )
    for line, row in enumerate(rows[1:], start=2):
        if row:
            if len(row) != len(columns):
                raise ValueError(f"{path}:{line}: {len(row)} values; the header names {len(columns)}")
            yield f"{path}:{line}", row
