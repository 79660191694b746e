"""Start and stop the servers under test: uvicorn or gunicorn with one worker, and a Redis, each pinned to a core."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.model import servers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pin(core: int, pid: int = 0) -> None:
    """Keep a process (this one by default) on a core, where there is more than one and the system can."""
    if hasattr(os, "sched_setaffinity") and (os.cpu_count() or 1) > core:
        os.sched_setaffinity(pid, {core})


@contextmanager
def redis(leg: str | None = None, *, core: int) -> Iterator[servers.Server]:
    """A Redis on a free port: the leg asked for, or the first that this machine has."""
    if leg is None:
        leg = next(iter(redis_legs()), None)
    if leg is None:
        raise RuntimeError("; ".join(filter(None, map(servers.missing, servers.LEGS))))
    server = servers.Server(leg).start()
    assert server.process is not None
    pin(core, server.process.pid)
    try:
        yield server
    finally:
        server.stop()


def redis_legs() -> list[str]:
    return [leg for leg in servers.LEGS if servers.missing(leg) is None]


#: One worker each; the app is made by a factory.
_COMMANDS = {
    "uvicorn": "uvicorn {app} --factory --port {port} --log-level warning --no-access-log",
    "gunicorn": "gunicorn {app}() --bind 127.0.0.1:{port} -k gthread --threads 16 --keep-alive 30 --log-level warning"
    " --no-control-socket",
}


@contextmanager
def serving(
    app: str, *, core: int | None, cwd: str, env: dict[str, str] | None = None, server: str = "uvicorn"
) -> Iterator[Server]:
    """A uvicorn, or a gunicorn with threads, with `app`; ended by its process id."""
    port = free_port()
    command = [sys.executable, "-m", *_COMMANDS[server].format(app=app, port=port).split()]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    process = subprocess.Popen(command, cwd=cwd, env={**os.environ, "PYTHONPATH": root, **(env or {})})
    try:
        _wait_until_up(port, process)
        pid = process.pid if server == "uvicorn" else _worker_of(process.pid)
        if core is not None:
            pin(core, pid)
        yield Server(port, pid)
    finally:
        process.terminate()
        process.wait(20)


def _worker_of(master: int) -> int:
    """The process that does the work of a gunicorn, which listens before it has one."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with open(f"/proc/{master}/task/{master}/children") as children:
            if pids := children.read().split():
                return int(pids[0])
        time.sleep(0.05)
    raise RuntimeError("gunicorn started no worker")


class Server:
    def __init__(self, port: int, pid: int) -> None:
        self.port, self.pid = port, pid

    def cpu_seconds(self) -> float:
        """User and system time so far, of all its threads, in steps of a clock tick."""
        with open(f"/proc/{self.pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _wait_until_up(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError("the server did not come up")
