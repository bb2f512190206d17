"""A base for engines that wrap another and pass on what they do not change."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from lowcomm.engine.base import Engine, Ready


class Around(Engine, ABC):
    """Wraps another engine with a different backward.

    Args:
        inner: does everything else.
    """

    def __init__(self, inner: Engine) -> None:
        self._inner = inner

    @abstractmethod
    def backward(self, batch: Any, ready: Ready | None = None) -> Tensor: ...

    def update(self) -> None:
        self._inner.update()

    def update_part(self, numbers: Sequence[int]) -> None:
        self._inner.update_part(numbers)

    def needs_all_gradients(self) -> str | None:
        return self._inner.needs_all_gradients()

    def evaluate(self, batch: Any) -> Tensor:
        return self._inner.evaluate(batch)

    def standing(self, params: list[Tensor]) -> AbstractContextManager[list[Tensor]]:
        return self._inner.standing(params)

    def has_stepped(self) -> bool:
        return self._inner.has_stepped()

    def slots(self) -> Mapping[str, list[Tensor]]:
        return self._inner.slots()

    def gradients(self, numbers: Sequence[int]) -> list[Tensor]:
        return self._inner.gradients(numbers)

    def buffers(self) -> list[Tensor]:
        return self._inner.buffers()

    def recalculate(self) -> None:
        self._inner.recalculate()

    def names(self) -> list[str]:
        return self._inner.names()

    def lr(self) -> float:
        return self._inner.lr()

    def skip(self, num_steps: int) -> None:
        self._inner.skip(num_steps)

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._inner.load_state_dict(state)
