"""Everything that goes wrong, as one kind of JSON: {"error": {"message", "type", "code", "param"}}, as OpenAI's."""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from unolora.errors import InputError
from unolora.serving.engine import ClosedError, DeadlineError, FailedError, QueueFullError


class Error(BaseModel):
    """What went wrong."""

    message: str
    type: str
    code: str | None = None
    param: str | None = None


class Problem(BaseModel):
    """The body of every answer that is none."""

    error: Error


class ProblemError(Exception):
    """A problem that a route found.

    Args:
        status: Of HTTP.
        code: One word for programs.
        message: One line for people.
        retry_after: Seconds, if trying again may help.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after

    def response(self) -> JSONResponse:
        """Spell it."""
        return problem(self.status, self.code, self.message, self.retry_after)


class GoneError(Exception):
    """The client has hung up."""


def problem(status: int, code: str, message: str, retry_after: float | None = None) -> JSONResponse:
    """Make the response to a problem."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    headers = {} if retry_after is None else {"retry-after": str(max(1, math.ceil(retry_after)))}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    body = {"error": {"message": message, "type": kind, "code": code, "param": None}}
    return JSONResponse(body, status, headers)


def described(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe problems for the OpenAPI document."""
    texts = {
        400: "No JSON, or another Host than this server's",
        401: "No key, or a wrong one",
        403: "The key may not do this",
        404: "No such thing",
        408: "The body did not arrive in time",
        409: "The adapter can't be reloaded; the old one stays",
        413: "The body is too large",
        422: "The input can't be used",
        429: "The queue is full, or the rate is exceeded; see Retry-After",
        500: "The model failed on this input",
        503: "The server is stopping",
        504: "The answer did not come in time",
    }
    return {status: {"model": Problem, "description": texts[status]} for status in statuses}


def add_handlers(app: FastAPI) -> None:
    """Answer every error of the library and the framework as a problem."""
    handlers: dict[type[Exception], Any] = {
        ProblemError: lambda error: error.response(),
        InputError: lambda error: problem(422, "invalid_input", str(error)),
        RequestValidationError: _invalid,
        HTTPException: _http,
        QueueFullError: lambda error: problem(429, "queue_full", str(error), error.retry_after),
        DeadlineError: lambda error: problem(504, "deadline", str(error)),
        ClosedError: lambda _: problem(503, "stopping", "the server is stopping", 1),
        FailedError: lambda error: problem(500, "failed", str(error)),
        GoneError: lambda _: problem(499, "gone", "the client has hung up"),
    }

    def handler(make: Any) -> Any:
        async def handle(request: Request, error: Exception) -> JSONResponse:
            return make(error)

        return handle

    for kind, make in handlers.items():
        app.add_exception_handler(kind, handler(make))


def _invalid(error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "json_invalid":
        return problem(400, "invalid_json", f"the body is not JSON: {first.get('ctx', {}).get('error', '')}")
    return problem(422, "invalid_request", f"{where}: {first['msg']}" if where else first["msg"])


def _http(error: HTTPException) -> JSONResponse:
    found = problem(error.status_code, "http", str(error.detail))
    found.headers.update(error.headers or {})
    return found
