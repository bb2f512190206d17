"""Dynamic backup workers (Xu, Neglia, Sebastianelli 2020, arXiv:2004.14696): how many to wait for, anew each round.

With k the number awaited, h the number awaited in the round before, eta the learning rate and F the loss:

    k* = argmax_k G(k) / T[h, k]
    G(k) = (eta - L eta^2 / 2) |grad F|^2 - (L eta^2 / 2) V / k       the loss falls by at least this
    V = sum_j |g_j - g|^2 / (k - 1),   |grad F|^2 = max(|g|^2 - V / k, 0)
    L = max(0, 2 (F_next - F + eta |grad F|^2) / (eta^2 |g|^2))
    T[h, k] = mean seconds from a decision to the k-th arrival that is based on it, with T growing in k and falling in h

V, |grad F|^2 and L are means over the last rounds. T is the isotonic least-squares fit to all orders of arrival, those
after the decision included.

Differs from the paper in: only its abstract and our notes were at hand, so `published` is our reading of it. There the
first rounds wait for everyone and T remembers all of them; by default they wait for half here, T forgets, so that a
machine which has become slow is noticed, and one L is fitted to all of the last rounds, in which the noise of losses
cancels. At least 2 are awaited, since one gives no variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lowcomm.participation.base import Arrival, Measured, RoundReport, Rule, Take, Wait, take
from lowcomm.participation.isotonic import rising_and_falling
from lowcomm.participation.rules import check_count

_UNSEEN = 1e-3  # weight of a cell of T without an observation


@dataclass(frozen=True)
class Times:
    """When the arrivals came that are based on one round.

    Attributes:
        round: which.
        awaited: how many were awaited for it: h.
        begun_s: when it was decided.
        seconds: from then to each arrival, rising.
    """

    round: int
    awaited: int
    begun_s: float
    seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Seen:
    """What members told of one round: sums over those who did."""

    round: int
    num_members: int
    num_told: int = 0
    loss: float = 0.0
    mean_square: float = 0.0
    apart_square: float = 0.0


@dataclass(frozen=True)
class DynamicState:
    """Attributes:
    k: how many are awaited now.
    num_present: who could come.
    times: of the last rounds.
    seen: of the last rounds.
    """

    k: int
    num_present: int
    times: tuple[Times, ...]
    seen: tuple[Seen, ...] = ()


@dataclass(frozen=True)
class DynamicBackup(Rule[DynamicState]):
    """Wait for as many as make the loss fall fastest.

    Attributes:
        lr: eta, by which the mean is multiplied to become a step: 1 for deltas.
        window: rounds over which gains are averaged.
        time_window: rounds from which times are fitted; None for all.
        num_start: rounds before the first choice.
        start: share of those present who are awaited until then.
        k_min: the fewest to wait for, at least 2.
        bend_of_each: estimate L from each round and take the mean; else one L for all rounds of the window, in which
            the noise of losses but the first and the last cancels.
    """

    lr: float = 1.0
    window: int = 20
    time_window: int | None = 10
    num_start: int = 5
    start: float = 0.5
    k_min: int = 2
    bend_of_each: bool = False

    def __post_init__(self) -> None:
        for name in ("window", "num_start"):
            check_count("DynamicBackup", name, getattr(self, name))
        check_count("DynamicBackup", "time_window", 1 if self.time_window is None else self.time_window)
        if self.k_min < 2:
            raise ValueError(f"DynamicBackup(k_min={self.k_min}): one gradient has no variance; take at least 2")
        if not 0 < self.start <= 1:
            raise ValueError(f"DynamicBackup(start={self.start}): it is a share of replicas, above 0 and at most 1")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"DynamicBackup(lr={self.lr}): it must be positive and finite; 1 for deltas")

    def init(self, num_replicas: int) -> DynamicState:
        return DynamicState(self._first(num_replicas), num_replicas, ())

    def decide(
        self, state: DynamicState, arrivals: Sequence[Arrival], present: Sequence[int], begun_s: float, now_s: float
    ) -> Take | Wait:
        return take(arrivals) if present and len(arrivals) >= min(state.k, len(present)) else Wait()

    def hear(self, state: DynamicState, arrival: Arrival) -> DynamicState:
        """Note its time in the round that it is based on, decided already or not."""
        times = tuple(
            replace(t, seconds=tuple(sorted((*t.seconds, arrival.at_s - t.begun_s))))
            if t.round == arrival.version
            else t
            for t in state.times
        )
        return replace(state, times=times)

    def observe(self, state: DynamicState, ended: RoundReport) -> DynamicState:
        """Choose for the next round."""
        times = (*state.times, Times(ended.round, ended.num_counted, ended.decided_s))
        seen = (*state.seen, Seen(ended.round, ended.num_counted))
        kept = len(times) if self.time_window is None else self.time_window
        return self._chosen(DynamicState(state.k, ended.num_present, times[-kept:], seen[-self.window - 1 :]))

    def learn(self, state: DynamicState, measured: Measured) -> DynamicState:
        """Note it, and choose anew once all members have told of their round."""
        seen = tuple(_with(s, measured) if s.round == measured.round else s for s in state.seen)
        state = replace(state, seen=seen)
        complete = any(s.round == measured.round and s.num_told == s.num_members for s in seen)
        return self._chosen(state) if complete else state

    def _first(self, num_present: int) -> int:
        return min(num_present, max(self.k_min, round(self.start * num_present)))

    def _chosen(self, state: DynamicState) -> DynamicState:
        """With the best k for the round that has just begun."""
        num, told = state.num_present, [seen for seen in state.seen if seen.num_told]
        gains = self._gains(told, num)
        if state.times[-1].round < self.num_start or gains is None:
            return replace(state, k=self._first(num))
        if max(gains) <= 0:
            return replace(state, k=num)  # what is left is noise: average it away
        times_s = fitted_times(state.times, num)
        ks = range(min(self.k_min, num), num + 1)
        return replace(state, k=max(ks, key=lambda k: gains[k - 1] / times_s[k - 1]))

    def _gains(self, told: Sequence[Seen], num: int) -> list[float] | None:
        """G(1) to G(num); None while nothing is known."""
        estimates = [_estimates(seen) for seen in told if seen.num_members > 1][-self.window :]
        if not estimates:
            return None
        eta = self.lr
        variance = sum(v for v, _ in estimates) / len(estimates)
        square = sum(s for _, s in estimates) / len(estimates)
        pairs = [(a, b) for a, b in pairwise(told) if b.round == a.round + 1 and a.num_members > 1][-self.window :]
        if not pairs:
            return None
        each = [[pair] for pair in pairs] if self.bend_of_each else [pairs]
        bend = sum(_bend(some, eta) for some in each) / len(each)
        return [(eta - bend) * square - bend * variance / k for k in range(1, num + 1)]


def published(lr: float = 1.0, window: int = 5) -> DynamicBackup:
    """The paper's rule, as we read it, with at least 2 awaited."""
    return DynamicBackup(lr, window, time_window=None, num_start=window, start=1.0, bend_of_each=True)


