"""One method between EF21 and DIANA, for compressors that are biased, random or both (EF-BV, arXiv:2205.04180).

Each member keeps h and compresses ``x - h``. The estimate is the mean of all h plus nu times the mean of what was
sent; then h moves by lam times what was sent. lam = nu = 1 is EF21; an unbiased compressor of variance omega with
lam = 1 / (1 + omega) and nu = 1 is DIANA (arXiv:1901.09269).

A compressor has bias eta and variance omega when ``|E C(x) - x| <= eta |x|`` and ``E |C(x) - E C(x)|^2 <= omega
|x|^2``; omega_av is the variance of the mean over members: omega / n where they draw independently, omega where they
draw alike.

Differs from the paper in: with ``dense_first``, h starts as the exact first x, which goes uncompressed, as in the
authors' code; the paper leaves the start open.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

from torch import Tensor

from lowcomm.comm.base import Comm, Work
from lowcomm.feedback.base import Feedback
from lowcomm.feedback.tracked import Tracked, move, resynced, tracked


@dataclass(frozen=True)
class EFBV(Feedback[Tracked]):
    """EF21 with two factors. As they are by default it is EF21; see `diana` and `best`.

    Attributes:
        lam: how far h moves towards what was sent, in (0, 1].
        nu: how much of what was sent goes into the estimate, in (0, 1].
        dense_first: start from the exact x of the first round, which goes uncompressed; otherwise from zero.
    """

    lam: float = 1.0
    nu: float = 1.0
    dense_first: bool = True
    keeps_mean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value in [("lam", self.lam), ("nu", self.nu)]:
            if not 0.0 < value <= 1.0:
                raise ValueError(
                    f"EFBV({name}={value}): it must lie within (0, 1]; EFBV.best gives it for a compressor"
                )

    @classmethod
    def diana(cls, omega: float, dense_first: bool = True) -> EFBV:
        """DIANA for an unbiased compressor of variance ``omega``."""
        _check(0.0, omega, omega)
        return cls(1.0 / (1.0 + omega), 1.0, dense_first)

    @classmethod
    def best(cls, eta: float, omega: float, omega_av: float, dense_first: bool = True) -> EFBV:
        """The factors of the fastest guarantee for a compressor of bias ``eta``, variance and variance of the mean."""
        _check(eta, omega, omega_av)
        return cls(best_factor(eta, omega), best_factor(eta, omega_av), dense_first)

    def init(self, like: Tensor) -> Tracked:
        return tracked(like)

    def is_dense(self, state: Tracked) -> bool:
        """The first round, if so wanted."""
        return self.dense_first and state.is_new

    def before(self, x: Tensor, state: Tracked) -> tuple[Tensor, None]:
        """What is new in ``x``."""
        return x - state.mine, None

    def after(self, kept: None, sent: Tensor, mean: Tensor, state: Tracked) -> tuple[Tensor, Tracked]:
        """The mean of all h and nu of what was sent now; all of it where that was exact."""
        is_dense = self.is_dense(state)
        lam, nu = (1.0, 1.0) if is_dense else (self.lam, self.nu)
        estimate = state.ours.add(mean, alpha=nu)
        move(state, sent, mean, by=lam)
        return estimate, state

    def resync(self, state: Tracked, comm: Comm) -> Generator[Work[Any], Any, Tracked]:
        """Recompute the mean; a new member has h = 0."""
        return (yield from resynced(state, comm))


def best_factor(eta: float, omega: float) -> float:
    """The factor in (0, 1] that brings a compressor of bias ``eta`` and variance ``omega`` closest to the identity."""
    return min(1.0, (1.0 - eta) / ((1.0 - eta) ** 2 + omega))


def _check(eta: float, omega: float, omega_av: float) -> None:
    if not (0.0 <= eta < 1.0 and 0.0 <= omega_av <= omega < inf):
        raise ValueError(
            f"eta={eta}, omega={omega}, omega_av={omega_av} describe no compressor: the bias eta must lie within "
            "[0, 1), and the variances must be finite with 0 <= omega_av <= omega"
        )
