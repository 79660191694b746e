"""`worker` as a process of its own, beside guarded processes, on SQLite and on a real Valkey."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_guard_mw.ledger import Ledger, verify
from llm_guard_mw.stores import open_store
from llm_guard_mw.stores.protocol import ProcessStore
from llm_guard_mw.stores.sqlite import wall_clock_ms
from tests.ledger.bench import Bench
from tests.model import servers
from tests.model.world import Clock

ROOT = Path(__file__).parents[2]
COMMAND = "from llm_guard_mw.cli import app; app()"

#: An app without a door: its keeper is what drains.
APP = """
import sys
from llm_guard_mw import Guard
guard = Guard("llm_guard.toml")
print("up", flush=True)
for line in sys.stdin:
    with guard.as_user(user="ada"):
        pass
"""

Start = Callable[..., "subprocess.Popen[str]"]


def until(claim: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := claim()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)
    return found


@pytest.fixture(params=["sqlite", "valkey"])
def store_url(request: pytest.FixtureRequest, folder: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{folder}/guard.db"
    if reason := servers.missing(request.param):
        pytest.skip(reason)
    return servers.emptied(request.param).url


@pytest.fixture
def bench(folder: Path, store_url: str) -> Iterator[Bench]:
    """What a guarded process would write, and the books as everybody sees them."""
    books = f"sqlite:///{folder}/guard.db"
    config = f'store = "{store_url}"\nledger = "{books}"\nlease_seconds = 1\nlimits = ["$5/day per user"]\n'
    (folder / "llm_guard.toml").write_text(config)
    bench = Bench(Clock(wall_clock_ms()), open_store(store_url), Ledger(books))
    bench.ledger.migrate()
    yield bench
    bench.close()


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str, code: str = COMMAND) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def spend(bench: Bench, calls: int) -> None:
    for _ in range(calls):
        bench.exchange(at=bench.clock() * 1000)


def at_the_journal(store: ProcessStore) -> None:
    until(store.attended, "a worker says that it is there")


def test_a_worker_drains_and_ends_well_when_it_is_told_to(bench: Bench, start: Start) -> None:
    worker = start("worker", "--format", "json")
    at_the_journal(bench.store)
    spend(bench, 30)
    until(lambda: not bench.store.journal_length(), "it is drained")

    worker.send_signal(signal.SIGTERM)
    out, err = worker.communicate(timeout=30)

    assert worker.returncode == 0, err
    assert json.loads(out) == {"drained": 30, "abandoned": 0, "pruned": 0}
    lines = [json.loads(line) for line in err.splitlines()]
    assert [line["event"] for line in lines if line["event"].startswith("worker")] == [
        "worker_started",
        "worker_stopped",
    ]
    assert not bench.store.attended()
    assert verify(bench.store, bench.ledger).ok
    assert len(bench.rows("usage_events")) == 30


def test_an_interrupt_from_the_keyboard_ends_it_as_well(bench: Bench, start: Start) -> None:
    worker = start("worker")
    at_the_journal(bench.store)

    worker.send_signal(signal.SIGINT)
    out, _ = worker.communicate(timeout=30)

    assert (worker.returncode, out) == (0, "")


def test_a_worker_books_what_dead_processes_held(bench: Bench, start: Start) -> None:
    bench.store.reserve(short_lived())
    start("worker")

    until(lambda: [row["kind"] for row in bench.rows("usage_events")] == ["abandoned"], "it is swept")


def short_lived() -> Any:
    from tests.ledger.bench import demands
    from tests.model.world import offer, wish

    return wish("gone/0", offer(*demands(wall_clock_ms())), lease_ms=1)


def test_while_a_worker_lives_the_apps_leave_the_journal_to_it_and_take_over_when_it_is_killed(
    bench: Bench, start: Start
) -> None:
    worker = start("worker")
    at_the_journal(bench.store)
    app = start(code=APP)
    assert app.stdin is not None
    assert app.stdout is not None
    assert app.stdout.readline() == "up\n"
    worker.send_signal(signal.SIGSTOP)  # alive for as long as it has said
    spend(bench, 5)

    until(lambda: not bench.store.attended(), "its word has run out")
    worker.kill()

    began = time.monotonic()
    until(lambda: not bench.store.journal_length(), "the app drains")
    assert time.monotonic() - began < 15
    assert len([row for row in bench.rows("usage_events") if row["user"] == "alice"]) == 5


def test_two_workers_share_a_journal_and_a_killed_one_loses_nothing(bench: Bench, start: Start) -> None:
    doomed, heir = start("worker"), start("worker", "--format", "json")
    at_the_journal(bench.store)
    spend(bench, 50)
    doomed.kill()
    spend(bench, 50)

    until(lambda: not bench.store.journal_length(), "all of it is drained")

    heir.send_signal(signal.SIGTERM)
    heir.communicate(timeout=30)
    assert heir.returncode == 0
    assert verify(bench.store, bench.ledger).findings == ()
    (group,) = bench.rows("daily_usage")
    assert (len(bench.rows("usage_events")), group["calls"]) == (100, 100)


def test_a_configuration_that_cannot_be_right_ends_it(bench: Bench, folder: Path, start: Start) -> None:
    with (folder / "llm_guard.toml").open("a") as file:
        file.write("no_such_key = 1\n")

    worker = start("worker")
    _, err = worker.communicate(timeout=60)

    assert worker.returncode == 2
    assert "no_such_key" in err


def test_a_ledger_of_a_newer_version_ends_it(bench: Bench, start: Start) -> None:
    with bench.ledger.database.writing() as connection:
        connection.exec_driver_sql("UPDATE llm_guard_alembic_version SET version_num = '9999'")

    worker = start("worker")
    _, err = worker.communicate(timeout=60)

    assert worker.returncode == 2
    assert "has schema 9999" in err


def test_a_ledger_that_is_away_is_waited_for_and_the_apps_are_not_kept_from_it(
    bench: Bench, folder: Path, store_url: str, start: Start
) -> None:
    away = folder / "away"
    away.write_text("a file where a folder would have to be")
    (folder / "llm_guard.toml").write_text(f'store = "{store_url}"\nledger = "sqlite:///{away}/books.db"\n')
    spend(bench, 3)
    worker = start("worker")
    assert worker.stderr is not None
    until(lambda: "ledger_away" in worker.stderr.readline(), "it says that the ledger is away")
    until(lambda: not bench.store.attended(), "it is not at the journal")
    assert bench.store.journal_length() == 3

    away.unlink()

    until(lambda: not bench.store.journal_length(), "it has come back")
    assert worker.poll() is None
