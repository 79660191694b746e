"""A small HTTP load: N keep-alive connections that each send the next request when the answer is in.

Raw sockets on purpose: a full client would cost several times what the server under test does.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field


@dataclass
class Load:
    """What came back: answers by status, and how long they took."""

    statuses: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)

    @property
    def answers(self) -> int:
        return sum(self.statuses.values())

    @property
    def per_second(self) -> float:
        return self.answers / self.seconds


class _Client(asyncio.Protocol):
    def __init__(self, request: bytes, load: Load, until: float, done: asyncio.Event) -> None:
        self.request, self.load, self.until, self.done = request, load, until, done
        self.buffer = b""
        self.sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment] # uvloop's is none by class
        self._send()

    def _send(self) -> None:
        self.sent = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        start = head.lower().find(b"content-length:")
        length = int(head[start + 15 :].split(b"\r\n", 1)[0])
        if len(body) < length:
            return
        self.buffer = b""
        now = time.perf_counter()
        status = int(head[9:12])
        self.load.statuses[status] = self.load.statuses.get(status, 0) + 1
        self.load.latencies.append(now - self.sent)
        if now < self.until:
            self._send()
        else:
            self.done.set()
            self.transport.close()


async def _run(port: int, request: bytes, clients: int, seconds: float) -> Load:
    loop = asyncio.get_running_loop()
    load, begun = Load(), time.perf_counter()
    events = [asyncio.Event() for _ in range(clients)]
    for event in events:
        client = _Client(request, load, begun + seconds, event)
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)
    await asyncio.gather(*(event.wait() for event in events))
    load.seconds = time.perf_counter() - begun
    return load


def run(port: int, request: bytes, *, clients: int, seconds: float) -> Load:
    """Load the server on `port` with `clients` connections for about `seconds`."""
    try:
        import uvloop

        return uvloop.run(_run(port, request, clients, seconds))
    except ImportError:
        return asyncio.run(_run(port, request, clients, seconds))
