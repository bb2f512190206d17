"""Step sizes that theory allows."""

import pytest

from lowcomm.feedback import step_size
from lowcomm.feedback.ef_bv import EFBV


def test_step_sizes():
    """The figures of the LibSVM study: mushrooms and phishing among 20 workers, top-1."""
    mushrooms = step_size.ef21(2.786, [3.493] * 20, 1 / 112)
    assert mushrooms == pytest.approx(1.282e-3, rel=1e-3)
    assert step_size.ef21(0.3626, [0.3661] * 20, 1 / 68) == pytest.approx(2.016e-2, rel=1e-3)
    assert step_size.dense(4.0) == 0.25 and step_size.ef21(4.0, [4.0, 5.0], 1.0) == 0.25
    assert step_size.ef21_w(1.0, [1.0, 3.0], 0.5) > step_size.ef21(1.0, [1.0, 3.0], 0.5)
    # EF-BV without variance is EF21, for which its more general theory allows half the step
    eta = (1 - 1 / 112) ** 0.5
    assert step_size.ef_bv(2.786, [3.493] * 20, eta, 0.0, 0.0, EFBV()) == pytest.approx(mushrooms / 2, rel=1e-2)
    assert step_size.ef_bv(2.0, [2.0], 0.0, 0.0, 0.0, EFBV()) == 0.5
    with pytest.raises(ValueError, match="EFBV.best"):
        step_size.ef_bv(1.0, [1.0], 0.0, 3.0, 3.0, EFBV())  # the variance is too large for lam = 1
    with pytest.raises(ValueError, match="contraction"):
        step_size.ef21(1.0, [1.0], 0.0)
    with pytest.raises(ValueError, match="positive"):
        step_size.ef21(1.0, [1.0, 0.0], 0.5)
