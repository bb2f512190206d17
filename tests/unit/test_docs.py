"""What the documentation shows is true: runs parse, code compiles, examples run, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from lowcomm.cli import parse_run
from tests.torchrun import torchrun

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def itself(value: object) -> str:
    """A short id for a test's argument."""
    text = name(value) if isinstance(value, Path) and value.is_relative_to(ROOT) else str(value)
    return text.split("\n")[0][:50]


def blocks(language: str) -> list[tuple[str, str]]:
    """Where each fenced block of a language stands, and its text."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text[: block.start()].count("\n") + 1
            found.append((f"{name(page)}:{line}", block[1]))
    return found


def commands() -> list[tuple[str, list[str]]]:
    """The flags of each `lowcomm train` in a shell block."""
    found = []
    for place, text in blocks("sh"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if ("lowcomm", "train") in pairwise(words):
                found.append((place, words[words.index("train") + 1 :]))
    return found


def links() -> list[tuple[Path, str]]:
    """Each relative link and the page that it stands on."""
    found = [(page, target) for page in PAGES for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))]
    return [(page, target) for page, target in found if "://" not in target]


def quotations() -> list[tuple[Path, str]]:
    """Rows of tables that end in a piece of code and a link to the file that it is said to stand in."""
    row = re.compile(r"\| `([^`]+)` \| \[[^]]+\]\(([^)]+\.py)\) \|$", re.MULTILINE)
    return [(page.parent / path, code) for page in PAGES for code, path in row.findall(page.read_text("utf-8"))]


def anchors(page: Path) -> set[str]:
    """What its headings can be linked by."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_there_is_something_to_test() -> None:
    assert blocks("yaml")
    assert blocks("python")
    assert commands()
    assert links()
    assert quotations()
    assert EXAMPLES


@pytest.mark.parametrize(("place", "text"), blocks("yaml"), ids=itself)
def test_run_parses(place: str, text: str, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(text, encoding="utf-8")
    parse_run(["--config", str(config)])


@pytest.mark.parametrize(("place", "argv"), commands(), ids=itself)
def test_command_parses(place: str, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parse_run(argv)


@pytest.mark.parametrize(("place", "text"), blocks("python"), ids=itself)
def test_code_compiles(place: str, text: str) -> None:
    compile(text, place, "exec")


@pytest.mark.parametrize(("page", "target"), links(), ids=itself)
def test_link_leads_somewhere(page: Path, target: str) -> None:
    path, _, anchor = target.partition("#")
    there = (page.parent / path).resolve() if path else page
    assert there.exists()
    assert not anchor or anchor in anchors(there)


@pytest.mark.parametrize(("path", "code"), quotations(), ids=itself)
def test_quoted_code_stands_there(path: Path, code: str) -> None:
    assert code in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("example", EXAMPLES, ids=itself)
def test_example_runs(example: Path) -> None:
    distances = re.findall(r"distance to the target ([\d.]+)", torchrun(2, str(example)))
    assert len(distances) == 2
    assert len(set(distances)) == 1, f"the replicas end with different parameters: {distances}"
    assert float(distances[0]) < 0.1  # it starts near 2
