"""A TCP proxy that does what networks do: it loses replies, waits, resets, falls silent, or is not there.

It stands between a store and a real server and looks only at whether a piece of traffic carries a script, so that
"every third reply" means replies to what moves money.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
import time
from dataclasses import dataclass, field

#: close() sends RST instead of FIN.
_ABRUPTLY = struct.pack("ii", 1, 0)


@dataclass
class Faults:
    """What is wrong at the moment; a test changes it as it goes on."""

    lose_every: int = 0  # of the replies to scripts: executed, then the link is reset instead of the reply
    silent: bool = False  # replies vanish, the link stays up
    delay: float = 0.0  # seconds before each reply
    replace: tuple[bytes, bytes] | None = None  # in replies; of the same length


@dataclass
class FaultyProxy:
    """`with FaultyProxy(port) as proxy:` and connect to `proxy.port`."""

    server_port: int
    faults: Faults = field(default_factory=Faults)
    writes: int = 0  # pieces that came from clients, as they came
    lost: int = 0
    links: int = 0  # connections there ever were
    _pairs: list[tuple[socket.socket, socket.socket]] = field(default_factory=list)
    _scripts: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> FaultyProxy:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open = True
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset()
        for thread in self._threads:
            thread.join(timeout=5)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def reset(self) -> None:
        """Cut all connections there are."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            _cut(*pair)

    def _accept(self) -> None:
        while self._open:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.server_port))
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = _Link(client, server)
            with self._lock:
                self.links += 1
                self._pairs.append((client, server))
            for pump in (self._to_server, self._to_client):
                thread = threading.Thread(target=pump, args=(link,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _to_server(self, link: _Link) -> None:
        with contextlib.suppress(OSError):
            while data := link.client.recv(1 << 20):
                self.writes += 1
                if b"EVALSHA" in data:
                    link.script_under_way = True
                link.server.sendall(data)
        _cut(link.client, link.server)

    def _to_client(self, link: _Link) -> None:
        with contextlib.suppress(OSError):
            while data := link.server.recv(1 << 20):
                faults = self.faults
                if faults.delay:
                    time.sleep(faults.delay)
                if faults.silent:
                    continue
                if link.script_under_way:
                    link.script_under_way = False
                    if faults.lose_every and next(self._scripts) % faults.lose_every == 0:
                        self.lost += 1
                        break
                if faults.replace is not None:
                    data = data.replace(*faults.replace)
                link.client.sendall(data)
        _cut(link.client, link.server)


@dataclass
class _Link:
    client: socket.socket
    server: socket.socket
    script_under_way: bool = False


def _cut(*ends: socket.socket) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABRUPTLY)
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
