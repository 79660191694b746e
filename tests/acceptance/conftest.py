"""Real processes: servers with their workers, a SQLite file, and a provider that keeps its own books."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from llm_guard_mw.cli.demo.standin import StandIn, running
from llm_guard_mw.ledger import Ledger, Verification, verify
from llm_guard_mw.stores import open_store
from tests.model import servers

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 30.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def provider() -> StandIn:
    return StandIn()


@pytest.fixture
def provider_url(provider: StandIn) -> Iterator[str]:
    with running(provider) as url:
        yield url


@dataclass
class Served:
    """An app and its server, and its books as another process sees them."""

    url: str
    database: str
    store: str
    process: subprocess.Popen[bytes]
    log: Path

    def verify(self) -> Verification:
        with self._books() as (store, ledger):
            return verify(store, ledger)

    def events(self) -> list[dict[str, Any]]:
        with self._books() as (store, ledger):
            ledger.drain_all(store)
            return sorted(ledger.events(), key=lambda row: (row["call_id"], row["attempt"], row["kind"]))

    def spent(self, subject: str) -> int:
        """What the balances of one subject have spent and hold."""
        with self._books() as (store, _):
            return sum(x.spent + x.held for x in store.balances("", 1000) if x.balance.startswith(f"{subject}|"))

    @contextlib.contextmanager
    def _books(self) -> Iterator[tuple[Any, Ledger]]:
        store, ledger = open_store(self.store), Ledger(self.database)
        try:
            yield store, ledger
        finally:
            ledger.close()
            store.close()


def until(claim: Callable[[], Any], what: str, seconds: float = DEADLINE_SECONDS) -> Any:
    """What `claim` gives once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := claim()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)
    return found


@pytest.fixture(params=["sqlite", "valkey"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the balances are; the books are in SQLite either way."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'guard.db'}"
    if reason := servers.missing(request.param):
        pytest.skip(reason)
    # What is proved here is no latency: a machine that is busy must not look like a Redis that is away.
    return f"{servers.emptied(request.param).url}?timeout=2"


#: How each server is started: `{port}` and `{workers}` are filled in. Those of WSGI serve `wsgi_app.py`.
SERVERS = {
    "uvicorn": "uvicorn tests.acceptance.app:app --port {port} --workers {workers} --log-level warning"
    " --no-proxy-headers",
    "gunicorn-sync": "gunicorn -k sync --bind 127.0.0.1:{port} --workers {workers} --no-control-socket"
    " --log-level warning tests.acceptance.wsgi_app:app",
    "gunicorn-gthread": "gunicorn -k gthread --threads 16 --bind 127.0.0.1:{port} --workers {workers}"
    " --no-control-socket --log-level warning tests.acceptance.wsgi_app:app",
    "gunicorn-gevent": "gunicorn -k gevent --bind 127.0.0.1:{port} --workers {workers} --no-control-socket"
    " --log-level warning tests.acceptance.wsgi_app:app",
    "waitress": "waitress --listen 127.0.0.1:{port} --threads 16 tests.acceptance.wsgi_app:app",
    "granian": "granian --interface wsgi --host 127.0.0.1 --port {port} --workers {workers} --blocking-threads 16"
    " --no-ws --log-level warning tests.acceptance.wsgi_app:app",
}


@pytest.fixture
def serve(tmp_path: Path, provider_url: str, store_url: str) -> Iterator[Callable[..., Served]]:
    """Serve an app with this configuration by so many workers: `serve(3, limits=[...], server="granian")`."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(workers: int, *more: str, server: str = "uvicorn", **config: str) -> Served:
        database = f"sqlite:///{tmp_path / 'guard.db'}"
        lines = [
            f'store = "{store_url}"',
            f'ledger = "{database}"',
            *(f"{key} = {text}" for key, text in config.items()),
        ]
        lines += ["[identity]", 'user = ["header:x-user-id"]', 'tenant = ["header:x-tenant-id"]']
        lines += ['trusted_proxies = ["127.0.0.1"]']
        for name in ("chat", "stream"):
            lines += ["[[routes]]", f'path = "/api/{name}"', f'name = "{name}"', f'feature = "{name}"']
        path = tmp_path / "llm_guard.toml"
        path.write_text("\n".join(lines) + "\n")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        log = tmp_path / f"{server}.log"
        command = SERVERS[server].format(port=port, workers=workers).split()
        environment = {**os.environ, "LLM_GUARD_CONFIG": str(path), "PROVIDER_URL": provider_url}
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *command, *more],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,  # so that all its workers can be ended, and nobody else
            )
        processes.append(process)
        served = Served(f"http://127.0.0.1:{port}", database, store_url, process, log)
        until(lambda: len(_workers(served)) == workers, "all workers answer")
        return served

    yield start
    for process in processes:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def _workers(served: Served) -> set[int]:
    """The workers that answer, as far as a few connections show."""
    pids = set()
    for _ in range(24):
        with contextlib.suppress(httpx2.TransportError):
            pids.add(json.loads(httpx2.get(f"{served.url}/ready").content)["pid"])
    return pids


@pytest.fixture
def figures(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Print past pytest's capture: these are the numbers that the issue asks for."""

    def tell(title: str, **numbers: object) -> None:
        with capsys.disabled():
            print(f"\n{title}: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in numbers.items()))

    return tell
