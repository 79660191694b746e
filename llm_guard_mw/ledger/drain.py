"""The drain: journal entries become rows, rollups and window totals.

Rule 1. Take, commit, drop. One transaction writes the rows, adds their lines to window_totals and themselves to
        daily_usage, and moves the watermark. The journal forgets an entry after the commit. A drain that dies in
        between is repeated by another process, and finds its rows in place: only a row that is new adds anything.
Rule 2. Many processes may have entries in hand, each its own; one at a time commits, since the first statement locks
        the watermark's row. `verify` holds the books still by a lease in that row, which drains respect.
Rule 3. The store is never asked while the write lock is held: on SQLite it may be in the same file, and would wait
        for us.
Rule 4. An entry that cannot become a row is put aside with the reason, and the others go on. What it moved was
        moved, so that its lines count in window_totals.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from zoneinfo import ZoneInfo

import msgspec
from sqlalchemy import (
    ColumnElement,
    Connection,
    Table,
    and_,
    bindparam,
    case,
    func,
    insert,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.sql.dml import Insert

from llm_guard_mw.ledger.database import POISON, Database, Writing, chunks
from llm_guard_mw.ledger.rows import (
    CLOSING,
    COUNTS,
    SUMS,
    Row,
    RowKey,
    daily_of,
    encode_lines,
    key_of,
    row_of,
    totals_of,
)
from llm_guard_mw.ledger.tables import DailyUsage, DeadEntry, DrainWatermark, UsageEventRow, WindowTotal, table_of
from llm_guard_mw.logs import log
from llm_guard_mw.model import JournalEntry
from llm_guard_mw.stores.protocol import Entries, Store, Unreadable

#: How long the holder of the books may be silent before drains go on.
LEASE_MS = 5_000

#: A store has one journal so far.
_PARTITION = ""

EVENTS = table_of(UsageEventRow)
DAILY = table_of(DailyUsage)
TOTALS = table_of(WindowTotal)
MARKS = table_of(DrainWatermark)
DEAD = table_of(DeadEntry)


def drain(books: Database, zone: ZoneInfo, store: Store, consumer: str, most: int) -> int | None:
    """Take down up to `most` entries. Returns how many; None if the books are held still."""
    entries = store.take_journal(consumer, most)
    if not entries:
        return 0
    epoch = store.epoch()
    batch = _sort(entries, zone, epoch)
    aside = _commit(books, epoch, batch, max(entry.position for entry in entries))
    if aside is None:
        return None
    for row in aside:
        # The reason may quote the entry's values, so that it is in the table, and not in the log.
        log.error("journal_entry_put_aside", entry=row["id"], kind=row["kind"], at=row["at"])
    store.drop_journal([entry.position for entry in entries])
    return len(entries)


def _commit(books: Database, epoch: str, batch: _Batch, position: str) -> Sequence[Row] | None:
    """Write a batch down. Returns what was put aside; None if the books are held still."""
    for careful in (False, True):
        try:
            with books.writing() as connection:
                if not _move_watermark(books, connection, epoch, position):
                    return None
                return _take_down(books, connection, epoch, batch, careful=careful)
        except POISON:
            if careful:
                raise
            # One of the rows: all of them once more, each by itself. To be ready for that from the start would cost
            # every batch some round trips.
    raise AssertionError


def _move_watermark(books: Database, connection: Connection, epoch: str, position: str) -> bool:
    """Lock the watermark's row, and move it. Returns False where somebody holds the books still."""
    moving = {"of": epoch, "to": position, "now": _now(), "wrong": _now() + 10 * LEASE_MS}
    if connection.execute(_MOVE, moving).rowcount == 1:
        return True
    if connection.scalar(select(MARKS.c.epoch).where(MARKS.c.partition == _PARTITION, MARKS.c.epoch == epoch)):
        return False
    _begin_epoch(books, connection, epoch)
    return connection.execute(_MOVE, moving).rowcount == 1


def _free(now: ColumnElement[int] | int, wrong: ColumnElement[int] | int) -> ColumnElement[bool]:
    """Nobody's, or somebody's who let it lapse. A lease that ends far ahead was written by a clock that was wrong."""
    return or_(MARKS.c.holder.is_(None), MARKS.c.held_until <= now, MARKS.c.held_until > wrong)


