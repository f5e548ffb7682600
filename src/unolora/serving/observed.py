"""Every request gets an id, a line in the log, a place in the metrics, and an answer even to an error of ours."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unolora.serving.logs import fields
from unolora.serving.metrics import Metrics
from unolora.serving.problems import problem

log = logging.getLogger("unolora.serving")
QUIET = {"/healthz", "/readyz", "/metrics"}  # asked all day long by machines
ITSELF = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
SWAGGER = f"{ITSELF}; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'"


class Observed:
    """The outermost layer.

    Args:
        app: What comes after.
        metrics: Counts.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and say what became of it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 0
        name = _request_id(Headers(scope=scope).get("x-request-id"))
        notes: dict[str, Any] = scope.setdefault("unolora", {})

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = name
                headers["x-content-type-options"] = "nosniff"
                headers["referrer-policy"] = "no-referrer"
                headers["content-security-policy"] = SWAGGER if scope["path"] == "/docs" else ITSELF
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception:
            log.exception("an error of the server", extra=fields(id=name))
            if not status:
                await problem(500, "internal", "an error of the server; its log knows more")(scope, receive, sending)
        finally:
            seconds, route = time.perf_counter() - begin, _route(scope)
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.request_seconds.labels(route).observe(seconds)
            if route not in QUIET:
                found = {"id": name, "method": scope["method"], "route": route, "status": status}
                log.info("request", extra=fields(**found, ms=round(1000 * seconds, 1), **notes))


def _request_id(given: str | None) -> str:
    """Take the client's, if it is short and plain."""
    return given if given and re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else uuid.uuid4().hex


def _route(scope: Scope) -> str:
    """Name the route, not the path, which anybody can make up."""
    return getattr(scope.get("route"), "path", None) or ("/static" if scope["path"].startswith("/static/") else "other")
