"""What the routes share: the engine, the settings, and how a request's inputs become the engine's."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request

from unolora.atomic import write_text
from unolora.errors import InputError, unknown
from unolora.serving.auth import Keys
from unolora.serving.engine import Engine
from unolora.serving.engine_process import EngineProcess
from unolora.serving.logs import fields
from unolora.serving.metrics import Metrics
from unolora.serving.predictor import Input
from unolora.serving.problems import GoneError, ProblemError
from unolora.serving.settings import ServeSettings
from unolora.tasks import Task
from unolora.tasks.files import Table
from unolora.tasks.rows import fill

log = logging.getLogger("unolora.serving")
SIGN, FOLLOW = "reloaded", 0.5  # the file that says so, and the seconds between looks at it
Found = TypeVar("Found")


@dataclass
class Service:
    """A server's state.

    Args:
        engine: Answers.
        settings: What it was told.
        metrics: What it counts.
        keys: Who may ask; None for anybody.
        shared: Folder through which the workers of a server tell each other of a reload.
        version: How often the adapter was reloaded.
    """

    engine: Engine | EngineProcess
    settings: ServeSettings
    metrics: Metrics
    keys: Keys | None = None
    shared: Path | None = None
    version: int = 0
    _reloading: asyncio.Lock = field(default_factory=asyncio.Lock)
    _seen: str = ""

    def task(self, name: str) -> Task:
        """Return a task.

        Raises:
            InputError: There is none of that name.
        """
        tasks = self.engine.about.tasks
        if name not in tasks:
            raise unknown("task", name, tasks)
        return tasks[name]

    def check(self, inputs: Sequence[Input]) -> None:
        """Refuse too many inputs, or too long ones.

        Raises:
            InputError: With the limit.
        """
        if len(inputs) > self.settings.max_inputs:
            raise InputError(f"at most {self.settings.max_inputs} inputs in a request, got {len(inputs)}")
        for place, (_, texts) in enumerate(inputs):
            longest = max(map(len, [texts] if isinstance(texts, str) else texts), default=0)
            if longest > self.settings.max_characters:
                raise InputError(
                    f"input {place + 1}: at most {self.settings.max_characters} characters in a text, got {longest}"
                )

    def timeout(self, wanted: float | None) -> float:
        """Return the seconds in which a request must be answered."""
        return self.settings.timeout if wanted is None else min(wanted, self.settings.timeout)

    async def until_gone(self, request: Request, work: Coroutine[Any, Any, Found]) -> Found:
        """Await `work`, and cancel it if the client hangs up.

        Raises:
            GoneError: The client has hung up.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_hung_up(request))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise GoneError
        finally:
            task.cancel()
            gone.cancel()

    async def reload(self) -> None:
        """Read the run (and the keys) again; requests go on being answered, by the old adapter until the new is ready.

        The other workers of the server follow within about a second.

        Raises:
            ProblemError: Another reload is under way, or the run can't be used; the old adapter stays.
        """
        if self._reloading.locked():
            raise ProblemError(409, "reloading", "a reload is under way")
        async with self._reloading:
            try:
                await self._reload()
            except InputError as error:
                self.metrics.reloads.labels("failed").inc()
                raise ProblemError(409, "reload", f"the old adapter stays: {error}") from error
            self.version += 1
            if self.shared is not None:
                self._seen = uuid.uuid4().hex
                write_text(self.shared / SIGN, self._seen)
            self.metrics.reloads.labels("done").inc()
            log.info("the adapter was reloaded", extra=fields(version=self.version))

    async def follow(self) -> None:
        """Reload whenever another worker has, until cancelled."""
        assert self.shared is not None
        sign = self.shared / SIGN
        self._seen = sign.read_text() if sign.exists() else ""  # what was loaded at the start is new enough
        while True:
            await asyncio.sleep(FOLLOW)
            found = sign.read_text() if sign.exists() else ""
            if found != self._seen:
                self._seen = found
                async with self._reloading:
                    try:
                        await self._reload()
                    except InputError:
                        log.warning("another worker's reload can't be followed")
                    else:
                        self.version += 1

    async def _reload(self) -> None:
        keys = None if self.settings.keys is None else Keys.read(Path(self.settings.keys))
        await self.engine.areload()
        self.keys = keys


def filled(task: Task, columns: dict[str, Any]) -> tuple[str, ...]:
    """Fill a task's template.

    Raises:
        InputError: A column lacks, or is none of the task's.
    """
    for name in columns:
        if name not in task.columns:
            raise unknown("column", name, task.columns)
    return fill(task, Table(f"task {task.name!r}", {name: [value] for name, value in columns.items()}))[0]


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
