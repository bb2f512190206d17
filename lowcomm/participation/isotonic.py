"""Least squares under an order: along a line by pooling, on a grid by Dykstra's alternating projections.

min sum_ij weight_ij (x_ij - value_ij)^2    with x growing along each row and falling down each column
"""

from __future__ import annotations

from collections.abc import Sequence

Grid = list[list[float]]


def rising(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest sequence that never falls; neighbours that would are pooled into their mean.

    Args:
        weights: positive.
    """
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many
    for value, weight in zip(values, weights, strict=True):
        mean, total, num = value, weight, 1
        while pools and pools[-1][0] >= mean:
            before, heavy, more = pools.pop()
            mean = (before * heavy + mean * total) / (heavy + total)
            total, num = heavy + total, num + more
        pools.append((mean, total, num))
    return [mean for mean, _, num in pools for _ in range(num)]


def rising_and_falling(values: Grid, weights: Grid, num_sweeps: int = 30, tolerance: float = 1e-3) -> Grid:
    """The nearest grid that never falls along a row and never rises down a column.

    Args:
        num_sweeps: at most, each over all rows and all columns.
        tolerance: stop when a sweep moves no cell by more.
    """
    fitted = [list(row) for row in values]
    in_rows, in_columns = [[0.0] * len(row) for row in values], [[0.0] * len(row) for row in values]
    for _ in range(num_sweeps):
        before = fitted
        wanted = _sum(fitted, in_rows)
        rows = [rising(row, weight) for row, weight in zip(wanted, weights, strict=True)]
        in_rows = _sum(wanted, rows, -1)
        wanted = _sum(rows, in_columns)
        columns = zip(zip(*wanted, strict=True), zip(*weights, strict=True), strict=True)
        falling = [rising(column[::-1], weight[::-1])[::-1] for column, weight in columns]
        fitted = [list(row) for row in zip(*falling, strict=True)]
        in_columns = _sum(wanted, fitted, -1)
        if max(abs(x) for row in _sum(fitted, before, -1) for x in row) <= tolerance:
            break
    return fitted


def _sum(a: Grid, b: Grid, sign: int = 1) -> Grid:
    return [[x + sign * y for x, y in zip(p, q, strict=True)] for p, q in zip(a, b, strict=True)]