#: Entries may be committed out of their order: the watermark is the furthest one, and never moves back. Whoever let
#: his lease lapse loses it here, so that he learns that the books have moved.
_MOVE = (
    update(MARKS)
    .where(
        MARKS.c.partition == _PARTITION, MARKS.c.epoch == bindparam("of"), _free(bindparam("now"), bindparam("wrong"))
    )
    .values(
        position=case((MARKS.c.position < bindparam("to"), bindparam("to")), else_=MARKS.c.position),
        holder=None,
        held_until=0,
    )
)


# ---------------------------------------------------------------- the lease


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to hold the books of `epoch` still, until it is given back or runs out."""

    epoch: str
    holder: str

    def is_ours(self) -> ColumnElement[bool]:
        return and_(MARKS.c.partition == _PARTITION, MARKS.c.epoch == self.epoch, MARKS.c.holder == self.holder)

    def renew(self, books: Database) -> bool:
        """Keep it a while longer; False if it was lost."""
        with books.writing() as connection:
            return connection.execute(update(MARKS).where(self.is_ours()).values(held_until=_later())).rowcount == 1


@contextmanager
def lease(books: Database, epoch: str) -> Iterator[Lease | None]:
    """Hold the books still: nobody drains meanwhile. None if somebody else holds them."""
    wanted = Lease(epoch, f"{os.getpid()}-{secrets.token_hex(4)}")
    if not _take(books, wanted):
        yield None
        return
    try:
        yield wanted
    finally:
        with books.writing() as connection:
            connection.execute(update(MARKS).where(wanted.is_ours()).values(holder=None, held_until=0))


def _take(books: Database, wanted: Lease) -> bool:
    now = _now()
    mine = and_(MARKS.c.partition == _PARTITION, MARKS.c.epoch == wanted.epoch)
    taking = (
        update(MARKS)
        .where(mine, _free(now, now + 10 * LEASE_MS))
        .values(holder=wanted.holder, held_until=now + LEASE_MS)
    )
    with books.writing() as connection:
        if connection.execute(taking).rowcount == 1:
            return True
        _begin_epoch(books, connection, wanted.epoch)
        return connection.execute(taking).rowcount == 1


def _begin_epoch(books: Database, connection: Connection, epoch: str) -> None:
    known = connection.scalars(select(MARKS.c.epoch).where(MARKS.c.partition == _PARTITION)).all()
    if epoch in known:
        return
    if known:
        # The store was made anew, or several stores share this ledger: both are worth a line.
        log.warning("ledger_new_epoch", epoch=epoch, known=len(known))
    connection.execute(
        books.insert_new(MARKS),
        {"partition": _PARTITION, "epoch": epoch, "position": "", "holder": None, "held_until": 0},
    )


def _now() -> int:
    return time.time_ns() // 1_000_000


def _later() -> int:
    return _now() + LEASE_MS


# ---------------------------------------------------------------- taking down


@dataclass(slots=True)
class _Batch:
    """Entries sorted by what can become of them, before anything is locked."""

    rows: list[tuple[JournalEntry, Row]] = field(default_factory=list)
    dead: list[Row] = field(default_factory=list)


def _sort(entries: Entries, zone: ZoneInfo, epoch: str) -> _Batch:
    batch = _Batch()
    for entry in entries:
        if isinstance(entry, Unreadable):
            batch.dead.append(_dead(entry, epoch, entry.error))
            continue
        try:
            batch.rows.append((entry, row_of(entry, zone)))
        except Exception as error:  # whatever a stranger has written: the others go on
            batch.dead.append(_dead(entry, epoch, error))
    return batch


def _take_down(books: Database, connection: Connection, epoch: str, batch: _Batch, *, careful: bool) -> Sequence[Row]:
    """Write what is new. Returns what was put aside; if `careful`, also the rows that the database refuses."""
    known, touched = _known(connection, {row["call_id"] for _, row in batch.rows})
    fresh: list[tuple[JournalEntry, Row]] = []
    for entry, row in batch.rows:
        if key_of(row) not in known:
            known.add(key_of(row))
            fresh.append((entry, row))
    dead = list(batch.dead)
    if not careful:
        _add(books, connection, [row for _, row in fresh], touched)
    else:
        for entry, row in fresh:
            counted = set(touched)
            try:
                with connection.begin_nested():
                    _add(books, connection, [row], counted)
                touched = counted
            except POISON as error:
                dead.append(_dead(entry, epoch, error))
    return _put_aside(books, connection, dead)


_KNOWN = select(EVENTS.c.call_id, EVENTS.c.attempt, EVENTS.c.kind, EVENTS.c.price_version, EVENTS.c.rollup).where(
    EVENTS.c.call_id.in_(bindparam("calls", expanding=True))
)


def _known(connection: Connection, calls: set[str]) -> tuple[set[RowKey], set[tuple[str, str]]]:
    """The keys of these calls' rows, and which groups of daily_usage count the call already."""
    keys: set[RowKey] = set()
    touched: set[tuple[str, str]] = set()
    for chunk in chunks(calls):
        for call_id, attempt, kind, price_version, rollup in connection.execute(_KNOWN, {"calls": chunk}):
            keys.add((call_id, attempt, kind, price_version))
            if kind in CLOSING:
                touched.add((call_id, rollup))
    return keys, touched


