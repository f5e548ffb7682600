"""What stands before the routes: who may ask, how often, and how much; each refusal costs next to nothing."""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unolora.serving.auth import Caller, Keys
from unolora.serving.metrics import Metrics
from unolora.serving.problems import problem
from unolora.serving.settings import ServeSettings

ADMIN = ("/v1/reload",)
LINGER = 1.0  # seconds in which the body of a refused request is read and thrown away, so that its sender sees why
WRONG_KEYS = (0.5, 20.0)  # of one address: a second, at once


class Buckets:
    """A token bucket for each name; the longest unused are forgotten.

    Args:
        rate: Tokens a second.
        burst: Most tokens.
        size: Most names.
    """

    def __init__(self, rate: float, burst: float, size: int = 10_000) -> None:
        self.rate, self.burst, self.size = rate, burst, size
        self._found: OrderedDict[str, tuple[float, float]] = OrderedDict()  # name -> tokens, and when

    def __len__(self) -> int:
        return len(self._found)

    def take(self, name: str, now: float | None = None) -> float:
        """Take a token.

        Returns:
            0, or, when there is none, the seconds until there is one.
        """
        now = time.monotonic() if now is None else now
        tokens, before = self._found.pop(name, (self.burst, now))
        tokens = min(self.burst, tokens + (now - before) * self.rate)
        enough = tokens >= 1
        self._found[name] = (tokens - 1 if enough else tokens, now)
        while len(self._found) > self.size:
            self._found.popitem(last=False)
        return 0.0 if enough else (1 - tokens) / self.rate


class Guard:
    """Refuses a Host that is not this server's, a wrong key, and a caller that asks too often.

    A page on the network may point a name of its own at a loopback address; hence the look at Host.

    Args:
        app: What comes after.
        settings: The server's.
        keys: Gives the keys of now, or None where anybody may ask.
        metrics: Counts refusals.
    """

    def __init__(
        self, app: ASGIApp, settings: ServeSettings, keys: Callable[[], Keys | None], metrics: Metrics
    ) -> None:
        self.app, self._keys, self._metrics = app, keys, metrics
        self._hosts = {"localhost", "127.0.0.1", "[::1]", settings.host} if settings.loopback else None
        self._rates = Buckets(settings.rate, 2 * settings.rate + 1) if settings.rate else None
        self._wrong = Buckets(*WRONG_KEYS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] == "http":
            refusal = self._refusal(scope)
            if refusal is not None:
                reason, response = refusal
                self._metrics.refused.labels(reason).inc()
                await refuse(response, scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[str, Response] | None:
        headers, path = Headers(scope=scope), scope["path"]
        if self._hosts is not None and _hostname(headers.get("host", "")) not in self._hosts:
            return "host", problem(400, "host", "this server does not go by that Host; ask for localhost")
        if not (path.startswith("/v1/") or path == "/metrics"):
            return None
        address, keys, caller = (scope.get("client") or ("", 0))[0], self._keys(), None
        if keys is not None:
            key = _bearer(headers)
            caller = keys.find(key)
            if caller is None:
                if key and (wait := self._wrong.take(address)):
                    return "key", problem(429, "wrong_keys", "too many wrong keys from this address", wait)
                return "key", problem(401, "key", "a valid key is needed: send it as `Authorization: Bearer KEY`")
            scope.setdefault("unolora", {})["caller"] = caller.name
        if path in ADMIN and not (caller and caller.admin):
            return "admin", problem(403, "admin", "this needs the key of an admin")
        if self._rates is not None and (wait := self._rates.take(_named(caller, address))):
            return "rate", problem(429, "rate", "too many requests", wait)
        return None


class Body:
    """Reads a request's body before anything else sees it: at most so many bytes, in at most so many seconds.

    Args:
        app: What comes after.
        settings: The server's.
        metrics: Counts refusals.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics) -> None:
        self.app, self._metrics = app, metrics
        self._most, self._seconds = settings.max_body, settings.receive_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body and hand it on, or refuse it."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        try:
            if int(Headers(scope=scope).get("content-length", "0")) > self._most:
                raise _TooLargeError
            async with asyncio.timeout(self._seconds):
                body = await self._read(receive)
        except _TooLargeError:
            self._metrics.refused.labels("size").inc()
            text = f"the body is larger than {self._most} bytes"
            await refuse(problem(413, "too_large", text), scope, receive, send)
            return
        except TimeoutError:
            self._metrics.refused.labels("slow").inc()
            response = problem(408, "slow", f"the body did not arrive within {self._seconds:g} s")
            response.headers["connection"] = "close"
            await response(scope, receive, send)
            return
        if body is None:
            return
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        await self.app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | None:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._most:
                raise _TooLargeError
            if not message.get("more_body"):
                return bytes(body)


class _TooLargeError(Exception):
    pass


async def refuse(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer without having read the body: throw away what comes soon, and close the connection on more."""
    try:
        async with asyncio.timeout(LINGER):
            while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                pass
    except TimeoutError:
        response.headers["connection"] = "close"
    await response(scope, receive, send)


def _hostname(host: str) -> str:
    """Take the port off; what is no host and port gives nothing."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\[\]]+)(:\d+)?", host)
    return match[1].lower() if match else ""


def _bearer(headers: Headers) -> str:
    kind, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


def _named(caller: Caller | None, address: str) -> str:
    return f"key {caller.name}" if caller else f"address {address}"