def fitted_times(times: Sequence[Times], num: int) -> list[float]:
    """T[h, 1] to T[h, num], where h is the number awaited in the last of the rounds.

    Cells without an observation have almost no weight, and the mean of their column; beyond the last column that was
    ever observed, its mean.
    """
    rows = sorted({t.awaited for t in times})
    sums, counts = {h: [0.0] * num for h in rows}, {h: [0] * num for h in rows}
    for t in times:
        for k, seconds in enumerate(t.seconds[:num]):
            sums[t.awaited][k] += seconds
            counts[t.awaited][k] += 1
    usual: list[float] = []
    for k in range(num):
        seen = sum(counts[h][k] for h in rows)
        usual.append(sum(sums[h][k] for h in rows) / seen if seen else (usual[-1] if usual else 1.0))
    values = [[sums[h][k] / counts[h][k] if counts[h][k] else usual[k] for k in range(num)] for h in rows]
    weights = [[float(counts[h][k]) or _UNSEEN for k in range(num)] for h in rows]
    return rising_and_falling(values, weights)[rows.index(times[-1].awaited)]


def _with(seen: Seen, measured: Measured) -> Seen:
    return replace(
        seen,
        num_told=seen.num_told + 1,
        loss=seen.loss + measured.loss,
        mean_square=seen.mean_square + measured.mean_square,
        apart_square=seen.apart_square + measured.apart_square,
    )


def _estimates(seen: Seen) -> tuple[float, float]:
    """V and |grad F|^2."""
    variance = seen.apart_square / seen.num_told * seen.num_members / (seen.num_members - 1)
    return variance, max(0.0, seen.mean_square / seen.num_told - variance / seen.num_members)


def _bend(pairs: Sequence[tuple[Seen, Seen]], eta: float) -> float:
    """L eta^2 / 2, from rounds and those that followed them."""
    fell = sum(a.loss / a.num_told - b.loss / b.num_told for a, b in pairs)
    square = sum(a.mean_square / a.num_told for a, _ in pairs)
    straight = sum(eta * _estimates(a)[1] for a, _ in pairs)
    return max(0.0, (straight - fell) / square) if square > 0 else 0.0
