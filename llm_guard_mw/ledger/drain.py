"""The drain: journal entries become rows, rollups and window totals.

Rule 1. One transaction writes the row, adds its lines to window_totals and itself to daily_usage, and moves the
        watermark. The journal is trimmed after the commit. A drain that dies in between is repeated, and finds
        its rows in place: only a row that is new adds anything.
Rule 2. One drainer at a time, by a lease in the watermark's row. The lease saves work (and lets `verify` hold the
        books still); what keeps the books right is rule 1, and the write lock on that row.
Rule 3. The journal is read from its beginning, which is where the last trim left it, and never while the write
        lock is held: on SQLite the store may be in the same file, and would wait for us.
Rule 4. An entry that cannot become a row is put aside with the reason, and the others go on. What it moved was
        moved, so that its lines count in window_totals.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from zoneinfo import ZoneInfo

import msgspec
from sqlalchemy import ColumnElement, Connection, Table, and_, case, func, insert, select, update

from llm_guard_mw.ledger.database import POISON, Database, chunks
from llm_guard_mw.ledger.rows import (
    CLOSING,
    COUNTS,
    SUMS,
    Row,
    RowKey,
    daily_of,
    decode_lines,
    encode_lines,
    key_of,
    row_of,
    totals_of,
)
from llm_guard_mw.ledger.tables import DailyUsage, DeadEntry, DrainWatermark, UsageEventRow, WindowTotal, table_of
from llm_guard_mw.logs import log
from llm_guard_mw.model import JournalEntry
from llm_guard_mw.stores.protocol import Store, Unreadable

#: How long a drainer may be silent before another one takes its place.
LEASE_MS = 5_000

#: A store has one journal so far.
_PARTITION = ""

EVENTS = table_of(UsageEventRow)
DAILY = table_of(DailyUsage)
TOTALS = table_of(WindowTotal)
MARKS = table_of(DrainWatermark)
DEAD = table_of(DeadEntry)


def drain(books: Database, zone: ZoneInfo, store: Store, most: int) -> int | None:
    """Take down up to `most` entries. Returns how many; None if somebody else is at it."""
    if not store.journal_length():
        return 0
    with lease(books, store.epoch()) as held:
        if held is None:
            return None
        entries = store.read_journal("", most)
        if not entries:
            return 0
        if not _commit(books, held, _sort(entries, zone, held.epoch), entries[-1].position):
            return None
        store.trim_journal(entries[-1].position)
    return len(entries)


def _commit(books: Database, held: Lease, batch: _Batch, position: str) -> bool:
    with books.writing() as connection:
        # The first statement locks the watermark's row; whoever lost the lease meanwhile writes nothing.
        moved = connection.execute(update(MARKS).where(held.is_ours()).values(position=position, held_until=_later()))
        if moved.rowcount != 1:
            return False
        _take_down(books, connection, held.epoch, batch)
    return True


# ---------------------------------------------------------------- the lease


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to drain the journal of `epoch`, until it is given back or runs out."""

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
    """Hold off all other drainers; None if there is one at work."""
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
    mine = and_(MARKS.c.partition == _PARTITION, MARKS.c.epoch == wanted.epoch)
    with books.reading() as connection:
        mark = connection.execute(select(MARKS.c.holder, MARKS.c.held_until).where(mine)).first()
    now = _now()
    if mark is not None and mark.holder is not None and not _lapsed(mark.held_until, now):
        return False
    with books.writing() as connection:
        if mark is None:
            _begin_epoch(books, connection, wanted.epoch)
        # Nobody's, or somebody's who let it lapse. A lease that ends far in the future was written by a clock
        # that was wrong.
        free = MARKS.c.holder.is_(None) | (MARKS.c.held_until <= now) | (MARKS.c.held_until > now + 10 * LEASE_MS)
        taken = connection.execute(
            update(MARKS).where(mine, free).values(holder=wanted.holder, held_until=now + LEASE_MS)
        )
        return taken.rowcount == 1


def _lapsed(held_until: int, now: int) -> bool:
    return held_until <= now or held_until > now + 10 * LEASE_MS


def _begin_epoch(books: Database, connection: Connection, epoch: str) -> None:
    others = connection.scalars(
        select(MARKS.c.epoch).where(MARKS.c.partition == _PARTITION, MARKS.c.epoch != epoch)
    ).all()
    if others:
        # The store was made anew, or several stores share this ledger: both are worth a line.
        log.warning("ledger_new_epoch", epoch=epoch, known=len(others))
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


