"""An engine in a process of its own, for a server: HTTP then leaves the interpreter that drives the model alone.

    server's process                                      engine's process
    apredict ── number, inputs ────── a socket pair ───── Engine.submit
             ── number to cancel ──▶                      Future.cancel
    answer   ◀─ number, answers or error ──────────────── when the future is done
    observe  ◀─ each batch, in numbers

Messages are lines of JSON. In one process the two would take turns, since the model's thread needs the interpreter's
lock between any two operations. The engine's process ends when its socket does, so it never outlives the server;
signals it leaves to the server, which still wants answers when it is told to stop.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import logging.config
import multiprocessing
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unolora.errors import InputError
from unolora.runs import load_run
from unolora.serving.about import About
from unolora.serving.engine import (
    PREDICT,
    SCALES,
    WRITE,
    Batch,
    ClosedError,
    DeadlineError,
    Engine,
    EngineError,
    FailedError,
    QueueFullError,
    settle,
    too_late,
)
from unolora.serving.logs import configuration, fields
from unolora.serving.predictor import Input, Written

log = logging.getLogger("unolora.serving")
RAISED: dict[str, Callable[[Any], Exception]] = {
    each.__name__: each for each in (ClosedError, DeadlineError, EngineError, FailedError, InputError, QueueFullError)
}
GRACE = 10.0  # seconds for the process to end, once all is answered


class EngineProcess:
    """What a server asks instead of an `Engine`; all but `close` belongs to one event loop.

    Args:
        run: The run's folder.
        observe: Called after each batch.
        died: Called if the process ends though nobody asked it to; after that, nothing is answered.
        closing: Sockets that the process must not keep open, such as the one that the server listens on.
        **options: Of `Engine`.

    Raises:
        InputError: The run can't be used.
        EngineError: The process ended before it could say so.
    """

    def __init__(
        self,
        run: Path,
        *,
        observe: Callable[[Batch], None],
        died: Callable[[], None],
        closing: Sequence[socket.socket] = (),
        **options: Any,
    ) -> None:
        self._observe, self._died = observe, died
        self._numbers = itertools.count()
        self._asked: dict[int, tuple[asyncio.Future[Any], int]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = False
        self.lost = False
        """Whether the process ended though nobody asked it to."""
        ours, theirs = socket.socketpair()
        self._socket = ours
        self._process = _context().Process(
            target=_serve, args=(theirs, (ours, *closing), run, options), name="unolora-engine", daemon=True
        )
        self._process.start()
        theirs.close()
        try:
            self.about = self._told()
        except BaseException:  # also by Ctrl-C
            self.close(0)
            raise

    def _told(self) -> About:
        kind, found = next(_messages(self._socket), ("ended", {}))
        if kind == "refused":
            raise InputError(found)
        if kind != "about":
            raise EngineError("the engine's process ended; see above")
        return About.from_json(found)

    async def start(self) -> None:
        """Listen to the answers, in the running loop."""
        self._loop = asyncio.get_running_loop()
        self._transport, _ = await self._loop.create_connection(
            lambda: _Answers(self._take, self._lost), sock=self._socket
        )

    # --- asking ----------------------------------------------------------------------------------------------------

    async def apredict(
        self, inputs: Sequence[Input], *, timeout: float | None = None, wait: Literal[False] = False
    ) -> list[dict[str, Any]]:
        """Predict inputs of any tasks; see `Engine.apredict`."""
        found: list[dict[str, Any]] = await self._ask(PREDICT, inputs, None, timeout)
        return found

    async def agenerate(
        self,
        inputs: Sequence[Input],
        *,
        max_tokens: int = 16,
        timeout: float | None = None,
        wait: Literal[False] = False,
    ) -> list[Written]:
        """Let a language model write on from inputs of any tasks; see `Engine.agenerate`."""
        return [Written(**each) for each in await self._ask(WRITE, inputs, max_tokens, timeout)]

    async def ascales(
        self, inputs: Sequence[Input], *, timeout: float | None = None, wait: Literal[False] = False
    ) -> list[Tensor]:
        """Return s, by which each input's ranks are scaled, [P, R] each; see `Engine.ascales`."""
        return [torch.tensor(each) for each in await self._ask(SCALES, inputs, None, timeout)]

    async def areload(self) -> None:
        """Answer what comes from now on with what the run's folder holds now; see `Engine.areload`."""
        self.about = About.from_json(await self._send("reload", None, 0))

    async def _ask(self, kind: str, inputs: Sequence[Input], steps: int | None, timeout: float | None) -> Any:
        try:
            async with asyncio.timeout(timeout):
                return await self._send(kind, {"inputs": inputs, "max_tokens": steps}, len(inputs))
        except TimeoutError as error:
            raise too_late(error, timeout) from None

    async def _send(self, kind: str, what: Any, rows: int) -> Any:
        if not self.accepts or self._loop is None:
            raise ClosedError("the engine is closed")
        number, future = next(self._numbers), self._loop.create_future()
        self._asked[number] = future, rows
        self._transport.write(_line(kind, [number, what]))
        try:
            return await future
        finally:
            del self._asked[number]
            if future.cancelled() and not self.lost:  # nobody waits for the answer
                self._transport.write(_line("cancel", number))

    # --- state -----------------------------------------------------------------------------------------------------

    @property
    def unanswered(self) -> int:
        """Rows that wait or are being computed."""
        return sum(rows for _, rows in self._asked.values())

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.is_alive()

    @property
    def accepts(self) -> bool:
        """Whether new requests are taken."""
        return not self._closing  # nor once it is lost

    def close(self, timeout: float | None = None) -> bool:
        """Take nothing more, answer what was accepted, and end the process; called from any thread but the loop's.

        Args:
            timeout: Seconds to wait at most; what is left then is not answered.

        Returns:
            Whether all was answered.
        """
        self._closing = True
        if self._loop is not None and self._loop.is_running() and not self.lost:
            self._loop.call_soon_threadsafe(self._transport.write, _line("close", timeout))
            self._process.join(None if timeout is None else timeout + GRACE)
        else:
            self._socket.close()
        self._process.kill()
        self._process.join()
        return self._process.exitcode == 0

    # --- what comes back -------------------------------------------------------------------------------------------

    def _take(self, kind: str, what: Any) -> None:
        if kind == "batch":
            self._observe(Batch(**what))
            return
        number, answer = what
        future, _ = self._asked.get(number, (None, 0))
        if future is None or future.done():  # cancelled meanwhile
            return
        if kind == "answer":
            future.set_result(answer)
        else:
            name, argument = answer
            future.set_exception(RAISED[name](argument))

    def _lost(self) -> None:
        for future, _ in self._asked.values():
            if not future.done():
                future.set_exception(ClosedError("the engine's process has ended"))
        if not self._closing:
            self._closing = self.lost = True
            self._process.join(1)
            log.error("the engine's process has ended", extra=fields(code=self._process.exitcode))
            self._died()


