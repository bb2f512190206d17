"""Every part of the house keeps within its lines of code."""

from __future__ import annotations

from tests.house.budgets import BUDGETS, LARGER, limit, lines_of_code, rooms_without_a_budget, sizes
from tests.house.rules import Source
from tests.house.test_house_rules import sources


def test_parts_keep_their_budgets() -> None:
    counted = sizes(sources())
    over = [f"{part}: {counted[part]} lines of code, at most {limit(part)}" for part in BUDGETS]
    over = [line for line, part in zip(over, BUDGETS, strict=True) if counted[part] > limit(part)]
    assert not over, "\n".join(["", *over, "make it shorter; or say in LARGER and docs/architecture.md why not"])


def test_every_room_has_a_budget() -> None:
    assert not rooms_without_a_budget()


def test_larger_parts_are_larger_and_say_why() -> None:
    counted = sizes(sources())
    for part, (now, why) in LARGER.items():
        assert BUDGETS[part][1] < now and why
        assert now - counted[part] < 100, f"{part} has shrunk to {counted[part]}: lower its number in LARGER"


def test_docstrings_comments_and_blank_lines_do_not_count() -> None:
    head = '"""Doc.\n\nMore.\n"""\n\n# a comment\nx = (\n    1,  # one\n)\n'
    text = head + 'def f():\n    """Doc."""\n    return """a\n\nb"""\n'
    assert lines_of_code(Source("lowcomm/x.py", text)) == 3 + 1 + 3
