"""What stands before every route: who may ask, how much may be sent, and the headers that go with every answer."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from imglish.web.metrics import Metrics

LOG = logging.getLogger("imglish.web")
COOKIE = "imglish_session"
OPEN = ("/", "/app.js", "/app.css", "/healthz", "/v1/session")  # without a key: they hold nothing of the index
LOOPBACK = ("127.0.0.1", "::1", "localhost")
FORM = 2**16  # bytes of an upload beside the picture
SHORTEST_KEY = 16
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


@dataclass(frozen=True)
class Settings:
    """key: clients have to show it, None: none is needed; hosts: names in the ``Host`` header that are answered, None
    for all (a page of a stranger whose name is made to point to this machine has its own); upload: largest picture in
    bytes; pixels: largest picture; waiting: longest queue; batch: most first answers at once; rerank: pictures that
    are reranked where the client does not say."""

    key: str | None = None
    hosts: tuple[str, ...] | None = LOOPBACK
    upload: int = 20 * 2**20
    pixels: int = 50_000_000
    waiting: int = 64
    batch: int = 16
    rerank: int = 40

    def __post_init__(self) -> None:
        if self.key is not None and len(self.key) < SHORTEST_KEY:
            raise ValueError(f"an API key of {len(self.key)} characters: at least {SHORTEST_KEY} are needed")

    @property
    def session(self) -> str:
        """What the browser's cookie holds: it proves the key and does not tell it."""
        return hmac.new((self.key or "").encode(), b"imglish session", hashlib.sha256).hexdigest()


class Guard:
    """ASGI middleware: refuses strangers, cuts off long bodies, sets headers, counts answers, hides what went wrong."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                if "cache-control" not in headers:
                    headers["Cache-Control"] = "no-store"
                self.metrics.request(_route(scope), message["status"])
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await _refuse(answer, *refusal)
            return
        try:
            await self.app(scope, self._limited(receive), answer)
        except Exception:  # a mistake of ours: the client learns no more than that
            LOG.exception("%s %s failed", scope["method"], _route(scope))
            if started:
                raise
            await _refuse(answer, 500, "internal", "the server has made a mistake; its log says more")

    def _refusal(self, scope: Scope) -> tuple[int, str, str] | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.settings.hosts is not None and _name(host) not in self.settings.hosts:
            return 421, "host", "this server does not answer to that name; see --allow-host"
        origin = headers.get("origin")
        if origin is not None and origin.split("://", 1)[-1] != host:
            return 403, "origin", "requests from other sites are refused"
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and scope["path"] != "/":
            return 403, "origin", "requests from other sites are refused"
        if self.settings.key is not None and scope["path"] not in OPEN and not self._knows_key(headers):
            return 401, "key", "an API key is needed: Authorization: Bearer KEY"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.settings.upload + FORM:
            return 413, "too large", f"at most {self.settings.upload >> 20} MiB can be sent"
        return None

    def _knows_key(self, headers: Headers) -> bool:
        key = (self.settings.key or "").encode()
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        shown = bearer.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        if shown and hmac.compare_digest(shown.encode(), key):
            return True
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(cookie.value.encode(), self.settings.session.encode())

    def _limited(self, receive: Receive) -> Receive:
        """The body, counted while it comes, for clients that do not say or lie about how long it is."""
        left = self.settings.upload + FORM

        async def limited() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"at most {self.settings.upload >> 20} MiB can be sent")
            return message

        return limited


def _name(host: str) -> str:
    """The name in a ``Host`` header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _route(scope: Scope) -> str:
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else "other"


async def _refuse(send: Send, status: int, code: str, message: str) -> None:
    body = json.dumps({"error": {"code": code, "message": message}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
