"""What the page of a method says of its options, its run and its traffic is so."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowcomm import QSR, Algorithm, Reducer
from lowcomm.cli import parse_run
from lowcomm.codecs.base import Codec
from lowcomm.compress.base import Compressor
from lowcomm.feedback.base import Feedback
from lowcomm.outer.base import Outer
from lowcomm.predict import predict
from tests.roles import players

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "algorithms").glob("*.md"))}
# a class has the page that is called like its file, and where several share one a heading there
CLASSES = [(cls.__module__.rpartition(".")[2], cls) for cls in [*players(Algorithm, "algorithms"), QSR]]
COMMAND = re.compile(r"lowcomm train ([^`]*?)--dry_run")


def section(page: str, title: str) -> str:
    """The text under a heading, up to the next one of its rank."""
    _, found, text = PAGES[page].partition(f"\n## {title}\n")
    assert found, f"docs/algorithms/{page}.md has no section {title!r}"
    return text.split("\n## ")[0]


def says(text: str, default: Any) -> bool:
    """Whether a cell of a table of options states this default."""
    if isinstance(default, Reducer):
        return text.startswith("exact") if default == Reducer() else text == "see below"
    if default is None:
        return text in ("none", "equal")
    if isinstance(default, Algorithm):
        return text == f"`{type(default).__name__}()`" and default == type(default)()
    if isinstance(default, Outer):
        numbers = {name: float(number) for name, number in re.findall(r"(\w+)=([\d.]+)", text)}
        return text.startswith(f"`{type(default).__name__}(") and numbers == vars(default)
    if isinstance(default, dict):
        return bool(yaml.safe_load(text.strip("`")) == default)
    if isinstance(default, str | bool):
        return text.strip('"').lower() == str(default).lower()
    return float(text) == default


def test_every_method_has_a_page() -> None:
    assert {page for page, _ in CLASSES} <= PAGES.keys()


@pytest.mark.parametrize("page", PAGES)
def test_page_says_what_a_page_must(page: str) -> None:
    assert f"(docs/algorithms/{page}.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    for title in ("Options", "When to use it", "Traffic", "Numbers worth knowing", "A complete run"):
        assert section(page, title).strip()
    assert re.search("^## (Differs from|What is not here)", PAGES[page], re.MULTILINE)


@pytest.mark.parametrize(
    ("role", "room", "page"),
    [(Codec, "codecs", "codecs"), (Compressor, "compress", "reductions"), (Feedback, "feedback", "feedback")],
)
def test_every_part_is_in_the_table_of_its_page(role: Any, room: str, page: str) -> None:
    first_cells = re.findall(r"^\|([^|]*)\|", (ROOT / "docs" / f"{page}.md").read_text("utf-8"), re.MULTILINE)
    named = set(re.findall(r"`(\w+)[(`]", " ".join(first_cells)))
    assert {part.__name__ for part in players(role, room)} <= named


@pytest.mark.parametrize(("page", "cls"), CLASSES)
def test_options_are_those_of_the_class(page: str, cls: Any) -> None:
    text = section(page, "Options")
    if [page for page, _ in CLASSES].count(page) > 1:
        text = text.split(f"\n### {cls.__name__}\n")[1].split("\n### ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", text, re.MULTILINE))
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    assert rows.keys() == fields.keys()
    for name, field in fields.items():
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        assert says(rows[name], default), f"{name}: {rows[name]} is not {default}"


@pytest.mark.parametrize("page", PAGES)
def test_run_is_the_config_that_it_names(page: str) -> None:
    run = section(page, "A complete run")
    named = re.match(r"\nThis is \[configs/(\w+\.yaml)\]", run)
    shown = re.search(r"```yaml\n(.*?)```", run, re.DOTALL)
    assert named and shown
    assert yaml.safe_load(shown[1]) == yaml.safe_load((ROOT / "configs" / named[1]).read_text(encoding="utf-8"))


def test_every_config_is_shown() -> None:
    named = {re.findall(r"\(\.\./\.\./configs/(\w+\.yaml)\)", section(page, "A complete run"))[0] for page in PAGES}
    assert named == {path.name for path in (ROOT / "configs").glob("*.yaml")}


@pytest.mark.parametrize("page", [page for page in PAGES if COMMAND.search(PAGES[page])])
def test_traffic_is_what_a_dry_run_counts(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a round or of a step, for two or four replicas, stands in the section that has the command."""
    monkeypatch.chdir(ROOT)
    traffic = section(page, "Traffic")
    command = COMMAND.search(traffic)
    assert command
    run, _ = parse_run(shlex.split(command[1]))
    said = set(re.findall(r"[\d,]*\d", traffic))
    likely = sorted((2, 4), key=lambda num: {2: "two", 4: "four"}[num] not in traffic)
    counted = (predict(run, num_replicas, run.data.tokenizer.vocab_size) for num_replicas in likely)
    assert any(said & {f"{seen.round_bytes:,.0f}", f"{seen.step_bytes:,.0f}"} for seen in counted)
