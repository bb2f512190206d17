"""Tables of what is refused, as tests."""

from collections.abc import Callable
from typing import Any

import pytest


def refused(*cases: tuple[Callable[[], Any], str]) -> Any:
    """A test that each call raises ValueError with a message that matches."""

    @pytest.mark.parametrize(("make", "message"), cases)
    def test(make: Callable[[], Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make()

    return test
