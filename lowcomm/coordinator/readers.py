"""What people and Prometheus may read: the page, its JSON, /metrics; and who may come in at all."""

from __future__ import annotations

import base64
import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowcomm.coordinator import metrics

if TYPE_CHECKING:
    from aiohttp import web

_PAGE = Path(__file__).with_name("page.html")
_SAFE = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def read(path: str, status: dict[str, Any]) -> web.Response:
    """The page, what it asks for, or metrics."""
    from aiohttp import web

    if path == "/metrics":
        kind = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=metrics.text(status).encode(), headers=kind | _SAFE)
    if path == "/status.json":
        return web.json_response(status, headers=_SAFE)
    return web.Response(text=_PAGE.read_text(encoding="utf-8"), content_type="text/html", headers=_SAFE)


@dataclass(frozen=True)
class Guard:
    """Lets in who knows the secret.

    Attributes:
        secret: None: everybody.
        refused: called when somebody is not let in.
    """

    secret: str | None
    refused: Callable[[], None]

    async def admit(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Answer the request, or with 401; 403 to a script of another site's page that plays a rank."""
        from aiohttp import web

        if not self._knows(request):
            self.refused()
            return web.Response(
                status=401,
                text="this coordinator has a secret; give it as ?token=, as a bearer token, or as the password\n",
                headers={"WWW-Authenticate": 'Basic realm="lowcomm", charset="UTF-8"', **_SAFE},
            )
        if request.path == "/rank" and "Origin" in request.headers:
            self.refused()
            return web.Response(status=403, text="this address is for ranks\n", headers=_SAFE)
        return await handler(request)

    def _knows(self, request: web.Request) -> bool:
        if self.secret is None:
            return True
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except ValueError:
                return False
        given = given if kind else request.query.get("token", "")
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.secret.encode())
