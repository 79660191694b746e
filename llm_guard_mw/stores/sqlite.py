"""The embedded store: one SQLite file, correct across the processes of one machine.

Rule 1. One connection a process, and one mutex: whoever holds it does the work of everybody who waits, in one
        transaction (group commit), and answers after the commit. All calls of one turn of an event loop wait
        together. A step that fails takes only itself down: the group is rolled back and run one by one.
Rule 2. An event loop never waits for the file. If another process has locked it, a helper thread does the
        waiting; so it does the checkpoints, which are the only writes that wait for the disk.
Rule 3. Work is done in the order in which it came, so a settlement frees its money for the reserve behind it.
Rule 4. The store owns its tables (plain DDL, `user_version`); the ledger may live in the same file.

The sync and the async face stand one under the other; both hand in their step and wait for the answer in their
own way. An async caller that is cancelled while it waits does not stop its step.
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
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

from llm_guard_mw.errors import ConfigError, StoreUnavailable
from llm_guard_mw.logs import log
from llm_guard_mw.stores import sqlite_steps as steps
from llm_guard_mw.stores.protocol import (
    LEFT_ALONE_MS,
    BalanceState,
    ClockApart,
    Entries,
    Granted,
    HoldState,
    Refused,
    Renewed,
    Reserve,
    Settled,
    Settlement,
    TooLate,
)

T = TypeVar("T")
Clock = Callable[[], int]

#: A group is cut here, so that its first caller does not wait for all the others.
GROUP_MAX = 64
#: The write-ahead log is brought into the file every so many transactions: a few MB, a few seconds under load.
CHECKPOINT_COMMITS = 1000
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

    @property
    def name(self) -> str:
        return f"sqlite:{Path(self.engine.path).resolve()}"

    def clock(self) -> int:
        """The store's clock, in ms; asks nobody."""
        return self.engine.clock()

    def async_face(self) -> AsyncSQLiteStore:
        return AsyncSQLiteStore(self)

    def reserve(self, wish: Reserve) -> Granted | Refused | ClockApart | TooLate:
        return self.engine.run(steps.reserve, wish, room=True)

    def settle(self, settlement: Settlement) -> Settled:
        return self.engine.run(steps.settle, settlement)

    def settle_soon(self, settlement: Settlement, done: Callable[[BaseException | None], None]) -> None:
        """Settle without waiting; `done` is told the outcome, on any thread."""
        self.engine.post(steps.settle, (settlement,), done)

    def replayed(self, source: str) -> int:
        return self.engine.run(steps.replayed, source)

    def end_replay(self, source: str) -> None:
        return self.engine.run(steps.end_replay, source)

    def renew(self, exchanges: Sequence[str], calls: Sequence[str], lease_ms: int) -> Renewed:
        return self.engine.run(steps.renew, exchanges, calls, lease_ms)

    def expire(self, most: int = 1000) -> int:
        return self.engine.run(steps.expire, most)

    def forget(self, most: int = 1000) -> int:
        return self.engine.run(steps.forget, most)

    def close_call(self, call: str) -> None:
        return self.engine.run(steps.close_call, call)

    def close_call_soon(self, call: str, done: Callable[[BaseException | None], None]) -> None:
        """Close the call without waiting; `done` is told the outcome, on any thread."""
        self.engine.post(steps.close_call, (call,), done)

    def admit(self, parent: str, scope: str, value: str, day: int, most: int) -> bool:
        return self.engine.run(steps.admit, parent, scope, value, day, most)

    def peek(self, balances: Sequence[str]) -> Sequence[BalanceState]:
        return self.engine.run(steps.peek, balances)

    def append(self, entry_id: str, payload: bytes) -> None:
        return self.engine.run(steps.append, entry_id, payload)

    def append_soon(self, entry_id: str, payload: bytes, done: Callable[[BaseException | None], None]) -> None:
        """Append without waiting; `done` is told the outcome, on any thread."""
        self.engine.post(steps.append, (entry_id, payload), done)

    def take_journal(self, consumer: str, count: int, idle_ms: int = LEFT_ALONE_MS) -> Entries:
        return self.engine.run(steps.take_journal, consumer, count, idle_ms)

    def drop_journal(self, positions: Sequence[str]) -> None:
        return self.engine.run(steps.drop_journal, positions)

    def read_journal(self, after: str, count: int) -> Entries:
        return self.engine.run(steps.read_journal, after, count)

    def attend(self, for_ms: int) -> None:
        return self.engine.run(steps.attend, for_ms)

    def attended(self) -> bool:
        return self.engine.run(steps.attended)

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

    async def peek(self, balances: Sequence[str]) -> Sequence[BalanceState]:
        return await self.engine.arun(steps.peek, balances)


