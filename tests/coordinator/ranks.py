"""Ranks that talk to a coordinator in the same process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from aiohttp import ClientWebSocketResponse, WSMsgType
from aiohttp.test_utils import TestClient, TestServer

from lowcomm.coordinator import messages as m
from lowcomm.coordinator.server import Server
from lowcomm.coordinator.settings import Serving
from lowcomm.participation.meeting import View

JOIN = m.Join(0, "p0", 0, 0, {"config": "c", "codecs": "k"}, "host", False)
ARRIVE = m.Arrive("p0", 1, 0, 0, 10, 100.0, 1.0, None, 0, (), None)
ALL = [m.Welcome, View, m.Without, m.Lost, m.Refused]


@asynccontextmanager
async def served(folder: Path, **options: Any) -> AsyncIterator[tuple[Server, TestClient]]:
    """A coordinator and a client of its address."""
    server = Server(Serving(**{"state": str(folder / "state.json"), **options}))
    async with TestClient(TestServer(server.application())) as client:
        yield server, client


class Rank:
    """One WebSocket, and what its replica knows."""

    def __init__(self, socket: ClientWebSocketResponse, replica: int) -> None:
        self.socket, self.join = socket, replace(JOIN, replica=replica, incarnation=f"p{replica}")
        self.epoch = self.seen = 0

    async def say(self, message: m.FromRank) -> None:
        await self.socket.send_str(m.encode(message))

    async def hear(self) -> Any:
        """The next message; None when the connection is closed."""
        said = await self.socket.receive(5)
        if said.type is not WSMsgType.TEXT:
            return None
        message: Any = m.decode(said.data, ALL)
        self.epoch = getattr(message, "epoch", self.epoch)
        self.seen = message.round if isinstance(message, View) else self.seen
        return message

    async def arrive(
        self, version: int, tokens_done: float = 100.0, broke: int = 0, lost: tuple[int, ...] = ()
    ) -> None:
        await self.say(
            replace(
                ARRIVE,
                incarnation=self.join.incarnation,
                epoch=self.epoch,
                seen=self.seen,
                version=version,
                tokens_done=tokens_done,
                broke=broke,
                lost=lost,
            )
        )


async def joined(client: TestClient, replica: int, **changes: Any) -> Rank:
    """A replica that was welcomed."""
    rank = Rank(await client.ws_connect("/rank"), replica)
    rank.join = replace(rank.join, **changes)
    await rank.say(rank.join)
    assert isinstance(await rank.hear(), m.Welcome)
    return rank


async def soon(condition: Any) -> None:
    """Wait until it holds, 5 s at most."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)
