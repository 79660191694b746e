"""The embedded store: one SQLite file, correct across the processes of one machine.

Rule 1. One thread a process speaks to the file. It is started by the first use, and made anew after a fork.
Rule 2. Work that waits is done in one transaction (group commit); answers go out after the commit. A step that
        fails takes only itself down: the group is rolled back and its steps are run one by one.
Rule 3. The store owns its tables (plain DDL, `user_version`); the ledger may live in the same file.

The sync and the async face stand one under the other; both hand their step to the thread and wait for the
answer in their own way. An async caller that is cancelled while it waits does not stop its step.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import random
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

from llm_guard_mw.errors import ConfigError, StoreUnavailable
from llm_guard_mw.logs import log
from llm_guard_mw.model import JournalEntry
from llm_guard_mw.stores import sqlite_steps as steps
from llm_guard_mw.stores.protocol import (
    BalanceState,
    ClockApart,
    Granted,
    HoldState,
    Refused,
    Renewed,
    Reserve,
    Settled,
    Settlement,
    TooLate,
    Unreadable,
)

T = TypeVar("T")
Clock = Callable[[], int]

#: A group is cut here, so that its first caller does not wait for all the others.
GROUP_MAX = 128
#: How long a transaction waits for another process to let go of the file.
LOCK_WAIT_SECONDS = 5.0
#: How often the length of the journal is looked at.
_LENGTH_EVERY_SECONDS = 0.1


def wall_clock_ms() -> int:
    """The machine's clock, in ms since the epoch: all processes on one machine share it."""
    return time.time_ns() // 1_000_000


class SQLiteStore:
    """The sync face.

    `path` is the file, made when it is not there. `clock` gives ms since the epoch. A reserve is refused with
    `StoreUnavailable` once nine tenths of `journal_max` entries wait for the ledger; a settle never is.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, clock: Clock | None = None, journal_max: int = 1_000_000
    ) -> None:
        self.engine = _Engine(os.fspath(path), clock or wall_clock_ms, journal_max)

    def reserve(self, wish: Reserve) -> Granted | Refused | ClockApart | TooLate:
        return self.engine.run(steps.reserve, wish, room=True)

    def settle(self, settlement: Settlement) -> Settled:
        return self.engine.run(steps.settle, settlement)

    def settle_soon(self, settlement: Settlement, done: Callable[[BaseException | None], None]) -> None:
        """Settle without waiting; `done` is told the outcome on the store's thread."""
        self.engine.post(steps.settle, (settlement,), done)

    def renew(self, exchanges: Sequence[str], calls: Sequence[str], lease_ms: int) -> Renewed:
        return self.engine.run(steps.renew, exchanges, calls, lease_ms)

    def expire(self, most: int = 1000) -> int:
        return self.engine.run(steps.expire, most)

    def forget(self, most: int = 1000) -> int:
        return self.engine.run(steps.forget, most)

    def close_call(self, call: str) -> None:
        return self.engine.run(steps.close_call, call)

    def close_call_soon(self, call: str, done: Callable[[BaseException | None], None]) -> None:
        """Close the call without waiting; `done` is told the outcome on the store's thread."""
        self.engine.post(steps.close_call, (call,), done)

    def admit(self, parent: str, scope: str, value: str, day: int, most: int) -> bool:
        return self.engine.run(steps.admit, parent, scope, value, day, most)

    def peek(self, balances: Sequence[str]) -> Sequence[BalanceState]:
        return self.engine.run(steps.peek, balances)

    def append(self, entry_id: str, payload: bytes) -> None:
        return self.engine.run(steps.append, entry_id, payload)

    def append_soon(self, entry_id: str, payload: bytes, done: Callable[[BaseException | None], None]) -> None:
        """Append without waiting; `done` is told the outcome on the store's thread."""
        self.engine.post(steps.append, (entry_id, payload), done)

    def read_journal(self, after: str, count: int) -> Sequence[JournalEntry | Unreadable]:
        return self.engine.run(steps.read_journal, after, count)

    def trim_journal(self, upto: str) -> None:
        return self.engine.run(steps.trim_journal, upto)

    def journal_length(self) -> int:
        return self.engine.run(steps.journal_length)

    def epoch(self) -> str:
        return self.engine.run(steps.epoch)

    def balances(self, after: str, count: int) -> Sequence[BalanceState]:
        return self.engine.run(steps.balances, after, count)

    def holds(self, after: str, count: int) -> Sequence[HoldState]:
        return self.engine.run(steps.holds, after, count)

    def now(self) -> int:
        return self.engine.run(steps.time_now)

    def close(self) -> None:
        """Do what waits, then let go of the file. The next use opens it again."""
        self.engine.close()


