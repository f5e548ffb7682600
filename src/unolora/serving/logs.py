"""Logs as JSON lines, with request ids and without the users' texts.

An error's message may quote an input, so that of an exception its type and the lines of code are logged, no more.
"""

from __future__ import annotations

import json
import logging
import traceback
from datetime import UTC, datetime
from typing import Any

FIELDS = "unolora"
"""The attribute of a log record that holds more fields."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Spell a record."""
        found: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            kind, _, trace = record.exc_info
            lines = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(trace)]
            found |= {"error": kind.__name__, "at": lines}
        return json.dumps(found, ensure_ascii=False)


def fields(**found: Any) -> dict[str, Any]:
    """Give fields to a logging call: `log.info("event", extra=fields(...))`."""
    return {FIELDS: found}


def configuration() -> dict[str, Any]:
    """Return the logging configuration of a server: everything as JSON lines on standard error."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": "unolora.serving.logs.JsonFormatter"}},
        "handlers": {"lines": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stderr"}},
        "loggers": {
            "uvicorn": {"handlers": ["lines"], "level": "WARNING", "propagate": False},
            "unolora": {"handlers": ["lines"], "level": "INFO", "propagate": False},
        },
    }