def _sort(entries: Sequence[JournalEntry | Unreadable], zone: ZoneInfo, epoch: str) -> _Batch:
    batch = _Batch()
    for entry in entries:
        if isinstance(entry, Unreadable):
            batch.dead.append(_dead(entry, epoch, entry.error))
            continue
        try:
            batch.rows.append((entry, row_of(entry, zone)))
        except POISON as error:
            batch.dead.append(_dead(entry, epoch, error))
    return batch


def _take_down(books: Database, connection: Connection, epoch: str, batch: _Batch) -> None:
    known, touched = _known(connection, [row["call_id"] for _, row in batch.rows])
    fresh: list[tuple[JournalEntry, Row]] = []
    for entry, row in batch.rows:
        if key_of(row) not in known:
            known.add(key_of(row))
            fresh.append((entry, row))
    try:
        with connection.begin_nested():
            _add(books, connection, [row for _, row in fresh], set(touched))
    except POISON:
        for entry, row in fresh:
            counted = set(touched)
            try:
                with connection.begin_nested():
                    _add(books, connection, [row], counted)
                touched = counted
            except POISON as error:
                batch.dead.append(_dead(entry, epoch, error))
    _put_aside(books, connection, batch.dead)


def _known(connection: Connection, call_ids: Sequence[str]) -> tuple[set[RowKey], set[tuple[str, str]]]:
    """The keys of these calls' rows, and which groups of daily_usage count the call already."""
    keys: set[RowKey] = set()
    touched: set[tuple[str, str]] = set()
    for chunk in chunks(sorted(set(call_ids))):
        found = connection.execute(
            select(EVENTS.c.call_id, EVENTS.c.attempt, EVENTS.c.kind, EVENTS.c.price_version, EVENTS.c.rollup).where(
                EVENTS.c.call_id.in_(chunk)
            )
        )
        for call_id, attempt, kind, price_version, rollup in found:
            keys.add((call_id, attempt, kind, price_version))
            if kind in CLOSING:
                touched.add((call_id, rollup))
    return keys, touched


def _add(books: Database, connection: Connection, rows: Sequence[Row], touched: set[tuple[str, str]]) -> None:
    if not rows:
        return
    connection.execute(insert(EVENTS), rows)
    _add_up(books, connection, DAILY, daily_of(rows, touched), ("rollup",), (*COUNTS, *SUMS))
    _add_totals(books, connection, rows)


def _add_totals(books: Database, connection: Connection, rows: Sequence[Row]) -> None:
    totals = totals_of(line for row in rows for line in decode_lines(row["lines"]))
    _add_up(books, connection, TOTALS, totals, ("balance", "window_start"), ("spent",))


def _add_up(
    books: Database,
    connection: Connection,
    table: Table,
    rows: Sequence[Row],
    key: tuple[str, ...],
    sums: tuple[str, ...],
) -> None:
    """Add the sums of `rows` to those of the same key. NULL and a number is the number; NULL and NULL stay NULL.

    `rows` are in the order of their key, so that two writers on Postgres cannot wait for each other.
    """
    if not rows:
        return
    statement = books.insert(table)
    added = {
        name: case(
            (statement.excluded[name].is_(None), table.c[name]),
            else_=func.coalesce(table.c[name], 0) + statement.excluded[name],
        )
        for name in sums
    }
    connection.execute(statement.on_conflict_do_update(index_elements=list(key), set_=added), rows)


# ---------------------------------------------------------------- entries that cannot become rows


def _dead(entry: JournalEntry | Unreadable, epoch: str, error: Exception | str) -> Row:
    event = entry.payload if isinstance(entry, Unreadable) else msgspec.json.encode(entry.event)
    try:
        lines = encode_lines(entry.lines)
    except POISON:
        lines = []
    return {
        "id": entry.id,
        "kind": entry.kind.value,
        "at": entry.at,
        "epoch": epoch,
        "position": entry.position,
        "lines": lines,
        "event": event.decode("utf-8", "replace").replace("\0", "\ufffd"),
        "error": error if isinstance(error, str) else f"{type(error).__name__}: {error}",
    }


def _put_aside(books: Database, connection: Connection, dead: Sequence[Row]) -> None:
    if not dead:
        return
    known: set[str] = set()
    for chunk in chunks(row["id"] for row in dead):
        known.update(connection.scalars(select(DEAD.c.id).where(DEAD.c.id.in_(chunk))))
    fresh = [row for row in dead if row["id"] not in known]
    if not fresh:
        return
    connection.execute(books.insert_new(DEAD), fresh)
    _add_totals(books, connection, fresh)
    for row in fresh:
        # The reason may quote the entry's values, so that it is in the table, and not in the log.
        log.error("journal_entry_put_aside", entry=row["id"], kind=row["kind"], at=row["at"])