class AsyncSQLiteStore:
    """The async face of the same store: what a request needs, as coroutines."""

    def __init__(self, store: SQLiteStore) -> None:
        self.engine = store.engine

    async def reserve(self, wish: Reserve) -> Granted | Refused | ClockApart | TooLate:
        return await self.engine.arun(steps.reserve, wish, room=True)

    async def settle(self, settlement: Settlement) -> Settled:
        return await self.engine.arun(steps.settle, settlement)

    async def close_call(self, call: str) -> None:
        return await self.engine.arun(steps.close_call, call)

    async def admit(self, parent: str, scope: str, value: str, day: int, most: int) -> bool:
        return await self.engine.arun(steps.admit, parent, scope, value, day, most)

    async def append(self, entry_id: str, payload: bytes) -> None:
        return await self.engine.arun(steps.append, entry_id, payload)


# ---------------------------------------------------------------- the thread


class _Work(NamedTuple):
    step: Callable[..., Any]  # of sqlite_steps: each has its own arguments and result
    arguments: tuple[Any, ...]
    room: bool  # it needs room in the journal
    answer: Callable[[Any, BaseException | None], None]
    loop: asyncio.AbstractEventLoop | None  # whose thread the answer is for; None: the store's own


class _Engine:
    """The queue, the thread that empties it, and the connection that only this thread touches."""

    def __init__(self, path: str, clock: Clock, journal_max: int) -> None:
        self.path = path
        self.clock = clock
        self.journal_max = journal_max
        self._start_anew()
        _engines.add(self)

    def _start_anew(self) -> None:
        self.queue: SimpleQueue[_Work | None] = SimpleQueue()
        self.thread: threading.Thread | None = None
        self.starting = threading.Lock()
        self.db: sqlite3.Connection | None = None
        self.length_known_until = 0.0
        self.full = False

    # -- handing work in

    def run(self, step: Callable[..., T], *arguments: Any, room: bool = False) -> T:
        future: Future[T] = Future()

        def answer(result: Any, error: BaseException | None) -> None:
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._put(_Work(step, arguments, room, answer, None))
        return future.result()

    async def arun(self, step: Callable[..., T], *arguments: Any, room: bool = False) -> T:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def answer(result: Any, error: BaseException | None) -> None:
            if future.done():  # its caller was cancelled
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._put(_Work(step, arguments, room, answer, loop))
        return await future

    def post(
        self, step: Callable[..., Any], arguments: tuple[Any, ...], done: Callable[[BaseException | None], None]
    ) -> None:
        self._put(_Work(step, arguments, False, lambda _result, error: done(error), None))

    def _put(self, work: _Work) -> None:
        self.queue.put(work)
        if self.thread is None:
            with self.starting:
                if self.thread is None:
                    self.thread = threading.Thread(target=self._serve, name="llm-guard-store", daemon=True)
                    self.thread.start()

    def close(self) -> None:
        with self.starting:
            thread, self.thread = self.thread, None
            if thread is None:
                return
            self.queue.put(None)
            thread.join()
            if not self.queue.empty():  # handed in behind the closing: a new thread takes it
                self.thread = threading.Thread(target=self._serve, name="llm-guard-store", daemon=True)
                self.thread.start()

    # -- the thread's side

    def _serve(self) -> None:
        while True:
            first = self.queue.get()
            group = [first] if first is not None else []
            closing = first is None
            while not closing and len(group) < GROUP_MAX:
                try:
                    work = self.queue.get_nowait()
                except Empty:
                    break
                if work is None:
                    closing = True
                else:
                    group.append(work)
            if group:
                _deliver(group, self._do(group))
            if closing:
                if self.db is not None:
                    self.db.close()
                    self.db = None
                return

    def _do(self, group: Sequence[_Work]) -> list[tuple[Any, BaseException | None]]:
        try:
            return self._transact(group)
        except Exception as error:
            # Without the file (locked, vanished, full) nobody has to try alone what all could not do.
            if len(group) == 1 or isinstance(error, sqlite3.OperationalError):
                translated = _translated(error, self.path)
                return [(None, translated)] * len(group)
        return [answer for work in group for answer in self._do([work])]

    def _transact(self, group: Sequence[_Work]) -> list[tuple[Any, BaseException | None]]:
        db = self.db or self._open()
        _begin(db)
        try:
            full = self._journal_full(db)
            results: list[tuple[Any, BaseException | None]] = []
            for work in group:
                if full and work.room:
                    results.append((None, StoreUnavailable("the journal is nearly full: is the ledger reachable?")))
                else:
                    results.append((work.step(db, self.clock(), *work.arguments), None))
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        return results

    def _journal_full(self, db: sqlite3.Connection) -> bool:
        now = time.monotonic()
        if now >= self.length_known_until:
            self.full = steps.journal_length(db, 0) >= self.journal_max * 9 // 10
            self.length_known_until = now + _LENGTH_EVERY_SECONDS
        return self.full

    def _open(self) -> sqlite3.Connection:
        if self.path != ":memory:":
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        # Waiting for the lock is ours (`_begin`): SQLite's own busy handler sleeps up to 0.1 s at a time.
        db = sqlite3.connect(self.path, timeout=0, isolation_level=None, cached_statements=256)
        try:
            _patiently(lambda: db.execute("PRAGMA journal_mode = WAL"))
            db.execute("PRAGMA synchronous = NORMAL")
            _begin(db)
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                steps.create(db)
            elif version != steps.SCHEMA_VERSION:
                raise ConfigError(
                    f"store {self.path!r} has schema {version}, this version of llm_guard_mw knows"
                    f" {steps.SCHEMA_VERSION}: use the version that wrote it, or a newer one"
                )
            db.execute("COMMIT")
        except BaseException:
            db.close()
            raise
        self.db = db
        return db


