"""The fits of `DynamicBackup` are the least squares that they claim to be."""

from __future__ import annotations

from importlib import import_module
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowcomm.participation.isotonic import rising, rising_and_falling

VALUES = st.floats(-10, 10, allow_nan=False)
WEIGHTS = st.floats(0.1, 10)


def least_squares(values, weights, below):
    """Min-max formula: max over upper sets with i of the min over lower sets with i of the mean of what is in both.

    Args:
        below: whether the first of two places may not be above the second.
    """
    places = range(len(values))
    sets = [{i for i, kept in zip(places, kept, strict=True) if kept} for kept in product([0, 1], repeat=len(values))]
    upper = [u for u in sets if all(j in u for i in u for j in places if below(i, j))]
    lower = [low for low in sets if all(i in low for j in low for i in places if below(i, j))]

    def mean(some):
        return sum(values[i] * weights[i] for i in some) / sum(weights[i] for i in some)

    return [max(min(mean(u & low) for low in lower if i in low) for u in upper if i in u) for i in places]


@given(st.lists(st.tuples(VALUES, WEIGHTS), min_size=1, max_size=6))
def test_along_a_line(pairs):
    values, weights = zip(*pairs, strict=True)
    expected = least_squares(values, weights, lambda i, j: i < j)
    assert rising(values, weights) == pytest.approx(expected)


@given(st.lists(st.tuples(VALUES, WEIGHTS), min_size=1, max_size=40))
def test_along_a_line_against_scikit_learn(pairs):
    isotonic = import_module("sklearn.isotonic")
    values, weights = zip(*pairs, strict=True)
    assert rising(values, weights) == pytest.approx(isotonic.isotonic_regression(values, sample_weight=weights))


@given(st.integers(1, 3), st.integers(1, 3), st.data())
def test_on_a_grid(num_rows, num_columns, data):
    num = num_rows * num_columns
    values, weights = (data.draw(st.lists(kind, min_size=num, max_size=num)) for kind in (VALUES, WEIGHTS))

    def below(i, j):  # up in a column, or to the left in a row
        return i // num_columns >= j // num_columns and i % num_columns <= j % num_columns

    def grid(flat):
        return [list(flat[i : i + num_columns]) for i in range(0, num, num_columns)]

    fitted = rising_and_falling(grid(values), grid(weights), num_sweeps=3000, tolerance=1e-9)
    assert [x for row in fitted for x in row] == pytest.approx(least_squares(values, weights, below), abs=1e-3)