class _Answers(asyncio.Protocol):
    """Cuts what comes into messages."""

    def __init__(self, take: Callable[[str, Any], None], lost: Callable[[], None]) -> None:
        self._take, self._lost, self._lines = take, lost, _Lines()

    def data_received(self, data: bytes) -> None:
        for kind, what in self._lines.add(data):
            self._take(kind, what)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost()


class _Lines:
    """Bytes as they come, and the messages that they make up."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def add(self, data: bytes) -> list[tuple[str, Any]]:
        self._rest += data
        if b"\n" not in data:
            return []
        *lines, self._rest = self._rest.split(b"\n")
        return [tuple(json.loads(line)) for line in lines]


def _messages(connection: socket.socket) -> Iterator[tuple[str, Any]]:
    lines = _Lines()
    while data := connection.recv(65_536):
        yield from lines.add(data)


def _line(kind: str, what: Any) -> bytes:
    return json.dumps([kind, what]).encode() + b"\n"


def _context() -> Any:
    """Choose how the process starts: as a copy of this one where nothing can come of it, which shares its memory.

    A copy has no other threads, and none of what they were about to do; nor can it use a GPU's driver.
    """
    plain = sys.platform == "linux" and torch.version.cuda is None and torch.version.hip is None
    return multiprocessing.get_context("fork" if plain and threading.active_count() == 1 else "spawn")


# --- in the engine's process -----------------------------------------------------------------------------------------


def _serve(connection: socket.socket, closing: Sequence[socket.socket], run: Path, options: dict[str, Any]) -> None:
    for each in closing:
        each.close()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.captureWarnings(True)
    logging.config.dictConfig(configuration())
    sending = threading.Lock()

    def send(kind: str, what: Any) -> None:
        with sending, suppress(ConnectionError):  # the server has gone, and this ends too
            connection.sendall(_line(kind, what))

    try:
        engine = Engine(load_run(run), observe=lambda batch: send("batch", asdict(batch)), **options)
    except InputError as error:
        send("refused", str(error))
        return
    settle()
    send("about", engine.about.to_json())
    sys.exit(0 if _answer_all(engine, connection, send) else 1)


def _answer_all(engine: Engine, connection: socket.socket, send: Callable[[str, Any], None]) -> bool:
    """Do what comes; return whether all was answered."""
    futures: dict[int, Future[Any]] = {}

    def answer(kind: str, number: int, future: Future[Any]) -> None:
        futures.pop(number, None)
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            send("answer", [number, [_SPELLED[kind](each) for each in future.result()]])
        else:
            send("error", [number, _spelled(error)])

    for kind, what in _messages(connection):
        if kind == "close":
            return engine.close(what)
        if kind == "cancel":
            if future := futures.get(what):
                future.cancel()
            continue
        number, asked = what
        if kind == "reload":
            threading.Thread(target=_reload, args=(engine, number, send), daemon=True).start()
            continue
        try:
            future = engine.submit(
                [tuple(each) for each in asked["inputs"]], max_tokens=asked["max_tokens"], scales=kind == SCALES
            )
        except Exception as error:  # the server must hear of any
            send("error", [number, _spelled(error)])
            if not engine.alive:
                return False
            continue
        futures[number] = future
        future.add_done_callback(partial(answer, kind, number))
    engine.close(0)
    return False


def _reload(engine: Engine, number: int, send: Callable[[str, Any], None]) -> None:
    try:
        engine.reload()
    except Exception as error:
        send("error", [number, _spelled(error)])
    else:
        send("answer", [number, engine.about.to_json()])


_SPELLED: dict[str, Callable[[Any], Any]] = {PREDICT: dict, WRITE: asdict, SCALES: Tensor.tolist}


def _spelled(error: BaseException) -> list[Any]:
    """Name an error, with what it is made of."""
    name = type(error).__name__
    if isinstance(error, QueueFullError):
        return [name, error.retry_after]
    if name in RAISED:
        return [name, str(error)]
    log.error("an error of the engine", exc_info=error)
    return [EngineError.__name__, f"an error of the engine ({name})"]