def _begin(db: sqlite3.Connection) -> None:
    _patiently(lambda: db.execute("BEGIN IMMEDIATE"))


def _patiently(attempt: Callable[[], object]) -> None:
    """Try until the file is free: short random waits, since whoever holds it is done within a millisecond."""
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    pause = 0.0002
    while True:
        try:
            attempt()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise
            if time.monotonic() > deadline:
                raise
        time.sleep(pause * (0.5 + random.random()))  # noqa: S311 - spreads the waiters, is no secret
        pause = min(pause * 1.5, 0.005)


def _translated(error: Exception, path: str) -> Exception:
    if isinstance(error, sqlite3.Error):
        unavailable = StoreUnavailable(f"store {path!r}: {error}")
        unavailable.__cause__ = error
        return unavailable
    return error


def _deliver(group: Sequence[_Work], results: Sequence[tuple[Any, BaseException | None]]) -> None:
    """Answer everybody; an event loop is woken once for all its callers."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Work, Any, BaseException | None]]] = {}
    for work, (result, error) in zip(group, results, strict=True):
        if work.loop is None:
            _answer(work, result, error)
        else:
            by_loop.setdefault(work.loop, []).append((work, result, error))
    for loop, answers in by_loop.items():
        try:
            loop.call_soon_threadsafe(_answer_all, answers)
        except RuntimeError:  # the loop was closed, and with it everybody who waited
            continue


def _answer_all(answers: Sequence[tuple[_Work, Any, BaseException | None]]) -> None:
    for work, result, error in answers:
        _answer(work, result, error)


def _answer(work: _Work, result: Any, error: BaseException | None) -> None:
    try:
        work.answer(result, error)
    except Exception:
        log.exception("store_answer_failed", step=work.step.__name__)


# ---------------------------------------------------------------- fork and exit

_engines: weakref.WeakSet[_Engine] = weakref.WeakSet()

#: Connections that a fork copied into this process. They must not be used, nor be closed (that would touch the
#: parent's locks and its write-ahead log), so they are kept for good.
_inherited: list[sqlite3.Connection] = []


def _after_fork() -> None:
    for engine in _engines:
        if engine.db is not None:
            _inherited.append(engine.db)
        engine._start_anew()


def _at_exit() -> None:
    for engine in list(_engines):
        engine.close()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
