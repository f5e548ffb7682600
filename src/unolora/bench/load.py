"""Load for a server, from a process of its own: `python load.py PORT CLIENTS REQUESTS < BODIES`.

Each client keeps one connection and asks again as soon as it is answered. Requests are written and answers read as
bytes, since a real HTTP client would cost more than the server does. Bodies come as JSON lines, taken in turn. The
file is run by its path and needs the standard library only: importing the package would take longer than a short load.
"""

from __future__ import annotations

import asyncio
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
    latencies: list[float] = []
    statuses: dict[str, int] = {}
    begin = time.perf_counter()
    await asyncio.gather(*(_client(port, turn, latencies, statuses) for _ in range(clients)))
    return {"seconds": time.perf_counter() - begin, "latencies": latencies, "statuses": statuses}


async def _client(port: int, turn: Iterator[bytes], latencies: list[float], statuses: dict[str, int]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for body in turn:
        begin = time.perf_counter()
        writer.write(HEAD.format(length=len(body)).encode() + body)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        await reader.readexactly(length)
        latencies.append(time.perf_counter() - begin)
        status = head.split(b" ", 2)[1].decode()
        statuses[status] = statuses.get(status, 0) + 1
    writer.close()
    await writer.wait_closed()


def main(arguments: Sequence[str]) -> int:
    """Run the load and print what came of it as JSON."""
    port, clients, requests = map(int, arguments)
    bodies = [line.rstrip(b"\n") for line in sys.stdin.buffer]
    json.dump(asyncio.run(load(port, bodies, clients=clients, requests=requests)), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
