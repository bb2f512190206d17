"""One rank's inner steps in virtual time."""

from __future__ import annotations

from lowcomm.sim.cluster.compute import ComputeModel
from lowcomm.sim.record.trace import Trace
from lowcomm.sim.wire.clock import Clock


class Pace:
    """Passes the time of inner steps, whole or in parts.

    Waits between two parts of a step add to its seconds, which are fixed at its start.

    Args:
        clock: whose time it is.
        compute: how long steps take.
        trace: where they stand.
    """

    def __init__(self, clock: Clock, compute: ComputeModel, trace: Trace, rank: int) -> None:
        self._clock, self._compute, self._trace, self._rank = clock, compute, trace, rank
        self._start_s = self._step_s = self._stood_s = 0.0
        self._span = 0

    def begin(self, t: int) -> None:
        """Inner step ``t`` starts now."""
        self._start_s = self._stood_s = self._clock.now
        self._step_s = self._compute.seconds(self._rank, t, self._start_s)
        self._span = len(self._trace.spans)
        self._trace.add(self._rank, "compute", self._start_s, self._start_s + self._step_s, f"step {t}")

    def go_on(self, share: float) -> None:
        """Let time pass until this share of the step, in [0, 1], is done."""
        waited_s = self._clock.now - self._stood_s
        if waited_s > 0:
            self._start_s += waited_s
            self._span = self._trace.interrupt(self._span, self._stood_s, self._clock.now)
        self._clock.sleep(max(0.0, self._start_s + self._step_s * share - self._clock.now))
        self._stood_s = self._clock.now
