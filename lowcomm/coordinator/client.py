"""What a rank uses to ask the coordinator: a connection that outlives a restart of either side.

A thread holds it, so that pings are answered while the rank computes. Whatever the rank waits for is asked again after
each reconnection; the coordinator knows what it has decided already.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from lowcomm.coordinator import messages as m
from lowcomm.optional import require
from lowcomm.participation.base import Arrival
from lowcomm.participation.meeting import View

if TYPE_CHECKING:
    from aiohttp import ClientSession, ClientWebSocketResponse

_RETRY_S, _HANDSHAKE_S, _HEARTBEAT_S = 0.1, 5.0, 5.0


class Expelled(ConnectionError):
    """The coordinator does not let this process take part any more; says why."""


@dataclass(frozen=True)
class Access:
    """How to reach a coordinator.

    Attributes:
        url: ws://host:port, or wss://host:port with TLS.
        secret: the word in its secret file.
        ca_file: the certificate to trust instead of the system's, such as one that signed itself.
        patience_s: for how long a rank waits for a coordinator that cannot be reached.
    """

    url: str
    secret: str | None = None
    ca_file: str | None = None
    patience_s: float = 60.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("ws", "wss") or not parts.hostname:
            raise ValueError(
                f"coordinator is {self.url!r}; give an address such as ws://host:29600, or wss:// with TLS"
            )

    def tls(self) -> ssl.SSLContext | bool:
        """The context of a client."""
        return ssl.create_default_context(cafile=self.ca_file) if self.ca_file else True


class Coordinator:
    """A replica's seat at the coordinator. One process of each replica has one; its methods are for one thread.

    Raises:
        ValueError: when it is refused: another config than the others', no secret.
        ConnectionError: when the coordinator cannot be reached.
    """

    def __init__(
        self, access: Access, replica: int, agree: Mapping[str, str], version: int = 0, notices: bool = False
    ) -> None:
        """
        Args:
            agree: digests, by name, of what must be equal on all replicas.
            version: the last round whose result it holds, after a resume.
            notices: whether `newest_round` is to count rounds decided without this replica at once.
        """
        require("aiohttp", "lowcomm[elastic]")
        self._access, self._changed = access, threading.Condition()
        self._join = m.Join(replica, secrets.token_hex(8), 0, version, dict(agree), socket.gethostname(), notices)
        self._seen = self._newest = 0
        self._asked: m.Arrive | None = None
        self._ended: m.Ended | None = None
        self._told: View | None = None
        self._lost: frozenset[int] = frozenset()
        self._is_in = self._is_over = False
        self._error: Exception | None = None
        self._socket: ClientWebSocketResponse | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="coordinator", daemon=True)
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._is_in or self._error)
            if isinstance(self._error, Expelled):
                raise ValueError(str(self._error))
            if self._error is not None:
                raise self._error

    # ---- what the rank calls

    def arrive(self, arrival: Arrival, broke: int = 0, lost: Sequence[int] = ()) -> View:
        """Be ready for a round, and block until it is decided; see `announce`."""
        self.announce(arrival, broke, lost)
        view = self.decision()
        assert view is not None, "it waits without a limit"
        return view

    def announce(self, arrival: Arrival, broke: int = 0, lost: Sequence[int] = ()) -> None:
        """Be ready for a round. Who goes on working may announce again: the newest counts.

        Args:
            arrival: its ``replica`` and ``at_s`` are the coordinator's to say.
            broke: the round whose exchange failed, when that has to be taken again.
            lost: replicas found gone in that exchange.
        """
        a = arrival
        with self._changed:
            said = m.Arrive(
                *(self._join.incarnation, 0, self._seen, a.version, a.step, float(a.tokens_done), float(a.seconds)),
                *(a.measured, broke, tuple(lost), self._ended),
            )
            self._asked, self._ended = said, None
        self._say(said)

    def decision(self, timeout_s: float | None = None) -> View | None:
        """The round that was announced for, once it is decided; None when that takes longer than the time-out.

        Raises:
            ConnectionError: when the coordinator is away for longer than patience allows, or expels this process.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._told or self._error, timeout_s)
            if self._told is None and self._error is not None:
                raise self._error
            view, self._told = self._told, None
        return view

    def ended(self, round: int, first_byte_s: float, done_s: float, num_bytes: int, loss: float | None = None) -> None:
        """Note how a round went that is committed; times count from its decision. It is told with the next arrival."""
        self._ended = m.Ended(round, first_byte_s, done_s, num_bytes, loss)

    @property
    def lost(self) -> frozenset[int]:
        """Members of the round that this replica is in of whom the coordinator knows that they are gone."""
        return self._lost

    @property
    def newest_round(self) -> int:
        """The newest round that it heard of; with `notices` also those decided without this replica."""
        return self._newest

    def leave(self) -> None:
        """End: nobody waits for this replica any more. The object is of no more use."""
        self._end(m.Leave(self._join.incarnation, 0, self._ended))

    def close(self) -> None:
        """End as a process that dies would."""
        self._end(None)

    # ---- what the thread does

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._stay())
        except Exception as error:  # whatever it is, the rank must not wait for ever
            self._fail(error)
        finally:
            self._loop.close()

    async def _stay(self) -> None:
        """Connect, and again after each loss, until it is over or patience ends."""
        from aiohttp import ClientConnectorCertificateError, ClientError, ClientSession, WSServerHandshakeError

        access, gone_s, cause = self._access, time.monotonic(), "it closed the connection"
        async with ClientSession() as session:
            while not self._is_over:
                try:
                    await self._converse(session)
                except (ClientConnectorCertificateError, m.Malformed) as error:
                    self._fail(Expelled(f"{access.url} is no coordinator to trust: {error}"))
                except WSServerHandshakeError as error:
                    cause = f"it answers {error.status}"
                    if error.status == 401:
                        self._fail(Expelled(f"the coordinator at {access.url} has a secret that is not the one given"))
                except (ClientError, OSError, TimeoutError) as error:
                    cause = str(error) or type(error).__name__
                gone_s = time.monotonic() if self._is_in else gone_s
                self._is_in, self._socket = False, None
                if time.monotonic() - gone_s > access.patience_s:
                    self._fail(
                        ConnectionError(
                            f"the coordinator at {access.url} could not be reached for {access.patience_s:g} s "
                            f"({cause}); start it on the same address and with the same --state"
                        )
                    )
                if not self._is_over:
                    await asyncio.sleep(_RETRY_S)

    async def _converse(self, session: ClientSession) -> None:
        """One connection, from joining to its end."""
        from aiohttp import WSMsgType

        access = self._access
        headers = {} if access.secret is None else {"Authorization": f"Bearer {access.secret}"}
        async with asyncio.timeout(_HANDSHAKE_S):
            heard = await session.ws_connect(
                f"{access.url.rstrip('/')}/rank",
                headers=headers,
                ssl=access.tls(),
                heartbeat=_HEARTBEAT_S,
                max_msg_size=0,
            )
        async with heard:
            with self._changed:
                held = self._asked.version if self._asked else max(self._seen, self._join.version)
                joining = replace(self._join, version=held)
            await heard.send_str(m.encode(joining))
            async for said in heard:
                if said.type is WSMsgType.TEXT:
                    message: m.FromCoordinator = m.decode(said.data, [m.Welcome, View, m.Without, m.Lost, m.Refused])
                    self._hear(message)
                    if isinstance(message, m.Welcome):
                        self._socket = heard
                        if self._asked is not None:
                            await self._send(self._asked)

    def _hear(self, said: m.FromCoordinator) -> None:
        if isinstance(said, m.Refused):
            self._fail(Expelled(f"the coordinator refuses this process: {said.reason}"))
        with self._changed:
            if isinstance(said, m.Welcome):
                self._is_in = True
            if isinstance(said, m.Welcome | m.Without | View):
                self._join = replace(self._join, epoch=max(said.epoch, self._join.epoch))
                self._newest = max(said.round, self._newest)
            if isinstance(said, View) and said.round > self._seen:
                self._told, self._seen, self._asked, self._lost = said, said.round, None, frozenset()
            if isinstance(said, m.Lost) and said.round == self._seen:
                self._lost |= set(said.replicas)
            self._changed.notify_all()

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error, self._is_over = self._error or error, True
            self._changed.notify_all()

    def _say(self, message: m.Arrive | m.Leave) -> None:
        """Send it if there is a connection; what waits for an answer is said again at the next."""
        with suppress(RuntimeError):  # the thread has ended
            asyncio.run_coroutine_threadsafe(self._send(message), self._loop)

    async def _send(self, message: m.Arrive | m.Leave) -> None:
        if self._socket is not None:
            with suppress(ConnectionError):
                await self._socket.send_str(m.encode(replace(message, epoch=self._join.epoch)))

    async def _finish(self, message: m.Leave | None) -> None:
        self._is_over = True
        if self._socket is not None:
            if message is not None:
                await self._send(message)
            await self._socket.close()

    def _end(self, message: m.Leave | None) -> None:
        with suppress(RuntimeError, TimeoutError):
            asyncio.run_coroutine_threadsafe(self._finish(message), self._loop).result(_HANDSHAKE_S)
        self._thread.join(_HANDSHAKE_S)
