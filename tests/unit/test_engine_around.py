"""An engine around another passes on all that it does not do itself."""

from __future__ import annotations

import inspect
from typing import Any
from unittest.mock import MagicMock, call

import pytest
from torch import Tensor

from lowcomm.engine.around import Around
from lowcomm.engine.base import Engine, Ready


class OwnBackward(Around):
    def backward(self, batch: Any, ready: Ready | None = None) -> Tensor:
        return self._inner.backward(batch, ready)


@pytest.mark.parametrize("name", sorted(Engine.__abstractmethods__ - {"backward"} | {"gradients"}))
def test_a_call_reaches_the_inner_engine_and_its_answer_comes_back(name: str) -> None:
    inner = MagicMock(spec=Engine)
    arguments = [object() for _ in list(inspect.signature(getattr(Engine, name)).parameters)[1:]]
    answer = getattr(OwnBackward(inner), name)(*arguments)
    assert inner.mock_calls == [getattr(call, name)(*arguments)]
    assert answer is None or answer is getattr(inner, name).return_value
    assert (answer is None) == (inspect.signature(getattr(Engine, name)).return_annotation == "None")
