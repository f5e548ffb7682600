"""Load for a server, from a process of its own: `python load.py PORT CLIENTS REQUESTS < BODIES`.

Each client keeps one connection and asks again as soon as it is answered. Requests are written and answers read as
bytes, since a real HTTP client would cost more than the server does. Bodies come as JSON lines, taken in turn. The
file is run by its path and needs the standard library only: importing the package would take longer than a short load.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

HEAD = (
    "POST /v1/predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
)


async def load(port: int, bodies: Sequence[bytes], *, clients: int, requests: int) -> dict[str, Any]:
    """Ask `requests` times, from `clients` connections.

    Args:
        port: On loopback.
        bodies: Of POST /v1/predict, taken in turn.
        clients: Connections, each with one request at a time.
        requests: How many in all.

    Returns:
        `seconds` in all, `latencies` in seconds, and the count of each of the `statuses`.
    """
    turn = itertools.islice(itertools.cycle(bodies), requests)
    loop = asyncio.get_running_loop()
    begin = time.perf_counter()
    made = [await loop.create_connection(lambda: _Client(turn), "127.0.0.1", port) for _ in range(clients)]
    found = [client for _, client in made]
    await asyncio.gather(*(client.done for client in found))
    seconds = time.perf_counter() - begin
    latencies = [latency for client in found for latency in client.latencies]
    statuses = collections.Counter(status for client in found for status in client.statuses)
    return {"seconds": seconds, "latencies": latencies, "statuses": dict(statuses)}


class _Client(asyncio.Protocol):
    """One connection: asks for the next body as soon as it is answered, until there is none."""

    def __init__(self, turn: Iterator[bytes]) -> None:
        self.turn, self.latencies, self.statuses = turn, list[float](), list[str]()
        self.done = asyncio.get_running_loop().create_future()
        self.begin: float | None = None  # of the request that is under way
        self.answer = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        body = next(self.turn, None)
        self.begin = None if body is None else time.perf_counter()
        if body is None:
            self.transport.close()
        else:
            self.transport.write(HEAD.format(length=len(body)).encode() + body)

    def data_received(self, data: bytes) -> None:
        self.answer += data
        assert self.begin is not None
        head, end, body = self.answer.partition(b"\r\n\r\n")
        if not end or len(body) < int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0]):
            return
        self.latencies.append(time.perf_counter() - self.begin)
        self.statuses.append(head.split(b" ", 2)[1].decode())
        self.answer = b""
        self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.begin is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(exc or ConnectionError("the server hung up"))


def main(arguments: Sequence[str]) -> int:
    """Run the load and print what came of it as JSON."""
    port, clients, requests = map(int, arguments)
    bodies = [line.rstrip(b"\n") for line in sys.stdin.buffer]
    json.dump(asyncio.run(load(port, bodies, clients=clients, requests=requests)), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
