"""The inner loop on a virtual clock: the same arithmetic, then the time that this rank's machine would have taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lowcomm.engine.base import Engine


class SimEngine(Engine):
    """Another engine whose steps take virtual time.

    All of a step's time passes in `backward`; an update or an evaluation takes none.

    Args:
        inner: who computes.
        sleep: lets virtual seconds pass for this rank.
        seconds: how long inner step t = 1, 2, ... takes when it starts at a moment.
        now: virtual seconds.
    """

    def __init__(
        self,
        inner: Engine,
        sleep: Callable[[float], None],
        seconds: Callable[[int, float], float],
        now: Callable[[], float],
    ) -> None:
        self._inner, self._sleep, self._seconds, self._now = inner, sleep, seconds, now
        self._t = 0

    def backward(self, batch: Any) -> Tensor:
        """See `Engine.backward`."""
        self._t += 1
        loss = self._inner.backward(batch)
        self._sleep(self._seconds(self._t, self._now()))
        return loss

    def update(self) -> None:
        """See `Engine.update`."""
        self._inner.update()

    def evaluate(self, batch: Any) -> Tensor:
        """See `Engine.evaluate`."""
        return self._inner.evaluate(batch)

    def slots(self) -> Mapping[str, list[Tensor]]:
        """See `Engine.slots`."""
        return self._inner.slots()

    def lr(self) -> float:
        """See `Engine.lr`."""
        return self._inner.lr()

    def state_dict(self) -> dict[str, Any]:
        """The inner engine's and the number of steps taken."""
        return {"inner": self._inner.state_dict(), "t": self._t}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Engine.load_state_dict`."""
        self._inner.load_state_dict(state["inner"])
        self._t = state["t"]
