"""One queue for requests of all tasks, and one thread that runs the model on mixed-task batches.

    predict(inputs) ─┐                                   ┌─ batch of any tasks ─┐
    apredict(inputs) ┼─ rows, tokenized ── bounded queue ┤   (`batching.py`)    ├─ model ── answers, each to its caller
    submit(inputs) ──┘                                   └──────────────────────┘

Inputs are tokenized, and refused where they can't be used, in the caller's own thread. A row keeps the predictor that
it was accepted for, so that `replace` changes the adapter between batches and drops nothing. If a batch fails, its
halves are tried, until only the rows that fail alone are left: their callers get the error, the others an answer.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

from unolora.errors import InputError
from unolora.runs import Run, load_run
from unolora.scoring import Row
from unolora.serving.about import About
from unolora.serving.batching import Size, choose
from unolora.serving.predictor import Input, Predictor, Written

log = logging.getLogger(__name__)
PREDICT, WRITE, SCALES = "predict", "write", "scales"
MOST_CHARACTERS_ON_LOOP = 4096  # tokenized in about a millisecond; longer inputs go to a thread


class EngineError(RuntimeError):
    """The engine has no answer, though nothing is wrong with the input."""


class QueueFullError(EngineError):
    """The queue has no room.

    Attributes:
        retry_after: Seconds after which it is likely to have some.
    """

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after:.1f} s")
        self.retry_after = retry_after


class DeadlineError(EngineError, TimeoutError):
    """The answer did not come within the caller's `timeout`."""


class ClosedError(EngineError):
    """The engine was closed before the request came."""


class FailedError(EngineError):
    """The model failed on this input alone; the cause is its `__cause__`."""


@dataclass(frozen=True)
class Batch:
    """What an engine tells its observer after a forward; no texts."""

    kind: str
    tasks: list[str]
    """Of each row its task [B]."""
    waited: list[float]
    """Of each row the seconds from its coming to its answer [B]."""
    tokens: int
    """Tokens of the rows, padding not counted."""
    seconds: float
    failed: int


class _Request:
    """What one caller waits for: answers in the order of the inputs."""

    def __init__(self, count: int) -> None:
        self.future: Future[list[Any]] = Future()
        self.answers: list[Any] = [None] * count
        self.left = count
        if not count:
            self.future.set_result([])

    def settle(self, place: int, answer: Any) -> None:
        self.answers[place] = answer
        self.left -= 1
        if not self.left:
            with suppress(InvalidStateError):  # the caller has gone
                self.future.set_result(self.answers)

    def fail(self, error: Exception) -> None:
        with suppress(InvalidStateError):
            self.future.set_exception(error)


@dataclass(eq=False)
class _Item:
    """A row that waits."""

    request: _Request
    place: int
    predictor: Predictor
    kind: str
    row: Row
    size: Size
    deadline: float
    since: float = field(default_factory=time.monotonic)


