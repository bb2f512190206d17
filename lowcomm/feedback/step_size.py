"""The largest step sizes with a guarantee for gradient descent through a compressed mean, of smooth functions.

``smoothness`` is L, the Lipschitz constant of the gradient of the mean function; ``local`` has the L_i of the members'
own functions; ``contraction`` is the delta in (0, 1] of ``|C(x) - x|^2 <= (1 - delta) |x|^2`` (k / d for top-k). They
are cautious: steps many times larger often still converge.

Differs from the paper in: nothing (EF21: arXiv:2106.05203; EF21-W: arXiv:2402.10774; EF-BV: arXiv:2205.04180).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, sqrt

from lowcomm.feedback.ef_bv import EFBV


def dense(smoothness: float) -> float:
    """Gradient descent with exact means: 1 / L."""
    _check(smoothness, [smoothness])
    return 1.0 / smoothness


def ef21(smoothness: float, local: Sequence[float], contraction: float) -> float:
    """EF21: 1 / (L + xi(delta) times the quadratic mean of the L_i).

    EControl, which is EF21 where its eta is 0, is compared at multiples of this too: its own guarantee is for eta =
    delta / 400.
    """
    _check(smoothness, local)
    return 1.0 / (smoothness + sqrt(fsum(x * x for x in local) / len(local)) * _xi(contraction))


def ef21_w(smoothness: float, local: Sequence[float], contraction: float) -> float:
    """EF21-W: 1 / (L + xi(delta) times the arithmetic mean of the L_i), which is at least EF21's.

    For compressors that commute with positive factors, such as top-k, signs and codes scaled by the largest value, it
    is a step size for EF21 itself, as both methods then make the same steps.
    """
    _check(smoothness, local)
    return 1.0 / (smoothness + fsum(local) / len(local) * _xi(contraction))


def ef21_w_weights(local: Sequence[float]) -> list[float]:
    """The weights w_i = L_i / sum of L of EF21-W, for compressors on a fixed grid, such as rounding to powers of two.

    Member i of n hands ``x / (n w_i)`` to EF21, and estimates count times ``n w_i`` in the mean.
    """
    _check(1.0, local)
    total = fsum(local)
    return [x / total for x in local]


def ef_bv(
    smoothness: float, local: Sequence[float], eta: float, omega: float, omega_av: float, feedback: EFBV
) -> float:
    """EF-BV with the factors of ``feedback``, for a compressor of this bias, variance and variance of the mean.

    Raises:
        ValueError: also when these factors do not bring the compressor closer to the identity than zero is.
    """
    _check(smoothness, local)
    lam, nu = feedback.lam, feedback.nu
    r = (1 - lam + lam * eta) ** 2 + lam**2 * omega
    r_av = (1 - nu + nu * eta) ** 2 + nu**2 * omega_av
    if not r < 1:
        raise ValueError(
            f"lam={lam} with bias {eta} and variance {omega} has r = {r:g}, which must be below 1; EFBV.best finds the "
            "factors"
        )
    if r == 0:
        return 1.0 / smoothness
    s = sqrt((1 + r) / (2 * r)) - 1
    return 1.0 / (smoothness + sqrt(fsum(x * x for x in local) / len(local)) * sqrt(r_av / r) / s)


def _xi(contraction: float) -> float:
    """The price of a compressor: 0 for an exact one, about 2 / delta for a small delta."""
    if not 0.0 < contraction <= 1.0:
        raise ValueError(f"contraction is {contraction}; it must lie within (0, 1], as k / d of top-k does")
    return (1.0 + sqrt(1.0 - contraction)) / contraction - 1.0


def _check(smoothness: float, local: Sequence[float]) -> None:
    if not smoothness > 0 or not local or not min(local) > 0:
        raise ValueError(
            f"smoothness {smoothness} and the members' {list(local)} must be positive, and at least one member's given"
        )
