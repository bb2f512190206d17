"""The coordinator's side of the ranks' WebSockets: it hears, decides, saves, and only then tells.

What is said to ranks goes through an outbox that is emptied after the state is on disk, so no rank ever knows what a
restarted coordinator would not.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowcomm.coordinator import messages as m
from lowcomm.coordinator.history import History
from lowcomm.coordinator.persist import StateFile
from lowcomm.coordinator.readers import Guard, read
from lowcomm.coordinator.session import Member, Refusal, Session
from lowcomm.coordinator.settings import Serving
from lowcomm.optional import require
from lowcomm.participation.base import Wait
from lowcomm.participation.meeting import Meeting

if TYPE_CHECKING:
    from aiohttp import web

_MOST_UNSENT_BYTES = 4 << 20  # to a rank that does not read; then its connection is cut
_BATCH_S = 0.001  # arrivals that come within it are decided on together


@dataclass(eq=False)
class Connection:
    """A rank's WebSocket; ``heard_s`` is when it last said or answered anything."""

    socket: web.WebSocketResponse
    transport: asyncio.Transport
    heard_s: float
    member: Member | None = None


class Server:
    """One coordinator; times are of the monotonic clock."""

    def __init__(self, serving: Serving) -> None:
        """
        Raises:
            ValueError: for a state, a secret or a certificate that cannot be used, or without aiohttp.
        """
        require("aiohttp", "lowcomm[elastic]")
        now_s = time.monotonic()
        self.serving, self._secret, self.tls = serving, serving.secret(), serving.tls()
        self._file = StateFile(Path(serving.state))
        self.session = Session(Meeting(serving.rule, serving.num_replicas, serving.late), serving.num_replicas)
        try:
            self.session.resume(self._file.load(), now_s)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._file.close()
            raise ValueError(
                f"state {serving.state} holds no state of a coordinator ({error!r}); name another"
            ) from None
        self.history = History(now_s)
        self._connections: set[Connection] = set()
        self._outbox: list[tuple[Connection, str]] = []
        self._wake = asyncio.Event()
        self._returned_s = now_s + serving.return_s  # until then members of before a restart may return
        self.tasks: list[asyncio.Task[None]] = []  # while the application runs; they end only by an error

    def application(self) -> web.Application:
        """All routes, and what runs beside them."""
        from aiohttp import web

        guard = Guard(self._secret, self._count_refused)

        @web.middleware
        async def admit(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            return await guard.admit(request, handler)

        app = web.Application(middlewares=[admit])
        app.add_routes([web.get("/rank", self._rank)])
        app.add_routes([web.get(path, self._read) for path in ("/", "/status.json", "/metrics")])
        app.on_startup.append(self._start)
        app.on_shutdown.append(self._stop)
        return app

    def status(self) -> dict[str, Any]:
        """What readers are shown."""
        now_s, meeting = time.monotonic(), self.session.meeting
        silent_s = {c.member.replica: now_s - c.heard_s for c in self._connections if c.member}
        return {
            "epoch": meeting.epoch,
            "round": meeting.round,
            "rule": str(meeting.rule),
            "expected": self.session.absent,
            **self.history.status(now_s, {r: s for r, s in silent_s.items() if s > 2 * self.serving.heartbeat_s}),
        }

    async def _read(self, request: web.Request) -> web.StreamResponse:
        return read(request.path, self.status())

    # ---- one rank

    async def _rank(self, request: web.Request) -> web.StreamResponse:
        from aiohttp import WSMsgType, web

        socket = web.WebSocketResponse(
            timeout=1.0, autoping=False, compress=False, max_msg_size=m.MOST_BYTES, writer_limit=2**40
        )
        try:
            await socket.prepare(request)
        except ConnectionError:  # it hung up at once
            return socket
        assert isinstance(request.transport, asyncio.Transport)
        connection = Connection(socket, request.transport, time.monotonic())
        self._connections.add(connection)
        try:
            async for said in socket:
                now_s = time.monotonic()
                if said.type is WSMsgType.TEXT:
                    self._hear(connection, said.data, now_s)
                elif said.type is WSMsgType.PING:
                    await socket.pong(said.data)
                elif said.type is not WSMsgType.PONG:
                    raise m.Malformed(f"messages are texts, not {said.type.name}")
                if connection.member is not None:  # who does not join is no better than silent
                    connection.heard_s = now_s
        except (m.Malformed, Refusal) as error:
            self._count_refused()
            with suppress(ConnectionError, RuntimeError):
                await socket.send_str(m.encode(m.Refused(str(error), final=True)))
        finally:
            self._connections.discard(connection)
            self._drop(connection, "its connection closed")
            await socket.close()
        return socket

    def _hear(self, connection: Connection, text: str, now_s: float) -> None:
        """Raises `Malformed` or `Refusal`."""
        member = connection.member
        if member is None:
            connection.member = member = self._join(m.decode(text, [m.Join]), now_s)
            self._tell(connection, m.Welcome(member.epoch, self.session.meeting.round))
        else:
            said: m.Arrive | m.Leave = m.decode(text, [m.Arrive, m.Leave])
            self.session.check(member, said)
            if said.ended is not None:
                self.history.ended(member.replica, said.ended)
            if isinstance(said, m.Arrive):
                self._arrive(connection, member, said, now_s)
            else:
                self.session.ended(member, said)
                self._drop(connection, "it left")
        self._wake.set()

    def _join(self, said: m.Join, now_s: float) -> Member:
        member = self.session.join(said, now_s)
        for other in [c for c in self._connections if c.member and c.member.replica == member.replica]:
            other.transport.abort()
        self.history.joined(member.replica, member.name, now_s)
        return member

    def _arrive(self, connection: Connection, member: Member, said: m.Arrive, now_s: float) -> None:
        lost = self.session.lost(said)
        known = self.session.arrive(member, said, now_s)
        if known is not None:
            self._tell(connection, known)
            return
        self.history.arrived(member.replica, said.version, said.step, now_s)
        for replica in lost:
            self.history.gone(replica, f"replica {member.replica} lost it in an exchange", now_s)
        self._tell_of_lost(lost)

    def _drop(self, connection: Connection, why: str) -> None:
        """A rank is no member any more, unless another connection has taken its place."""
        member, connection.member = connection.member, None
        if member is not None and self.session.members.get(member.replica) is member:
            self._lose(member.replica, why)

    def _lose(self, replica: int, why: str) -> None:
        self.session.gone(replica)
        self.history.gone(replica, why, time.monotonic())
        self._tell_of_lost([replica])
        self._wake.set()

    def _count_refused(self) -> None:
        self.history.num_refused += 1

    # ---- all ranks

    def _tell(self, connection: Connection, message: m.FromCoordinator) -> None:
        self._outbox.append((connection, m.encode(message)))

    def _tell_of_lost(self, replicas: list[int]) -> None:
        view = self.session.view
        gone = tuple(r for r in replicas if view and r in view.members and r not in self.session.done)
        if view is not None and gone:
            self._tell_all(set(view.members) - set(gone), m.Lost(view.round, gone))

    def _tell_all(self, replicas: set[int], message: m.FromCoordinator) -> None:
        text = m.encode(message)
        told = [c for c in self._connections if c.member is not None and c.member.replica in replicas]
        self._outbox += [(connection, text) for connection in told]

    async def _start(self, app: web.Application) -> None:
        self.tasks += [asyncio.create_task(self._decide()), asyncio.create_task(self._ping())]

    async def _stop(self, app: web.Application) -> None:
        """As a kill would: members stay in the state, and come back to the next coordinator on this address."""
        for task in self.tasks:
            task.cancel()
        for connection in list(self._connections):
            connection.transport.abort()
        self._file.close()

    async def _decide(self) -> None:
        """Decide what can be, whenever anything has come or a rule asked for it; save, then tell."""
        while True:
            self._wake.clear()
            decided = self._poll()
            if self.session.changed:
                self._file.save(self.session.state_dict())
                self.session.changed = False
            outbox, self._outbox = self._outbox, []
            for connection, text in outbox:
                await self._send(connection, text)
            wait_s = None if decided.until_s is None else max(0.0, decided.until_s - time.monotonic())
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), wait_s)
            await asyncio.sleep(_BATCH_S)

    def _poll(self) -> Wait:
        while True:
            now_s = time.monotonic()
            decided = self.session.poll(now_s)
            if isinstance(decided, Wait):
                return decided
            members = set(decided.members)
            self._tell_all(members, decided)
            curious = {r for r, member in self.session.members.items() if member.notices and r not in members}
            if curious:
                self._tell_all(curious, m.Without(decided.epoch, decided.round))
            self.history.decided(decided, self.session.meeting.present, now_s)

    async def _send(self, connection: Connection, text: str) -> None:
        """Never waits for a rank: one that does not read is cut off."""
        if connection.transport.get_write_buffer_size() > _MOST_UNSENT_BYTES:
            connection.transport.abort()
            return
        with suppress(ConnectionError):
            await connection.socket.send_str(text)

    async def _ping(self) -> None:
        """Ping ranks, and give up those who are silent for too long, or do not come back after a restart."""
        limits, pinged_s, looked_s = self.serving, 0.0, time.monotonic()
        pause_s = min(0.2, limits.heartbeat_s / 2)
        while True:
            await asyncio.sleep(pause_s)
            now_s = time.monotonic()
            own_pause_s, looked_s = now_s - looked_s - pause_s, now_s
            if own_pause_s > limits.heartbeat_s:  # this process itself was stopped, so nobody could be heard
                for connection in self._connections:
                    connection.heard_s += own_pause_s
            if is_due := now_s - pinged_s >= limits.heartbeat_s:
                pinged_s = now_s
            for connection in list(self._connections):
                if now_s - connection.heard_s > limits.dead_after_s:
                    self._drop(connection, f"no answer for {limits.dead_after_s:g} s: dead, stopped or cut off")
                    connection.transport.abort()
                elif is_due and now_s - connection.heard_s > limits.heartbeat_s / 2:
                    with suppress(ConnectionError):
                        await connection.socket.ping()
            if now_s > self._returned_s:
                for replica in self.session.absent:
                    self._lose(replica, "it did not come back after a restart of the coordinator")


def serve(serving: Serving) -> int:
    """Be the coordinator until a signal says to stop; returns that signal.

    Raises:
        ValueError: for a state, a secret or a certificate that cannot be used, or without aiohttp.
        OSError: when the address is taken.
    """
    return asyncio.run(_serve(Server(serving)))


async def _serve(server: Server) -> int:
    from aiohttp import web

    stopped: asyncio.Queue[int] = asyncio.Queue()
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, stopped.put_nowait, signum)
    gc.freeze()  # what torch brought along is looked through no more
    runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, server.serving.host, server.serving.port, ssl_context=server.tls)
        await site.start()
        host, port = runner.addresses[0][:2]
        place, s = f"{f'[{host}]' if ':' in host else host}:{port}", "s" if server.tls else ""
        print(
            f"coordinator at ws{s}://{place}, its page at http{s}://{place}/; epoch {server.session.meeting.epoch}, "
            f"{server.session.meeting.round} rounds decided",
            flush=True,
        )
        signalled = asyncio.create_task(stopped.get())
        done, _ = await asyncio.wait([signalled, *server.tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # the server's end only by an error, such as a full disk
        return signalled.result()
    finally:
        await runner.cleanup()
