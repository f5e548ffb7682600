"""What Prometheus reads: the queue, the batches, and the latency of each task."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from unolora.serving.engine import Batch

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHARED = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable that makes several processes count together; prometheus-client reads it when imported."""


class Metrics:
    """The numbers of one server. Labels are names of tasks and routes, never what a client chose."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter("unolora_requests", "Requests answered.", ["route", "status"], **own)
        self.request_seconds = Histogram(
            "unolora_request_seconds", "From a request's head to its answer.", ["route"], buckets=SECONDS, **own
        )
        self.refused = Counter("unolora_refused", "Requests refused before they were read.", ["reason"], **own)
        self.answers = Counter("unolora_answers", "Rows answered.", ["task", "kind"], **own)
        self.failures = Counter("unolora_failures", "Rows that the model failed on.", **own)
        self.task_seconds = Histogram(
            "unolora_task_seconds", "From a row's coming to its answer.", ["task"], buckets=SECONDS, **own
        )
        self.batch_rows = Histogram("unolora_batch_rows", "Rows of a batch.", buckets=ROWS, **own)
        self.batch_tasks = Histogram("unolora_batch_tasks", "Different tasks in a batch.", buckets=ROWS, **own)
        self.batch_tokens = Counter("unolora_batch_tokens", "Tokens read, padding not counted.", **own)
        self.batch_seconds = Histogram("unolora_batch_seconds", "Time of a forward.", buckets=SECONDS, **own)
        self.reloads = Counter("unolora_reloads", "Reloads of the adapter.", ["result"], **own)
        self.queue_rows = Gauge(
            "unolora_queue_rows", "Rows that wait or are being computed.", multiprocess_mode="livesum", **own
        )

    def watch_queue(self, unanswered: Callable[[], int]) -> None:
        """Say where the length of the queue is to be read."""
        if SHARED not in os.environ:  # several processes sum what each has set last
            self.queue_rows.set_function(unanswered)

    def observe(self, batch: Batch, unanswered: int) -> None:
        """Count a batch; an engine calls this.

        Args:
            batch: The batch.
            unanswered: Rows that have no answer yet.
        """
        self.queue_rows.set(unanswered)
        for task, seconds in zip(batch.tasks, batch.waited, strict=True):
            self.answers.labels(task, batch.kind).inc()
            self.task_seconds.labels(task).observe(seconds)
        self.failures.inc(batch.failed)
        self.batch_rows.observe(len(batch.tasks))
        self.batch_tasks.observe(len(set(batch.tasks)))
        self.batch_tokens.inc(batch.tokens)
        self.batch_seconds.observe(batch.seconds)

    def page(self) -> bytes:
        """Return all numbers in Prometheus' text format; of all workers where there are several."""
        if SHARED not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)
