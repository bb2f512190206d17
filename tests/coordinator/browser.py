"""A page in Chromium without a screen, spoken to through its debugging protocol."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientWebSocketResponse

CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)


class Tab:
    """One page; what it reported as an error is kept."""

    def __init__(self, socket: ClientWebSocketResponse) -> None:
        self._socket, self._number = socket, 0
        self.errors: list[str] = []

    async def ask(self, method: str, **arguments: Any) -> Any:
        """The result of a method of the protocol."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": arguments})
        while True:
            said = json.loads((await self._socket.receive(20)).data)
            if said.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(json.dumps(said["params"]))
            if said.get("id") == self._number:
                assert "error" not in said, said
                return said["result"]

    async def value(self, expression: str) -> Any:
        """What JavaScript makes of it."""
        found = await self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until JavaScript finds it true."""
        async with asyncio.timeout(20):
            while not await self.value(expression):
                await asyncio.sleep(0.05)


@asynccontextmanager
async def tab(folder: Path) -> AsyncIterator[Tab]:
    """A new page in a browser of its own."""
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={folder}"]
    browser = await asyncio.create_subprocess_exec(
        CHROMIUM, *flags, "about:blank", stderr=asyncio.subprocess.DEVNULL, start_new_session=True
    )
    try:
        port = folder / "DevToolsActivePort"
        async with asyncio.timeout(30):
            while not (port.exists() and port.read_text().count("\n")):
                await asyncio.sleep(0.05)
        async with ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port.read_text().split()[0]}/json/list") as answer:
                pages = [page for page in await answer.json(content_type=None) if page["type"] == "page"]
            async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                opened = Tab(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await opened.ask(f"{domain}.enable")
                yield opened
    finally:
        os.killpg(browser.pid, signal.SIGKILL)  # the program may be a script around the browser
        await browser.wait()
