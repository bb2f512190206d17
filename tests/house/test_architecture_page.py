"""docs/architecture.md draws the house as it stands: its places, its layers, its tests."""

from __future__ import annotations

import re
from pathlib import Path

from tests.house.rules import MAY_IMPORT, PURE

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text under a heading, up to the next one of its rank."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def places(table: str) -> set[str]:
    """The paths in the first column; a bare name lies in lowcomm."""
    cells = re.findall(r"^\| (`[^|]*`) \|", table, re.MULTILINE)
    paths = [path.rstrip("/") for cell in cells for path in re.findall(r"`([^`]+)`", cell)]
    return {path if "/" in path or (ROOT / path).is_dir() else f"lowcomm/{path}" for path in paths}


def rooms() -> set[str]:
    """The modules and packages of lowcomm, as paths."""
    found = (path for path in (ROOT / "lowcomm").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists())
    return {path.relative_to(ROOT).as_posix() for path in found}


def test_layout_names_what_there_is_and_nothing_else() -> None:
    there, _, planned = section("Layout").partition("Planned, and not there yet:")
    named = places(there)
    assert rooms() == {path for path in named if path.startswith("lowcomm/")}
    assert all((ROOT / path).exists() for path in named)
    assert places(planned) and rooms().isdisjoint(places(planned))


def test_layers_are_those_that_the_rule_allows() -> None:
    rows = [line.split() for line in section("Layering").split("```")[1].strip().splitlines()]
    above: set[str] = set()
    for row in rows:
        for room in row:
            assert MAY_IMPORT[room] - {"__init__"} <= above, f"{room} may import what does not stand above it"
        above |= set(row)
    assert above == MAY_IMPORT.keys() - {"__init__", "__main__"}


def test_pure_rooms_are_named() -> None:
    named = section("Layering").split("\n- ")[1].partition(" are *pure*")[0]
    assert set(re.findall(r"`(\w+)`", named)) == PURE


def test_folders_of_tests_are_named() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if any(path.glob("test_*.py"))}
    assert places(section("Tests")) == {f"tests/{folder}" for folder in folders}
