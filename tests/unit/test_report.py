"""The report is one well-formed page that loads nothing, shows every run's numbers, and executes nothing of theirs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lowcomm.cli import main
from lowcomm.metrics import Metrics
from lowcomm.report.page import write_report
from lowcomm.report.pictures import thin
from lowcomm.report.table import SUMMARY_COLUMNS

ODD = "<b>odd & 'name'"
VOID = {"meta", "line"}
NUM_STEPS = 20
THINNED = "a point is the mean of a few"


def write_run(dir: Path, scale: float, bytes_per_round: int, *, ends: bool = True) -> Path:
    file = Metrics(dir / "metrics.jsonl")
    counts: dict[str, Any] = {}
    for t in range(1, NUM_STEPS + 1):
        counts = {"t": t, "rank": 0, "tokens": 512 * t, "time_s": t / 2, "bytes_sent": t // 5 * bytes_per_round}
        file.write({"kind": "step", **counts, "loss": scale * (6 - t / 5), "tokens_per_s": 1024.0})
        file.write({"kind": "step", **counts, "rank": 1, "loss": 1e9})
        if t % 5 == 0:
            file.write({"kind": "eval", **counts, "val_loss": scale * (6 - t / 8), "val_bits_per_byte": 2.5})
    if ends:
        file.write({"kind": "summary", **counts, "algorithm": "DiLoCo", "members": 4, "comm_wait_s": 1.5, "mfu": 0.25})
    file.close()
    return dir


@dataclass
class Element:
    """A tag with what lies within it."""

    tag: str
    attributes: dict[str, str]
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, tag: str) -> list[Element]:
        found = [self] if self.tag == tag else []
        return found + [element for child in self.children for element in child.all(tag)]

    def everything(self) -> list[Element]:
        return [self, *(element for child in self.children for element in child.everything())]


class Page(HTMLParser):
    """Reads a page into a tree and refuses tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open = [Element("page", {})]
        self.feed(text)
        self.close()
        assert len(self.open) == 1, self.open[-1].tag

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(self.open[-1].children[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    first = write_run(folder / "diloco", 1.0, 1_000)
    (first / "config.yaml").write_text("note: </pre><script>alert(1)</script>\n")
    (first / "environment.json").write_text('{"torch": "2.13", "gpus": ["<i>H100</i>", "H100"], "cuda": null}')
    second = write_run(folder / ODD, 0.5, 1_000_000, ends=False)
    out = folder / "new" / "report.html"
    assert write_report([first, second, first], out) == out
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Element:
    return Page(text).open[0]


def test_table_has_the_numbers(page: Element) -> None:
    header, first, second = page.all("table")[0].all("tr")
    assert [cell.text for cell in header.all("th")] == list(SUMMARY_COLUMNS)
    assert [cell.text for cell in first.all("th") + first.all("td")] == [
        *("diloco", "DiLoCo", "4", "10.2 k", "3.5000", "2.5000", "4.00 kB", "1.5 s", "1.02 k", "25.0%")
    ]
    assert [cell.text for cell in second.all("th") + second.all("td")] == [
        *(f"{ODD} (until step 20)", "–", "–", "10.2 k", "1.7500", "2.5000", "4.00 MB", "–", "1.02 k", "–")
    ]


def test_pictures_have_every_curve(page: Element) -> None:
    figures = page.all("figure")
    assert [figure.attributes["aria-label"].split(" against ")[0] for figure in figures] == [
        *["Validation loss"] * 4,
        *["Training loss"] * 4,
    ]
    for figure, label in zip(figures, ["inner steps", "tokens", "bytes", "seconds"] * 2, strict=True):
        assert label in figure.text
        curves = [g for g in figure.all("g") if re.search(r"-curve-\d$", g.attributes.get("id", ""))]
        assert [curve.all("title")[0].text for curve in curves] == ["diloco", ODD]
        colours = [
            re.findall(r"stroke: (var\(--curve-\d\))", curve.all("path")[0].attributes["style"])[0] for curve in curves
        ]
        assert colours == ["var(--curve-0)", "var(--curve-1)"]
    legend = next(ul for ul in page.all("ul") if ul.attributes["class"] == "legend")
    assert [li.text for li in legend.all("li")] == ["diloco", ODD]


def test_points_stand_where_they_belong(page: Element) -> None:
    """Pixels are one straight map of steps and losses for both runs together."""
    figure = page.all("figure")[0]
    pixels = []
    for i in (0, 1):
        (curve,) = [g for g in figure.all("g") if g.attributes.get("id") == f"val_loss-t-curve-{i}"]
        pixels += [(float(use.attributes["x"]), float(use.attributes["y"])) for use in curve.all("use")]
    steps = (5, 10, 15, 20)
    values = [(t, scale * (6 - t / 8)) for scale in (1.0, 0.5) for t in steps]
    assert len(pixels) == len(values)
    for axis, sign in ((0, 1), (1, -1)):
        (v0, p0), (v1, p1) = [(values[i][axis], pixels[i][axis]) for i in (0, 3)]
        slope = (p1 - p0) / (v1 - v0)
        assert slope * sign > 0
        for value, pixel in zip(values, pixels, strict=True):
            assert pixel[axis] == pytest.approx(p0 + slope * (value[axis] - v0), abs=0.01)


def test_one_file_without_scripts_or_ids_twice(page: Element, text: str) -> None:
    elements = page.everything()
    assert not {"script", "link", "img", "iframe", "b", "i"} & {element.tag for element in elements}
    for element in elements:
        for name, value in element.attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value.startswith("#")
    assert not re.search(r"url\((?!#)|@import", text)
    ids = [element.attributes["id"] for element in elements if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r"(?:url\(#|xlink:href=\"#)([^)\"]+)", text)
    assert used
    assert set(used) <= set(ids)


def test_config_and_environment_are_shown_as_text(page: Element) -> None:
    config, environment, no_config, no_environment = page.all("details")
    assert "note: </pre><script>alert(1)</script>" in config.text
    rows = [[cell.text for cell in row.children] for row in environment.all("tr")]
    assert rows == [["torch", "2.13"], ["gpus", "<i>H100</i>, H100"], ["cuda", "–"]]
    assert "no config.yaml" in no_config.text
    assert "no environment.json" in no_environment.text


def test_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing holds no metrics\.jsonl"):
        write_report([tmp_path / "nothing"], tmp_path / "r.html")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="has no line yet"):
        write_report([tmp_path], tmp_path / "r.html")
    with pytest.raises(ValueError, match="at least one"):
        write_report([], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_an_environment_that_is_not_whole_is_named(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "run", 1.0, 0)
    (run / "config.yaml").write_bytes(b"seed: 1 # \xff\n")  # shown as text, whatever it is
    (run / "environment.json").write_text(text)
    with pytest.raises(ValueError, match=r"run/environment\.json .*; delete it"):
        write_report([run], tmp_path / "r.html")
    (run / "environment.json").unlink()
    assert "seed: 1" in write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")


def test_first_lines_and_equal_names_make_a_page(tmp_path: Path) -> None:
    """Two runs of one name, one with a single step and a loss that is not finite, neither with an evaluation."""
    for folder, loss in (("a", float("nan")), ("b", 2.0)):
        file = Metrics(tmp_path / folder / "run" / "metrics.jsonl")
        file.write({"kind": "step", "t": 1, "loss": loss})
        file.close()
    out = write_report([tmp_path / "a" / "run", tmp_path / "b" / "run"], tmp_path / "r.html")
    page = Page(out.read_text(encoding="utf-8")).open[0]
    assert [h2.text for h2 in page.all("h2")] == ["Training loss nats a token", "Runs"]
    assert [li.text for li in page.all("li")] == [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]


def test_the_page_lies_in_the_first_directory_and_says_that_curves_are_thinned(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, 1.0, 0) for name in ("b", "a")]
    assert main(["report", *map(str, runs)]) == 0
    assert not (runs[1] / "report.html").exists()
    assert THINNED not in (runs[0] / "report.html").read_text(encoding="utf-8")
    file = Metrics(tmp_path / "long" / "metrics.jsonl")
    for t in range(1, 402):
        file.write({"kind": "step", "t": t, "loss": 1.0})
    file.close()
    assert THINNED in write_report([tmp_path / "long"], tmp_path / "r.html").read_text(encoding="utf-8")


def test_thin() -> None:
    assert thin([]) == []
    assert thin([(0, 1.0), (1, 2.0)]) == [(0, 1.0), (1, 2.0)]
    thinned = thin([(i, float(i)) for i in range(1000)])
    assert len(thinned) == 334
    assert thinned[:2] == [(2, 1.0), (5, 4.0)]
    assert thinned[-1] == (999, 999.0)
