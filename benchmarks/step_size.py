"""The largest step sizes with a guarantee for gradient descent through a compressed mean, of smooth functions.

``smoothness`` is L, the Lipschitz constant of the gradient of the mean function; ``local`` has the L_i of the members'
own functions; ``contraction`` is the delta in (0, 1] of ``|C(x) - x|^2 <= (1 - delta) |x|^2`` (k / d for top-k). They
are cautious: steps many times larger often still converge.

Differs from the paper in: EControl's (arXiv:2311.05645) is proved here, for full gradients, and not the paper's, whose
rates are for eta = delta / 400 and stochastic gradients (EF21: arXiv:2106.05203; EF21-W: arXiv:2402.10774;
EF-BV: arXiv:2205.04180).
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
    """EF21: 1 / (L + xi(delta) times the quadratic mean of the L_i)."""
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


def econtrol(smoothness: float, local: Sequence[float], contraction: float, eta: float) -> float:
    """EControl with full gradients: 1 / (L + xi times the quadratic mean of the L_i), at eta = 0 EF21's, and below it.

        xi = 2 q / (2 (1 - q) - eta (1 + q)),    q = sqrt(1 - delta)

    So the guarantee is for eta below 2 (1 - q) / (1 + q), about delta / 2, and best at 0: what a larger one gains
    against noise in gradients is not part of it. Proof, for each member with gradients g_t, of which it compresses
    u_t = g_t - h_t + eta e_t and misses r_t, where |r_t| <= q |u_t|. Inserting h_t+1 = h_t + u_t - r_t,

        e_t+1 = (1 - eta) e_t + r_t
        g_t - h_t+1 = r_t - eta e_t                                 what is wrong with the step taken
        u_t+1 = (g_t+1 - g_t) + (1 + eta) r_t - eta^2 e_t

    From r to these are linear filters, (z - 1) / (z - 1 + eta) and ((1 + eta) z - 1) / (z - 1 + eta). Sums of squares
    over time grow by the squares of their largest gains at most, which both have at z = -1: a = 2 / (2 - eta) and
    b = (2 + eta) / (2 - eta). So with norms over time |u| <= |g_t+1 - g_t| + b q |u|, and what is wrong is at most
    a q / (1 - b q) = xi times |g_t+1 - g_t|, which is at most L_i times the step. The rest is as for EF21: a step below
    1 / (L + xi L~) makes the mean of |gradient|^2 over T rounds fall as 1 / T.

    Raises:
        ValueError: also for an eta beyond the guarantee.
    """
    _check(smoothness, local)
    _xi(contraction)
    q = sqrt(1.0 - contraction)
    most = 2.0 * (1.0 - q) / (1.0 + q)
    if not 0.0 <= eta < most:
        raise ValueError(
            f"eta is {eta} at contraction {contraction}; a step size is guaranteed for eta from 0 to below {most:.4g}, "
            "where EControl with full gradients is sure to converge; larger ones may still do so, at a step size to try"
        )
    xi = 2.0 * q / (2.0 * (1.0 - q) - eta * (1.0 + q))
    return 1.0 / (smoothness + sqrt(fsum(x * x for x in local) / len(local)) * xi)


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
    # The paper's sqrt(r_av / r) / s with s = sqrt((1 + r) / (2 r)) - 1, with sqrt(r) cancelled: good at r = 0 too
    xi = sqrt(r_av) / (sqrt((1 + r) / 2) - sqrt(r))
    return 1.0 / (smoothness + sqrt(fsum(x * x for x in local) / len(local)) * xi)


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
