"""The process, or processes, that listen: uvicorn, one worker or several, stopped gracefully."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import ssl
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.supervisors import Multiprocess

from unolora.errors import InputError
from unolora.runs import Run, load_run
from unolora.serving.app import create_app
from unolora.serving.auth import Keys
from unolora.serving.engine import Engine, settle
from unolora.serving.engine_process import EngineProcess
from unolora.serving.logs import configuration
from unolora.serving.metrics import SHARED, Metrics
from unolora.serving.service import Service
from unolora.serving.settings import ServeSettings

LONGEST_HEAD = 65_536  # bytes
SHAPES_KEPT = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
"""The environment variable that says how many operations oneDNN keeps ready, one for each shape of a batch: 1024 by
itself, which makes the memory grow for tens of thousands of requests."""
TOLD = "UNOLORA_SERVE"
"""The environment variable from which workers learn what to serve."""


class Impatient(HttpToolsProtocol):
    """HTTP over a connection that is closed when a request's head takes too long to come, or is too long.

    uvicorn's own timer runs between requests only, and a byte stops it; a head it collects without an end.
    """

    _head: asyncio.TimerHandle | None = None
    _length = 0

    def connection_made(self, transport: Any) -> None:
        """Start to wait for the first head."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes in; those of a head are due."""
        before = self.cycle
        if self._head is None and (before is None or before.response_complete):
            self._expect_head()
        super().data_received(data)
        if self.cycle is not before:
            self._forget_head()
        elif self._head is not None:
            self._length += len(data)
            if self._length > LONGEST_HEAD:
                self.send_400_response("the head of the request is too long")

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._forget_head()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._head = self.loop.call_later(self.timeout_keep_alive, self.transport.close)

    def _forget_head(self) -> None:
        self._length = 0
        if self._head is not None:
            self._head.cancel()
            self._head = None


def serve(run: Path, settings: ServeSettings, listening: Callable[[str], None]) -> None:
    """Serve a run until the process is told to stop; what was accepted by then is answered.

    Args:
        run: A run's folder.
        settings: The server's.
        listening: Called with the server's URL when the run is loaded.

    Raises:
        InputError: The run, the keys or the certificate can't be used, or the port is taken.
    """
    with _bind(settings) as listener:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        url = f"{'https' if settings.tls_cert else 'http'}://{host}:{listener.getsockname()[1]}"
        os.environ.setdefault(SHAPES_KEPT, "64")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again once it has stopped
        if settings.workers == 1:
            _serve_apart(run, settings, listener, lambda: listening(url))
            return
        _read_keys(settings)
        load_run(run)  # so that what is wrong with it is said once, and not by each worker for ever
        with tempfile.TemporaryDirectory(prefix="unolora-serve-") as shared:
            os.environ[SHARED] = shared
            os.environ[TOLD] = json.dumps({"run": str(run.resolve()), "settings": asdict(settings)})
            config = _config("unolora.serving.server:worker", settings)
            listening(url)
            Multiprocess(config, [listener]).run()


def _serve_apart(run: Path, settings: ServeSettings, listener: socket.socket, listening: Callable[[], None]) -> None:
    """Serve with the engine in a process of its own."""
    settle()  # also of the process that is a copy of this one
    metrics, keys = Metrics(), _read_keys(settings)

    def died() -> None:
        server.should_exit = True

    engine = EngineProcess(
        run,
        observe=lambda batch: metrics.observe(batch, engine.unanswered),
        died=died,
        closing=[listener],
        **_options(settings),
    )
    try:
        server = uvicorn.Server(_config(create_app(Service(engine, settings, metrics, keys)), settings))
        settle()
        listening()
        server.run([listener])
    finally:
        engine.close(0)
    if engine.lost:
        sys.exit(1)  # so that whoever keeps the server up starts another


def application(run: Run, settings: ServeSettings, shared: Path | None = None) -> FastAPI:
    """Build the engine and the application around it, in this process.

    Args:
        run: From `load_run`.
        settings: The server's.
        shared: Folder through which workers tell each other of a reload.
    """
    metrics = Metrics()
    engine = Engine(run, observe=lambda batch: metrics.observe(batch, engine.unanswered), **_options(settings))
    return create_app(Service(engine, settings, metrics, _read_keys(settings), shared))


def worker() -> FastAPI:
    """Build the application of one worker among several; uvicorn calls this in each."""
    logging.captureWarnings(True)
    told = json.loads(os.environ[TOLD])
    settings = ServeSettings(**{**told["settings"], "cors": tuple(told["settings"]["cors"])})
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.workers))
    app = application(load_run(told["run"]), settings, Path(os.environ[SHARED]))
    settle()
    return app


def _options(settings: ServeSettings) -> dict[str, Any]:
    return {
        "max_rows": settings.max_batch,
        "max_tokens": settings.max_batch_tokens,
        "max_wait": settings.max_wait_ms / 1000,
        "max_queue": settings.max_queue,
    }


def _config(app: Any, settings: ServeSettings) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        factory=isinstance(app, str),
        http=Impatient,
        ws="none",
        workers=settings.workers,
        log_config=configuration(),
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=settings.receive_timeout,  # type: ignore[arg-type]  # seconds; fractions do no harm
        timeout_graceful_shutdown=settings.shutdown_timeout,  # type: ignore[arg-type]
        timeout_worker_healthcheck=30,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )
    if settings.tls_cert:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_cert, settings.tls_key)
        except (ssl.SSLError, OSError) as error:
            raise InputError(f"{settings.tls_cert}: no certificate that goes with its key ({error})") from error
    return config


def _read_keys(settings: ServeSettings) -> Keys | None:
    return None if settings.keys is None else Keys.read(Path(settings.keys))


def _bind(settings: ServeSettings) -> socket.socket:
    found = None
    try:
        ((family, kind, protocol, _, address), *_) = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        if found is not None:
            found.close()
        reason = error.strerror or error
        raise InputError(
            f"can't listen on {settings.host}:{settings.port} ({reason}); choose another --port"
        ) from error
    found.set_inheritable(True)
    return found
