"""Doors with a guard on a SQLite file, and a provider that keeps its own books."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from llm_guard_mw import process
from llm_guard_mw.cli.demo.standin import StandIn, running
from llm_guard_mw.stores import sqlite
from tests.doors.django_doors import DJANGO_DOORS
from tests.doors.harness import API_KEY, CANARY, DOORS, Door


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def server() -> Iterator[tuple[StandIn, str]]:
    standin = StandIn()
    with running(standin) as url:
        yield standin, url


@pytest.fixture
def provider(server: tuple[StandIn, str]) -> StandIn:
    standin, _ = server
    standin.rows.clear()
    standin.arrived = 0
    return standin


@pytest.fixture
def url(server: tuple[StandIn, str]) -> str:
    return server[1]


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A configuration on a file of the test's own: `config(limits=[...], routes=[...])`."""
    where = f"sqlite:///{tmp_path / 'guard.db'}"

    def write(route: Mapping[str, Any] | None = None, **rest: Any) -> dict[str, Any]:
        chat = {"path": "/api/chat", "name": "chat", "feature": "chat", **(route or {})}
        identity = {"user": ["header:x-user-id"], "tenant": ["header:x-tenant-id"], "tier": ["header:x-plan"]}
        return {
            "store": where,
            "ledger": where,
            "identity": {**identity, "trusted_proxies": ["127.0.0.1"]},
            "routes": [chat],
            **rest,
        }

    return write


@pytest.fixture
def clean(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a test does: no prompt and no key in a log line, nor in any byte of the store and the books."""
    caplog.set_level(logging.DEBUG, logger="llm_guard")
    yield
    process.uninstall()
    logged = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("llm_guard"))
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in (CANARY, API_KEY):
        assert secret not in logged
        assert secret.encode() not in written


@pytest.fixture(params=[*DOORS, *DJANGO_DOORS], ids=lambda kind: kind.name)
def door(
    request: pytest.FixtureRequest, config: Callable[..., dict[str, Any]], provider: StandIn, url: str, clean: None
) -> Iterator[Callable[..., Door]]:
    """Open a door: `door({"/api/chat": [Ask()]}, limits=["$1/day per user"])`. After the scenario its books add up."""
    opened: list[Door] = []

    def open_door(handlers: Mapping[str, Any], **rest: Any) -> Door:
        opened.append(request.param(config(**rest), handlers, provider, url))
        return opened[-1]

    yield open_door
    try:
        for each in opened:
            each.check()
    finally:
        for each in opened:
            each.close()
        process.uninstall()


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], sqlite3.Connection]]:
    """Lock the store's file until a ROLLBACK, and let nobody wait for it for long."""
    monkeypatch.setattr(sqlite, "LOCK_WAIT_SECONDS", 0.05)
    opened: list[sqlite3.Connection] = []

    def lock() -> sqlite3.Connection:
        process.install().desk.store.now()  # the file is there
        other = sqlite3.connect(tmp_path / "guard.db", isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        opened.append(other)
        return other

    yield lock
    for other in opened:
        other.close()
