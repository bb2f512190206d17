"""Step sizes that theory allows."""

import pytest
import torch

from benchmarks import step_size
from lowcomm.tensors import rng
from tests.compressors import EFBV, EControl


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


def test_the_means_of_the_members_and_the_factors_of_ef_bv():
    """By hand: xi(1/2) = 1 + sqrt 2; then lam = 1/2 and nu = 3/4 at bias 1/2 and variances 1 and 1/4."""
    xi, quadratic = 1 + 2**0.5, 5**0.5
    assert step_size.ef21(1.0, [1.0, 3.0], 0.5) == pytest.approx(1 / (1 + quadratic * xi))
    assert step_size.ef21_w(1.0, [1.0, 3.0], 0.5) == pytest.approx(1 / (1 + 2 * xi))
    r, r_av = 0.75**2 + 0.25, 0.625**2 + 0.75**2 / 4
    xi = (r_av / r) ** 0.5 / (((1 + r) / (2 * r)) ** 0.5 - 1)
    assert step_size.ef_bv(1.0, [1.0, 3.0], 0.5, 1.0, 0.25, EFBV(0.5, 0.75)) == pytest.approx(1 / (1 + quadratic * xi))
    with pytest.raises(ValueError, match="contraction is 1.5"):
        step_size.ef21(1.0, [1.0], 1.5)
    with pytest.raises(ValueError, match="at least one member"):
        step_size.ef21_w_weights([])


def price(contraction, eta):
    """The xi of EControl."""
    return (1 / step_size.econtrol(1.0, [0.5, 0.5], contraction, eta) - 1.0) / 0.5


def amplified(contraction, eta, gradients, miss):
    """The norm over time of what is wrong with EControl's steps, by that of the gradients' changes.

    ``miss(wanted)`` is what the compressor fails to send of a vector.
    """
    feedback = EControl(eta, dense_first=False)
    state, wrong, changes, before = feedback.init(gradients[0]), 0.0, 0.0, torch.zeros_like(gradients[0])
    for gradient in gradients:
        wanted, kept = feedback.before(gradient, state)
        missed = miss(wanted)
        assert missed.norm() <= (1 - contraction) ** 0.5 * wanted.norm() * (1 + 1e-12)
        sent = wanted - missed
        estimate, state = feedback.after(kept, sent, sent, state)
        wrong += float((estimate - gradient).square().sum())
        changes += float((gradient - before).square().sum())
        before = gradient
    return (wrong / changes) ** 0.5


@pytest.mark.parametrize("contraction", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("share", [0.01, 0.9])
def test_what_econtrol_guarantees_holds_and_is_sharp(contraction, share):
    q = (1 - contraction) ** 0.5
    eta = min(1.0, share * 2 * (1 - q) / (1 + q))
    xi = price(contraction, eta)
    random = rng(0, "misses")
    drifting = torch.randn(500, 3, generator=random, dtype=torch.float64).cumsum(0)

    def anything(wanted):
        direction = torch.randn(3, generator=random, dtype=torch.float64)
        return q * wanted.norm() * direction / direction.norm()

    misses = [anything, lambda wanted: q * wanted, lambda wanted: -q * wanted]
    assert all(amplified(contraction, eta, drifting, miss) <= xi for miss in misses)
    # gradients that go to and fro, and a compressor that always overshoots
    alternating = torch.tensor([[0.0], [1.0]] * 3000, dtype=torch.float64)
    assert 0.95 * xi <= amplified(contraction, eta, alternating, lambda wanted: -q * wanted) <= xi


def test_econtrol_is_ef21_without_eta():
    arguments = (2.0, [1.0, 3.0], 0.1)
    assert step_size.econtrol(*arguments, 0.0) == pytest.approx(step_size.ef21(*arguments), rel=1e-12)
    assert step_size.econtrol(*arguments, 0.1 / 400) == pytest.approx(step_size.ef21(*arguments), rel=0.01)
    assert step_size.econtrol(*arguments, 0.04) < step_size.econtrol(*arguments, 0.02) < step_size.ef21(*arguments)
    assert step_size.econtrol(4.0, [4.0], 1.0, 1.0) == 0.25
    with pytest.raises(ValueError, match=r"eta is 0.1 at contraction 0.1.*below 0.0526"):
        step_size.econtrol(*arguments, 0.1)
