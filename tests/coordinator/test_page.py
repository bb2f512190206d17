"""The live page: nothing from elsewhere, and in Chromium: what it shows, on a phone, in the dark, and of a liar."""

from __future__ import annotations

import asyncio
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lowcomm.coordinator import readers
from lowcomm.participation.rules import FirstK
from tests.coordinator.browser import CHROMIUM, tab
from tests.coordinator.ranks import joined, served, soon

PAGE = Path(readers.__file__).with_name("page.html").read_text(encoding="utf-8")
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="a Chromium is missing")


def test_the_page_is_whole_and_asks_nobody_else() -> None:
    opened: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            assert not {"src", "href", "srcset"} & {name for name, _ in attributes}, tag
            if tag not in ("meta", "rect"):
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Tags().feed(PAGE)
    assert not opened
    assert set(re.findall(r"https?://[^\s\"']+", PAGE)) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in PAGE and "@import" not in PAGE and "url(" not in PAGE


@in_chromium
def test_the_page_in_chromium(tmp_path: Path) -> None:
    """A name that would be markup stays text; late and gone replicas show; a phone need not scroll sideways."""

    async def run() -> None:
        async with (
            served(tmp_path, rule=FirstK(2), num_replicas=3) as (server, client),
            tab(tmp_path / "browser") as page,
        ):
            ranks = [await joined(client, r, name=f"<img src=x onerror=alert({r})>" + "long" * 20) for r in range(4)]
            await ranks[3].socket.close()
            await soon(lambda: server.session.meeting.present == (0, 1, 2))
            for version in range(3):
                for rank in ranks[:2]:
                    await rank.arrive(version, 1e6 * (version + 1))
                for rank in ranks[:2]:
                    await rank.hear()
            await ranks[1].socket.close()
            await page.ask("Page.navigate", url=str(client.make_url("/")))
            await page.until("document.querySelectorAll('#replicas tr').length === 4")
            shown = await page.value("document.body.innerText")
            assert "<img src=x onerror=alert(0)>" in shown and "live" in shown
            assert re.search(r"late, working", shown) and re.search(r"gone .*\s", shown)
            assert "its connection closed" in shown and "FirstK(k=2)" in shown
            assert await page.value("document.querySelectorAll('#rounds tr').length") == 3
            assert await page.value("document.querySelectorAll('#times rect.late').length") == 3
            for scheme in ("light", "dark"):
                feature = {"name": "prefers-color-scheme", "value": scheme}
                await page.ask("Emulation.setEmulatedMedia", features=[feature])
                ink, paper = await page.value(
                    "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
                )
                assert (brightness(ink) < brightness(paper)) == (scheme == "light")
                assert abs(brightness(ink) - brightness(paper)) > 150
            await page.ask(
                "Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True
            )
            assert await page.value("document.documentElement.scrollWidth") <= 360
            assert not page.errors
            await client.server.close()
            await page.until("document.getElementById('link').dataset.up === 'no'")

    asyncio.run(run())


def brightness(colour: str) -> float:
    """Of "rgb(r, g, b)", from 0 to 255."""
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3
