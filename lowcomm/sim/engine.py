"""The inner loop on a virtual clock: real arithmetic, then the virtual time of this rank's step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lowcomm.engine.around import Around
from lowcomm.engine.base import Engine, Ready
from lowcomm.sim.pace import Pace

_FORWARD = 1 / 3  # of a step: backward multiplies twice as many matrices


class SimEngine(Around):
    """Wraps an engine so that steps take virtual time.

    All of a step's time passes in `backward`; an update or an evaluation takes none. The first third is forward. With a
    ``ready`` callback the rest is divided among the parameters by size, in the order of the real backward.

    Args:
        inner: does the arithmetic.
        pace: passes the time of this rank's steps.
        announce: called with each batch at the start of its step, if the arithmetic may be delayed to the step's end;
            None: it comes first.
    """

    def __init__(self, inner: Engine, pace: Pace, announce: Callable[[Any], None] | None = None) -> None:
        super().__init__(inner)
        self._pace, self._announce = pace, announce
        self._t = 0

    def backward(self, batch: Any, ready: Ready | None = None) -> Tensor:
        """The arithmetic comes first, then the time; the time first if the batch is announced."""
        self._t += 1
        if self._announce is not None:
            self._announce(batch)
            self._pace.begin(self._t)
            self._pace.go_on(1.0)
            return self._inner.backward(batch, ready)
        self._pace.begin(self._t)
        finished: list[tuple[int, Tensor]] = []
        collect = None if ready is None else lambda i, x: finished.append((i, x))
        loss = self._inner.backward(batch, collect)
        num_elements, done = sum(x.numel() for _, x in finished), 0
        for i, gradient in finished:
            assert ready is not None
            done += gradient.numel()
            self._pace.go_on(_FORWARD + (1 - _FORWARD) * done / max(1, num_elements))
            ready(i, gradient)
        if ready is None:
            self._pace.go_on(1.0)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The inner engine's and the number of steps taken."""
        return {"inner": super().state_dict(), "t": self._t}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state["inner"])
        self._t = state["t"]