def _add(books: Database, connection: Connection, rows: Sequence[Row], touched: set[tuple[str, str]]) -> None:
    books.write_many(connection, _INSERT, rows)
    books.write_many(connection, _ADD_DAILY, daily_of(rows, touched))
    _add_totals(books, connection, rows)


def _add_totals(books: Database, connection: Connection, rows: Sequence[Row]) -> None:
    books.write_many(connection, _ADD_TOTALS, totals_of(line for row in rows for line in row["lines"]))


def _adding(table: Table, key: tuple[str, ...], sums: tuple[str, ...]) -> Writing:
    """Add the sums of rows to those of the same key. NULL and a number is the number; NULL and NULL stay NULL.

    The rows are in the order of their key, so that two writers on Postgres cannot wait for each other.
    """

    def statement(books: Database) -> Insert:
        adding = books.insert(table)
        added = {
            name: case(
                (adding.excluded[name].is_(None), table.c[name]),
                else_=func.coalesce(table.c[name], literal_column("0")) + adding.excluded[name],
            )
            for name in sums
        }
        return adding.on_conflict_do_update(index_elements=list(key), set_=added)

    return Writing(table, statement)


_INSERT = Writing(EVENTS, lambda books: books.insert(EVENTS), leaves=("number",))
_ADD_DAILY = _adding(DAILY, ("rollup",), (*COUNTS, *SUMS))
_ADD_TOTALS = _adding(TOTALS, ("balance", "window_start"), ("spent",))


# ---------------------------------------------------------------- entries that cannot become rows

_BIGGEST = 2**63 - 1
_ID_MAX = 500


def _dead(entry: JournalEntry | Unreadable, epoch: str, error: Exception | str) -> Row:
    """The row of such an entry, which the database takes whatever stands in it."""
    try:
        event = entry.payload if isinstance(entry, Unreadable) else msgspec.json.encode(entry.event)
        lines = encode_lines(entry.lines)
    except Exception as unsayable:  # a stranger's lines may be anything
        event, lines = repr(entry).encode("utf-8", "replace"), []
        error = f"{error}; {unsayable}"
    name = _sayable(entry.id)
    if len(name) > _ID_MAX:
        name = f"{name[:100]}...{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}"
    return {
        "id": name,
        "kind": entry.kind.value,
        "at": max(-_BIGGEST, min(entry.at, _BIGGEST)),
        "epoch": epoch,
        "position": entry.position,
        "lines": lines,
        "event": _sayable(event.decode("utf-8", "replace")),
        "error": _sayable(error if isinstance(error, str) else f"{type(error).__name__}: {error}"),
    }


def _sayable(text: str) -> str:
    """Without NUL and lone surrogates, which Postgres takes in no text."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def _put_aside(books: Database, connection: Connection, dead: Sequence[Row]) -> list[Row]:
    """Returns those that had not been put aside before."""
    aside: list[Row] = []
    for row in dead:
        if connection.scalar(select(DEAD.c.id).where(DEAD.c.id == row["id"])) is not None:
            continue
        try:
            with connection.begin_nested():
                connection.execute(insert(DEAD), row)
                _add_totals(books, connection, [row])
        except POISON as error:  # what it claims to have moved is no number that could be added
            told = f"{row['error']}; {row['lines']} do not count: {_sayable(str(error))}"
            connection.execute(insert(DEAD), {**row, "lines": [], "error": told})
        aside.append(row)
    return aside
