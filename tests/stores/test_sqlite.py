"""The SQLite store as a process uses it: turns of an event loop, other processes' locks, order, the journal's bound."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_guard_mw.errors import ConfigError, StoreUnavailable
from llm_guard_mw.model import EntryKind, UsageEvent
from llm_guard_mw.stores import sqlite_steps as steps
from llm_guard_mw.stores.journal import encode_event
from llm_guard_mw.stores.protocol import Granted, Refused
from llm_guard_mw.stores.sqlite import AsyncSQLiteStore, SQLiteStore
from tests.model.world import offer, prepaid, released, wish


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "guard.db")


@pytest.fixture
def store(path: str) -> Iterator[SQLiteStore]:
    store = SQLiteStore(path)
    yield store
    store.close()


@pytest.mark.anyio
async def test_all_calls_of_one_turn_share_a_commit(store: SQLiteStore) -> None:
    face = AsyncSQLiteStore(store)
    await face.close_call("none")
    before = store.engine.commits

    await asyncio.gather(*(face.reserve(wish(f"c{n}", offer(prepaid("all", 1000, 1)))) for n in range(50)))

    assert store.engine.commits - before == 1


@pytest.mark.anyio
async def test_the_loop_turns_on_while_another_process_has_the_file(store: SQLiteStore, path: str) -> None:
    face = AsyncSQLiteStore(store)
    await face.close_call("none")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    waiting = asyncio.ensure_future(face.reserve(wish("c1", offer(prepaid("all", 1000, 1)))))
    for _ in range(100):
        await asyncio.sleep(0)
    turned_on = not waiting.done()
    other.execute("ROLLBACK")
    other.close()

    assert turned_on
    assert isinstance(await waiting, Granted)


@pytest.mark.anyio
async def test_a_settlement_that_nobody_waits_for_goes_before_the_next_reserve(store: SQLiteStore) -> None:
    face = AsyncSQLiteStore(store)
    whole = offer(prepaid("all", 10, 10))
    first = await face.reserve(wish("c1", whole))
    assert isinstance(first, Granted)
    assert isinstance(await face.reserve(wish("c2", whole)), Refused)

    store.settle_soon(released("c1", first), lambda error: None)

    assert isinstance(await face.reserve(wish("c3", whole)), Granted)


def test_many_threads_are_all_answered(store: SQLiteStore) -> None:
    answers: list[object] = []
    threads = [
        threading.Thread(
            target=lambda n=n: answers.append(store.reserve(wish(f"c{n}", offer(prepaid("all", 1000, 1)))))
        )
        for n in range(64)
    ]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)

    assert [type(answer) for answer in answers] == [Granted] * 64
    assert store.peek(["all"])[0].held == 64


def test_a_reserve_is_refused_when_the_journal_is_nearly_full_and_a_settle_never(path: str) -> None:
    store = SQLiteStore(path, journal_max=10)
    granted = store.reserve(wish("c0", offer(prepaid("all", 1000, 1))))
    assert isinstance(granted, Granted)
    for number in range(9):
        event = UsageEvent(call_id=str(number), attempt=0, kind=EntryKind.REFUSED, at=0)
        store.append(f"{number}/0/refused", encode_event(event))
    store.engine.length_known_until = 0.0

    with pytest.raises(StoreUnavailable, match="journal is nearly full"):
        store.reserve(wish("c1", offer(prepaid("all", 1000, 1))))

    store.settle(released("c0", granted))
    store.close()


def test_a_file_of_a_newer_version_is_left_alone(path: str) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()

    with pytest.raises(ConfigError, match="has schema 99"):
        SQLiteStore(path).now()


def test_a_file_of_the_first_version_gets_what_it_lacks_and_keeps_its_journal(path: str) -> None:
    with sqlite3.connect(path) as db:
        for statement in steps.SCHEMAS[0].split(";\n"):
            db.execute(statement)
        db.execute("INSERT INTO meta VALUES ('epoch', 'that of old')")
        db.execute("PRAGMA user_version = 1")
        db.execute(
            "INSERT INTO journal (id, kind, at, lines, payload) VALUES ('x', 'refused', 1, ?, ?)", (b"[]", b"{}")
        )
    db.close()
    store = SQLiteStore(path)

    assert [entry.id for entry in store.take_journal("a", 10)] == ["x"]

    assert store.epoch() == "that of old"
    store.close()