# ---------------------------------------------------------------- whose turn it is


class _Work(NamedTuple):
    step: Callable[..., Any]  # of sqlite_steps: each has its own arguments and result
    arguments: tuple[Any, ...]
    room: bool  # it needs room in the journal
    answer: Callable[[Any, BaseException | None], None]
    loop: asyncio.AbstractEventLoop | None  # whose thread the answer is for; None: any


class _Locked(Exception):
    """Another process is writing, and the caller is not one to wait."""


class _Engine:
    """What waits, the connection, and the mutex that lets one thread at a time work off what waits."""

    def __init__(self, path: str, clock: Clock, journal_max: int) -> None:
        self.path = path
        self.clock = clock
        self.journal_max = journal_max
        self._start_anew()
        _engines.add(self)

    def _start_anew(self) -> None:
        self.waiting: deque[_Work] = deque()
        self.mutex = threading.Lock()
        self.db: sqlite3.Connection | None = None
        self.turns: set[asyncio.AbstractEventLoop] = set()  # loops that will work off what waits this turn
        self.errands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.starting = threading.Lock()
        self.helper: threading.Thread | None = None
        self.commits = 0
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

        self.waiting.append(_Work(step, arguments, room, answer, None))
        self._work_off(patient=True)
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

        self.waiting.append(_Work(step, arguments, room, answer, loop))
        self._this_turn(loop)
        return await future

    def post(
        self, step: Callable[..., Any], arguments: tuple[Any, ...], done: Callable[[BaseException | None], None]
    ) -> None:
        self.waiting.append(_Work(step, arguments, False, lambda _result, error: done(error), None))
        try:
            self._this_turn(asyncio.get_running_loop())
        except RuntimeError:  # no loop runs in this thread
            self._work_off(patient=False)

    def _this_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        """Everything that is handed in before the loop comes round again goes into one transaction."""
        if loop not in self.turns:
            self.turns.add(loop)
            loop.call_soon(self._turn, loop)

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self.turns.discard(loop)
        self._work_off(patient=False)

    def close(self) -> None:
        """Do what waits, then let go of the file and the helper. The next use opens it again."""
        self._work_off(patient=True)
        with self.mutex:
            if self.db is not None:
                self.db.close()
                self.db = None
        with self.starting:
            helper, self.helper = self.helper, None
        if helper is not None:
            self.errands.put(None)
            helper.join()

    # -- working it off

    def _work_off(self, *, patient: bool) -> None:
        """Do what waits, unless somebody is at it: whoever holds the mutex looks again after letting go of it."""
        while self.waiting and self.mutex.acquire(blocking=False):
            group: list[_Work] = []
            results: list[tuple[Any, BaseException | None]] = []
            locked = False
            try:
                while self.waiting and len(group) < GROUP_MAX:
                    group.append(self.waiting.popleft())
                if group:
                    results = self._do(group, patient)
            except _Locked:
                self.waiting.extendleft(reversed(group))
                group, locked = [], True
            except BaseException as error:  # this thread is being ended: whoever waits in another must not wait on
                results = [(None, error)] * len(group)
                raise
            finally:
                self.mutex.release()
                _deliver(group, results)
            if locked:  # only now, or the helper might find the mutex held and think that somebody is at it
                self._send_helper(self._wait_and_work_off)
                return

    def _wait_and_work_off(self) -> None:
        self._work_off(patient=True)

    def _send_helper(self, errand: Callable[[], None]) -> None:
        self.errands.put(errand)
        with self.starting:
            if self.helper is None:
                self.helper = threading.Thread(target=self._help, name="llm-guard-store", daemon=True)
                self.helper.start()

    def _help(self) -> None:
        while (errand := self.errands.get()) is not None:
            try:
                errand()
            except Exception:
                log.exception("store_helper_failed")

    def _checkpoint(self) -> None:
        """Bring the write-ahead log into the file, as far as no reader is in the way."""
        db = sqlite3.connect(self.path, timeout=0)
        try:
            db.execute("PRAGMA wal_checkpoint(PASSIVE)")
        except sqlite3.OperationalError as error:
            log.debug("checkpoint_postponed", reason=str(error))
        finally:
            db.close()

    def _do(self, group: Sequence[_Work], patient: bool) -> list[tuple[Any, BaseException | None]]:
        try:
            return self._transact(group, patient)
        except _Locked:
            raise
        except Exception as error:
            # Without the file (locked, vanished, full) nobody has to try alone what all could not do.
            if len(group) == 1 or isinstance(error, sqlite3.OperationalError):
                translated = _translated(error, self.path)
                return [(None, translated)] * len(group)
        return [answer for work in group for answer in self._do([work], patient=True)]

    def _transact(self, group: Sequence[_Work], patient: bool) -> list[tuple[Any, BaseException | None]]:
        begin = _begin if patient else _begin_at_once
        db = self.db or self._open(begin)
        begin(db)
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
        self.commits += 1
        if self.commits % CHECKPOINT_COMMITS == 0:
            self._send_helper(self._checkpoint)
        return results

    def _journal_full(self, db: sqlite3.Connection) -> bool:
        now = time.monotonic()
        if now >= self.length_known_until:
            self.full = steps.journal_length(db, 0) >= self.journal_max * 9 // 10
            self.length_known_until = now + _LENGTH_EVERY_SECONDS
        return self.full

    def _open(self, begin: Callable[[sqlite3.Connection], None]) -> sqlite3.Connection:
        if self.path != ":memory:":
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        # Waiting for the lock is ours (`_begin`): SQLite's own busy handler sleeps up to 0.1 s at a time.
        # The mutex lets one thread at a time use it.
        db = sqlite3.connect(self.path, timeout=0, isolation_level=None, cached_statements=256, check_same_thread=False)
        try:
            begin(db)  # a locked file says so here; the pragmas below need it free, and outside of a transaction
            db.execute("ROLLBACK")
            _patiently(lambda: db.execute("PRAGMA journal_mode = WAL"))
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA wal_autocheckpoint = 0")  # the helper does them
            begin(db)
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version < steps.SCHEMA_VERSION:
                steps.create(db, version)
            elif version > steps.SCHEMA_VERSION:
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


