"""The table of benchmarks/convergence.py: which runs it sets beside each other."""

import pytest

from benchmarks.convergence import Row, Tuned


def row(losses):
    return Row("one", 4, Tuned(1e-3, ()), losses, wire_bytes=1.0)


def test_methods_are_compared_by_the_seeds_that_both_have():
    three, one, two = row({0: 2.0, 1: 1.0, 2: 3.0}), row({0: 2.2}), row({0: 2.2, 2: 3.3})
    assert one.behind(three) == pytest.approx(0.1)
    assert three.behind(one) == pytest.approx(2.0 / 2.2 - 1)
    assert two.behind(three) == pytest.approx(0.1)
    assert three.loss == pytest.approx(2.0)
