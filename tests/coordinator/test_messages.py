"""A text is a message or `Malformed`, whatever it is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowcomm.coordinator import messages as m
from lowcomm.participation.base import Measured
from lowcomm.participation.meeting import View
from tests.coordinator.ranks import ALL, ARRIVE, JOIN

ENDED = m.Ended(3, 0.1, 0.2, 1000, 2.5)
MESSAGES: list[Any] = [
    *(JOIN, ARRIVE, m.Leave("p", 1, None), m.Leave("p", 1, ENDED)),
    m.Arrive("p", 1, 2, 3, 4, 5.0, 6.0, Measured(2, 2.5, -0.0, 1e-9), 7, (1, 2), ENDED),
    *(m.Welcome(1, 2), View(1, 2, (0, 3), (5.0, 0.5), (1, 0)), m.Without(1, 2), m.Lost(3, (1,)), m.Refused("no", True)),
]
KINDS = [m.Join, m.Arrive, m.Leave, *ALL]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_what_is_encoded_comes_back(message: Any) -> None:
    assert m.decode(m.encode(message), KINDS) == message


def decoded(text: str) -> None:
    """Whatever it is, it is understood or `Malformed`."""
    try:
        message: Any = m.decode(text, KINDS)
    except m.Malformed:
        return
    assert m.decode(m.encode(message), KINDS) == message


@given(st.text() | JSON.map(json.dumps))
def test_any_text(text: str) -> None:
    decoded(text)


@given(st.sampled_from(MESSAGES), st.data())
def test_any_value_in_any_field(message: Any, data: st.DataObject) -> None:
    said = json.loads(m.encode(message))
    field = data.draw(st.sampled_from(sorted(said)))
    said[field] = data.draw(JSON)
    decoded(json.dumps(said))


@pytest.mark.parametrize(
    "text",
    [
        *("", "null", "[]", "{}", "[" * 50000, '{"v":1,"kind":"Leave"' + ',"a":{"b":' * 9000, "9" * 9000),
        '{"v":2,"kind":"Leave","incarnation":"p","epoch":1,"ended":null}',
        '{"v":1,"kind":"Leave","incarnation":"p","epoch":NaN,"ended":null}',
        '{"v":1,"kind":"Leave","incarnation":"p","epoch":-1,"ended":null}',
        '{"v":1,"kind":"Leave","incarnation":"p","epoch":true,"ended":null}',
        '{"v":1,"kind":"Leave","incarnation":"p","epoch":1.0,"ended":null}',
        '{"v":1,"kind":"Leave","incarnation":"p","epoch":1,"ended":{}}',
        '{"v":1,"kind":"Leave","incarnation":"p","epoch":1}',
        '{"v":1,"kind":"Leave","incarnation":"p","epoch":1,"ended":null,"more":1}',
        '{"v":1,"kind":["Leave"],"incarnation":"p","epoch":1,"ended":null}',
        m.encode(ARRIVE).replace("100.0", "1e999"),
        m.encode(ARRIVE).replace("100.0", "-1.0"),
        m.encode(JOIN).replace('"replica":0', f'"replica":{2**53}'),
        m.encode(JOIN).replace('"p0"', '""'),
        m.encode(JOIN).replace("host", "h" * 300),
    ],
    ids=lambda text: text[:70],
)
def test_what_is_no_message(text: str) -> None:
    with pytest.raises(m.Malformed):
        m.decode(text, KINDS)


def test_only_the_expected_kinds() -> None:
    with pytest.raises(m.Malformed, match="kind must be one of"):
        m.decode(m.encode(JOIN), [m.Arrive])