def _begin_at_once(db: sqlite3.Connection) -> None:
    try:
        db.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        if _is_locked(error):
            raise _Locked from error
        raise


def _is_locked(error: sqlite3.OperationalError) -> bool:
    return error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _patiently(attempt: Callable[[], object]) -> None:
    """Try until the file is free: short random waits, since whoever holds it is done within a millisecond."""
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    pause = 0.0002
    while True:
        try:
            attempt()
            return
        except sqlite3.OperationalError as error:
            if not _is_locked(error) or time.monotonic() > deadline:
                raise
        time.sleep(pause * (0.5 + random.random()))  # noqa: S311 - spreads the waiters, is no secret
        pause = min(pause * 1.5, 0.001)  # longer ones lose the race against whoever comes just then


def _translated(error: Exception, path: str) -> Exception:
    if isinstance(error, sqlite3.Error):
        unavailable = StoreUnavailable(f"store {path!r}: {error}")
        unavailable.__cause__ = error
        return unavailable
    return error


def _deliver(group: Sequence[_Work], results: Sequence[tuple[Any, BaseException | None]]) -> None:
    """Answer everybody; another thread's event loop is woken once for all its callers."""
    here = _loop_here()
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Work, Any, BaseException | None]]] = {}
    for work, (result, error) in zip(group, results, strict=True):
        if work.loop is None or work.loop is here:
            _answer(work, result, error)
        else:
            by_loop.setdefault(work.loop, []).append((work, result, error))
    for loop, answers in by_loop.items():
        try:
            loop.call_soon_threadsafe(_answer_all, answers)
        except RuntimeError:  # the loop was closed, and with it everybody who waited
            continue


def _loop_here() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


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
