"""A server of a run in a thread of the tests' own process, on a free port of loopback."""

import json
import logging
import threading
import time
from contextlib import contextmanager

import httpx
import uvicorn

from unolora.serving import server
from unolora.serving.logs import JsonFormatter
from unolora.serving.settings import ServeSettings


class Live:
    """What a test needs of it.

    Attributes:
        url: Where it listens.
        service: Its `Service`.
        client: An httpx client of it.
    """

    def __init__(self, app, server_, url) -> None:
        self.url, self.app, self.server, self.service = url, app, server_, app.state.service
        self.port = int(url.rpartition(":")[2])
        self.client = httpx.Client(base_url=url, timeout=30, trust_env=False)
        self.lines: list[dict] = []

    def predict(self, inputs, client=None, **more):
        body = {"inputs": [{"task": task, "text": text} for task, text in inputs], **more}
        return (client or self.client).post("/v1/predict", json=body)

    def metric(self, name, **labels):
        """The sum of a metric's samples with these labels."""
        page, total = self.client.get("/metrics").text, 0.0
        for line in page.splitlines():
            if line.startswith((f"{name} ", f"{name}{{")) and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rpartition(" ")[2])
        return total


class Lines(logging.Handler):
    """Keeps what the server logs, as JSON."""

    def __init__(self, into) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.into = into

    def emit(self, record):
        self.into.append(json.loads(self.format(record)))


@contextmanager
def live(run, hold=None, **settings):
    """Serve a loaded run.

    Args:
        run: The run.
        hold: Gets the service before the first request.
        **settings: Of the server.
    """
    chosen = ServeSettings(port=0, **settings)
    listener = server._bind(chosen)
    app = server.application(run, chosen)
    if hold is not None:
        hold(app.state.service)
    config = server._config(app, chosen)
    config.log_config = None
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, args=([listener],))
    scheme = "https" if chosen.tls_cert else "http"
    found = Live(app, running, f"{scheme}://127.0.0.1:{listener.getsockname()[1]}")
    logger, handler = logging.getLogger("unolora.serving"), Lines(found.lines)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    thread.start()
    try:
        while not running.started and thread.is_alive():
            time.sleep(0.005)
        yield found
    finally:
        found.client.close()
        running.should_exit = True
        thread.join(30)
        logger.removeHandler(handler)
        logger.setLevel(level)
        assert not thread.is_alive()
        assert not app.state.service.engine.alive