class Engine:
    """Answers requests of all tasks of a run; any number of threads and coroutines may ask.

    Args:
        run: From `unolora.runs.load_run`.
        max_rows: Most rows of a batch.
        max_tokens: Most tokens of a batch, padding and tokens to be written among them.
        max_wait: Seconds that a row waits at most for others to share its batch, while the model has nothing to do.
        max_queue: Most rows that wait.
        observe: Called in the engine's thread after each batch.

    It is a context manager; leaving it answers what was accepted, and stops.
    """

    def __init__(
        self,
        run: Run,
        *,
        max_rows: int = 32,
        max_tokens: int = 8192,
        max_wait: float = 0.002,
        max_queue: int = 1024,
        observe: Callable[[Batch], None] | None = None,
    ) -> None:
        if min(max_rows, max_tokens, max_queue) < 1 or max_wait < 0:
            raise InputError("`max_rows`, `max_tokens` and `max_queue` must be at least 1, `max_wait` at least 0")
        self.max_rows, self.max_tokens, self.max_wait, self.max_queue = max_rows, max_tokens, max_wait, max_queue
        self._observe = observe
        self.predictor = Predictor(run)
        self.predictor.warm_up()
        self.overhead = self.predictor.overhead()
        self._waiting: list[_Item] = []
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # a row came, or the engine closes
        self._room = threading.Condition(self._lock)  # rows have left the queue
        self._running = 0  # rows of the forward of now
        self._closing = False
        self._rate = 0.0  # rows a second, lately
        self._thread = threading.Thread(target=self._work, name="unolora-engine", daemon=True)
        self._thread.start()

    # --- asking ----------------------------------------------------------------------------------------------------

    def predict(self, inputs: Sequence[Input], *, timeout: float | None = None) -> list[dict[str, Any]]:
        """Predict inputs of any tasks, and wait for the answers; while the queue is full, for room as well.

        Args:
            inputs: Of each the name of its task, and its text, or two texts for a task on pairs.
            timeout: Seconds to wait at most.

        Returns:
            In the order of the inputs, of each what `scoring.predict_texts` yields: `task` and `label` with
            `probabilities`, or `task` and `value`.

        Raises:
            InputError: A task is unknown, or a text can't be read; nothing was queued.
            DeadlineError: The answers did not come in time.
            ClosedError: The engine was closed.
            FailedError: The model failed on one of these inputs.
        """
        return self._wait(PREDICT, inputs, None, timeout)

    async def apredict(
        self, inputs: Sequence[Input], *, timeout: float | None = None, wait: bool = True
    ) -> list[dict[str, Any]]:
        """`predict` for coroutines; cancelling it takes the rows out of the queue.

        Args:
            inputs: See `predict`.
            timeout: See `predict`.
            wait: Whether to wait for room, or to raise `QueueFullError`.
        """
        return await self._await(PREDICT, inputs, None, timeout, wait)

    def generate(self, inputs: Sequence[Input], *, max_tokens: int = 16, timeout: float | None = None) -> list[Written]:
        """Let a language model write on from inputs of any tasks, greedily; see `predict`.

        Raises:
            InputError: The run has heads, or the backbone has no room for that many tokens.
        """
        return self._wait(WRITE, inputs, max_tokens, timeout)

    async def agenerate(
        self, inputs: Sequence[Input], *, max_tokens: int = 16, timeout: float | None = None, wait: bool = True
    ) -> list[Written]:
        """`generate` for coroutines; see `apredict`."""
        return await self._await(WRITE, inputs, max_tokens, timeout, wait)

    def scales(self, inputs: Sequence[Input], *, timeout: float | None = None) -> list[Any]:
        """Return s, by which each input's ranks are scaled, [P, R] each; see `predict`.

        Raises:
            InputError: The run's method has no scales.
        """
        return self._wait(SCALES, inputs, None, timeout)

    async def ascales(self, inputs: Sequence[Input], *, timeout: float | None = None, wait: bool = True) -> list[Any]:
        """`scales` for coroutines; see `apredict`."""
        return await self._await(SCALES, inputs, None, timeout, wait)

    def submit(
        self,
        inputs: Sequence[Input],
        *,
        max_tokens: int | None = None,
        scales: bool = False,
        timeout: float | None = None,
    ) -> Future[list[Any]]:
        """Queue inputs, all or none, and return at once.

        Args:
            inputs: See `predict`.
            max_tokens: Let the model write up to so many tokens, instead of predicting.
            scales: Return s, instead of predicting.
            timeout: Seconds after which the answer is no longer wanted.

        Returns:
            The answers to come. Cancelling it takes the rows out of the queue.

        Raises:
            QueueFullError: They don't all have room.
        """
        kind = SCALES if scales else PREDICT if max_tokens is None else WRITE
        items = self._items(kind, inputs, max_tokens, _deadline(timeout))
        if not items:
            return _Request(0).future
        self._admit(items, wait=False)
        return items[0].request.future

    # --- the adapter -----------------------------------------------------------------------------------------------

    def replace(self, run: Run) -> None:
        """Answer what comes from now on with another run; what was accepted before keeps the one it came for.

        Raises:
            InputError: The run gives no finite answers; the old one stays.
        """
        predictor = Predictor(run)
        predictor.warm_up()
        self.predictor = predictor

    def reload(self) -> None:
        """`replace` with what the run's folder holds now.

        Raises:
            InputError: The run can't be used; the old one stays.
        """
        try:
            self.replace(load_run(self.predictor.run.folder))
        except Exception as error:  # a broken file may raise anything
            log.warning("the adapter can't be reloaded", exc_info=error)
            raise InputError(str(error) if isinstance(error, InputError) else type(error).__name__) from error

    async def areload(self) -> None:
        """`reload` for coroutines."""
        await asyncio.to_thread(self.reload)

    # --- state -----------------------------------------------------------------------------------------------------

    @property
    def about(self) -> About:
        """The run that answers what comes now."""
        return self.predictor.about

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return len(self._waiting)

    @property
    def unanswered(self) -> int:
        """Rows in the queue, or being computed."""
        return len(self._waiting) + self._running

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    @property
    def accepts(self) -> bool:
        """Whether new requests are taken."""
        return self.alive and not self._closing

    def close(self, timeout: float | None = None) -> bool:
        """Take nothing more, answer what was accepted, and stop.

        Args:
            timeout: Seconds to wait at most; what is left then gets `ClosedError`.

        Returns:
            Whether all was answered.
        """
        with self._lock:
            self._closing = True
            self._changed.notify_all()
            self._room.notify_all()
        self._thread.join(timeout)
        return not self._give_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the caller's side -----------------------------------------------------------------------------------------

    def _wait(self, kind: str, inputs: Sequence[Input], steps: int | None, timeout: float | None) -> list[Any]:
        deadline = _deadline(timeout)
        items = self._items(kind, inputs, steps, deadline)
        if not items:
            return []
        future = items[0].request.future
        try:
            self._admit(items, wait=True)
            return future.result(None if timeout is None else max(0.0, deadline - time.monotonic()))
        except TimeoutError as error:
            raise too_late(error, timeout) from None
        finally:
            future.cancel()  # also by Ctrl-C: nobody waits for the rest

    async def _await(
        self, kind: str, inputs: Sequence[Input], steps: int | None, timeout: float | None, wait: bool
    ) -> list[Any]:
        deadline = _deadline(timeout)
        if sum(len(text) for _, texts in inputs for text in texts) <= MOST_CHARACTERS_ON_LOOP:
            items = self._items(kind, inputs, steps, deadline)
        else:
            items = await asyncio.to_thread(self._items, kind, inputs, steps, deadline)
        if not items:
            return []
        future = items[0].request.future
        try:
            if not self._admit_now(items):
                if not wait:
                    raise QueueFullError(self.retry_after())
                await asyncio.to_thread(self._admit, items, wait=True)
            async with asyncio.timeout(None if timeout is None else deadline - time.monotonic()):
                return await asyncio.wrap_future(future)
        except TimeoutError as error:
            raise too_late(error, timeout) from None
        finally:
            future.cancel()

    def _items(self, kind: str, inputs: Sequence[Input], steps: int | None, deadline: float) -> list[_Item]:
        predictor = self.predictor
        if kind == WRITE:
            if not predictor.writes:
                raise InputError("the run has heads, which write nothing; ask for predictions")
            if steps is None or steps < 1:
                raise InputError(f"`max_tokens` must be at least 1, got {steps}")
        if kind == SCALES and not predictor.has_scales:
            raise InputError("the run's method scales no ranks; UnoLoRA* (`conditioning: task` or `task+sample`) does")
        rows, request = predictor.rows(inputs), _Request(len(inputs))
        items = []
        for place, row in enumerate(rows):
            room = predictor.room(row) if kind == WRITE else None
            if room is not None and steps is not None and steps > room:
                raise InputError(
                    f"input {place + 1}: the backbone has room for {max(0, room)} tokens behind it, not {steps}; lower "
                    "`max_tokens` or shorten the input"
                )
            items.append(_Item(request, place, predictor, kind, row, predictor.size(row, steps or 1), deadline))
        if items:
            request.future.add_done_callback(lambda _: self._forget(request))
        return items

    def _admit_now(self, items: Sequence[_Item]) -> bool:
        """Queue them if they all have room."""
        with self._lock:
            self._check_open()
            if len(self._waiting) + len(items) > self.max_queue:
                return False
            if not items[0].request.future.done():
                self._waiting += items
            self._changed.notify()
            return True

    def _admit(self, items: Sequence[_Item], *, wait: bool) -> None:
        """Queue them: all at once or not at all, or, with `wait`, as there is room."""
        if self._admit_now(items):
            return
        if not wait:
            raise QueueFullError(self.retry_after())
        for item in items:
            with self._lock:
                while len(self._waiting) >= self.max_queue and not self._closing:
                    if item.request.future.done():
                        return
                    if not self._room.wait(None if item.deadline == float("inf") else item.deadline - time.monotonic()):
                        raise DeadlineError("no room in the queue came in time")
                self._check_open()
                if item.request.future.done():
                    return
                self._waiting.append(item)
                self._changed.notify()

    def _check_open(self) -> None:
        if self._closing or not self._thread.is_alive():
            raise ClosedError("the engine is closed")

    def retry_after(self) -> float:
        """Estimate when the queue will have been worked off, in seconds, 0.1 at least."""
        return max(0.1, len(self._waiting) / self._rate) if self._rate else 1.0

    def _forget(self, request: _Request) -> None:
        """Take the rows of a request that is answered, cancelled or late out of the queue."""
        if request.left:
            with self._lock:
                self._waiting = [item for item in self._waiting if item.request is not request]
                self._room.notify_all()

    # --- the engine's thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while items := self._next():
                begin, self._running = time.monotonic(), len(items)
                failed = self._run(items)
                self._running = 0
                self._report(items, begin, failed)
        finally:  # also if it dies of an error of its own: nobody must wait for ever
            self._closing = True
            self._give_up()

    def _report(self, items: Sequence[_Item], begin: float, failed: int) -> None:
        now = time.monotonic()
        rate = len(items) / max(now - begin, 1e-6)
        self._rate = 0.8 * self._rate + 0.2 * rate if self._rate else rate
        if self._observe is None:
            return
        tasks = [item.predictor.run.tasks[item.row[0]].name for item in items]
        waited = [now - item.since for item in items]
        try:
            tokens = sum(item.size.length for item in items)
            self._observe(Batch(items[0].kind, tasks, waited, tokens, now - begin, failed))
        except Exception:
            log.exception("the observer of the engine failed")

    def _give_up(self) -> int:
        """Fail what still waits; return how many rows that was."""
        with self._lock:
            left, self._waiting = self._waiting, []
        for item in left:
            item.request.fail(ClosedError("the engine was closed before the answer came"))
        return len(left)

    def _next(self) -> list[_Item]:
        """Wait for a batch; an empty one says that the engine is closed and has nothing left to do."""
        with self._lock:
            while True:
                self._expire()
                if not self._waiting:
                    if self._closing:
                        return []
                    self._changed.wait()
                    continue
                rest = self._waiting[0].since + self.max_wait - time.monotonic()
                if rest <= 0 or self._closing or len(self._waiting) >= self.max_rows:
                    return self._take()
                self._changed.wait(rest)

    def _expire(self) -> None:
        now = time.monotonic()
        late = {id(item.request): item.request for item in self._waiting if item.deadline < now}
        for request in late.values():
            request.fail(DeadlineError("the answer did not come in time"))

    def _take(self) -> list[_Item]:
        oldest = self._waiting[0]
        like = [item for item in self._waiting if item.kind == oldest.kind and item.predictor is oldest.predictor]
        sizes = [item.size for item in like]
        places = choose(sizes, max_rows=self.max_rows, max_tokens=self.max_tokens, overhead=self.overhead)
        taken = [like[place] for place in places]
        chosen = set(map(id, taken))
        self._waiting = [item for item in self._waiting if id(item) not in chosen]
        self._room.notify_all()
        return taken

    def _run(self, items: Sequence[_Item]) -> int:
        """Answer a batch; where it fails, its halves, so that only those who fail alone get the error.

        Returns:
            How many failed.
        """
        try:
            answers = _compute(items)
        except Exception as error:  # whatever a model may raise; the engine must go on
            if len(items) > 1:
                middle = len(items) // 2
                return self._run(items[:middle]) + self._run(items[middle:])
            log.error("the model failed on an input", exc_info=error)
            failed = FailedError("the model failed on this input")
            failed.__cause__ = error
            items[0].request.fail(failed)
            return 1
        for item, answer in zip(items, answers, strict=True):
            item.request.settle(item.place, answer)
        return 0


def _compute(items: Sequence[_Item]) -> Sequence[Any]:
    predictor, rows = items[0].predictor, [item.row for item in items]
    if items[0].kind == WRITE:
        return predictor.write(rows, [item.size.steps for item in items])
    return predictor.predict(rows) if items[0].kind == PREDICT else predictor.scales(rows)


def settle() -> None:
    """Keep the garbage collector away from what is there for as long as the process: libraries, above all.

    It would go through hundreds of thousands of objects every few hundred requests, and nothing is answered meanwhile.
    An adapter that is replaced goes all the same, since nothing refers to it any more.
    """
    gc.collect()
    gc.freeze()


def _deadline(timeout: float | None) -> float:
    return float("inf") if timeout is None else time.monotonic() + timeout


def too_late(error: TimeoutError, timeout: float | None) -> DeadlineError:
    """Say that the caller's time, in seconds, is over."""
    if isinstance(error, DeadlineError):
        return error
    return DeadlineError(f"the answer did not come within {timeout:g} s")
