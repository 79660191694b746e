"""The audit behind `verify`: the store's balances against the books, and the books against themselves.

It sweeps, drains, and then holds the books still, so that no drain commits while it pages a store that does not stand
still. It proves:

    spent         of each calendar and total balance = window_totals + entries not yet in the ledger
                  + what open holds spent at reserve (requests)
    held          of each balance = the lines of its open holds
    bounds        no balance below zero
    overdue_hold  no hold past its lease and grace
    window_total  = the lines of its rows, where raw rows remain
    rollup        = the sum of its rows, where raw rows remain
    closed_twice  no exchange has two closing entries, or two corrections
    dead_entry    no journal entry was put aside

A balance may move while it is looked at. A difference counts only if the balance's change counter stood still from
before the holds and the journal were read until after, and if a second look finds the same.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

from sqlalchemy import ColumnElement, Connection, case, distinct, func, or_, select

from llm_guard_mw.arithmetic import MS_PER_DAY
from llm_guard_mw.errors import LedgerUnavailable
from llm_guard_mw.ledger.database import Database, chunks
from llm_guard_mw.ledger.drain import DAILY, DEAD, EVENTS, LEASE_MS, TOTALS, Lease, drain, lease
from llm_guard_mw.ledger.queries import PRUNED_BEFORE, PRUNED_BEFORE_DAY
from llm_guard_mw.ledger.rows import CLOSING, COUNTS, SUMS, TOTALLED, UNCOUNTED, RowKey, TotalKey, decode_lines
from llm_guard_mw.model import EntryKind, JournalEntry, Kind, Line, Unit
from llm_guard_mw.stores.protocol import GRACE_MS, BalanceState, HoldState, Store, Unreadable

T = TypeVar("T")

_PAGE = 500
_DRAIN_MOST = 500
#: How often a difference on a balance that keeps moving is looked at again.
_ROUNDS = 8
#: Of each kind of finding, as many are told as somebody may read.
_TOLD_MAX = 100
#: How long a drainer at work, or the lease of a dead one, is waited for.
_PATIENCE_SECONDS = 3 * LEASE_MS / 1000
_KEEP_EVERY_SECONDS = LEASE_MS / 3000


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that does not add up."""

    kind: str
    balance: str | None
    expected: int | None
    actual: int | None
    message: str
    nanos: int = 0  # the difference, if it is money


@dataclass(slots=True)
class Report:
    findings: list[Finding] = field(default_factory=list)
    open_holds: int = 0


def audit(books: Database, store: Store, drain_all: Callable[[], object]) -> Report:
    """Look at everything once. It runs beside live processes."""
    while store.expire():
        pass
    drain_all()
    report = Report()
    with _books_held_still(books, store.epoch()) as keep:
        _check_store(books, store, keep, report)
    with books.reading() as connection:
        _check_totals(books, connection, report)
        _check_rollups(books, connection, report)
        _check_closings(connection, report)
        _check_dead(connection, report)
    return report


def drain_all(books: Database, zone: ZoneInfo, store: Store, consumer: str) -> int:
    """Drain until nothing is left of what was in the journal; live processes may write as fast as we read."""
    total = 0
    began, deadline = store.now(), time.monotonic() + _PATIENCE_SECONDS
    while True:
        drained = drain(books, zone, store, consumer, _DRAIN_MOST)
        total += drained or 0
        oldest = store.read_journal("", 1)
        if not oldest or oldest[0].at > began:
            return total
        if not drained:
            # Somebody has it in hand, alive or dead; or the books are held still.
            if time.monotonic() > deadline:
                raise LedgerUnavailable(f"ledger {books.name}: another process has been at its journal for too long")
            time.sleep(0.02)


@contextmanager
def _books_held_still(books: Database, epoch: str) -> Iterator[Callable[[], None]]:
    """No drain commits, for as long as `keep` is called now and then."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        with lease(books, epoch) as held:
            if held is not None:
                yield _keeper(books, held)
                return
        if time.monotonic() > deadline:
            raise LedgerUnavailable(f"ledger {books.name}: another process has been verifying it for too long")
        time.sleep(0.02)


def _keeper(books: Database, held: Lease) -> Callable[[], None]:
    kept = time.monotonic()

    def keep() -> None:
        nonlocal kept
        if time.monotonic() - kept < _KEEP_EVERY_SECONDS:
            return
        if not held.renew(books):
            raise LedgerUnavailable(f"ledger {books.name}: it was drained meanwhile; verify once more")
        kept = time.monotonic()

    return keep


# ---------------------------------------------------------------- the store against the books


@dataclass(frozen=True, slots=True)
class _Difference:
    kind: str
    balance: str
    expected: int
    actual: int
    changes: int


@dataclass(slots=True)
class _Moving:
    """What is under way: amounts by balance and window."""

    held: Counter[TotalKey] = field(default_factory=Counter)
    spent: Counter[TotalKey] = field(default_factory=Counter)  # not in window_totals yet
    units: dict[str, Unit] = field(default_factory=dict)


def _check_store(books: Database, store: Store, keep: Callable[[], None], report: Report) -> None:
    swept_at = store.now()
    states = {state.balance: state for state in _pages(store.balances, lambda state: state.balance, keep)}
    _check_missing(books, store, states, swept_at, report)
    suspects: dict[tuple[str, str], _Difference] = {}
    for look in range(_ROUNDS):
        holds = list(_pages(store.holds, lambda hold: hold.exchange, keep))
        if look == 0:
            report.open_holds = len(holds)
            report.findings.extend(_overdue(holds, swept_at))
        moving = _under_way(books, store, holds, keep)
        differences = list(_differences(books, states.values(), moving, keep))
        changes_now = {state.balance: state.changes for state in _peek(store, {d.balance for d in differences}, keep)}
        quiet = {(d.balance, d.kind): d for d in differences if changes_now.get(d.balance) == d.changes}
        certain = {key for key, difference in quiet.items() if suspects.get(key) == difference}
        report.findings.extend(_told(quiet[key], moving) for key in sorted(certain))
        unsure = {d.balance for d in differences if (d.balance, d.kind) not in certain}
        if not unsure:
            return
        suspects = quiet
        states = {state.balance: state for state in _peek(store, unsure, keep)}


def _pages(read: Callable[[str, int], Sequence[T]], name: Callable[[T], str], keep: Callable[[], None]) -> Iterator[T]:
    after = ""
    while True:
        page = read(after, _PAGE)
        keep()
        yield from page
        if len(page) < _PAGE:  # one more would run after what live processes add meanwhile
            return
        after = name(page[-1])


def _peek(store: Store, names: Iterable[str], keep: Callable[[], None]) -> Iterator[BalanceState]:
    for chunk in chunks(sorted(names)):
        keep()
        yield from store.peek(chunk)


def _overdue(holds: Sequence[HoldState], swept_at: int) -> Iterator[Finding]:
    overdue = [hold for hold in holds if hold.lease_end + GRACE_MS < swept_at]
    for hold in overdue[:_TOLD_MAX]:
        late = swept_at - hold.lease_end
        message = f"the hold of exchange {hold.exchange} is {late} ms past its lease, and no sweep has booked it"
        yield Finding("overdue_hold", None, hold.lease_end, swept_at, message)


def _under_way(books: Database, store: Store, holds: Sequence[HoldState], keep: Callable[[], None]) -> _Moving:
    moving = _Moving()
    for hold in holds:
        for line in hold.lines:
            moving.units[line.balance] = line.unit
            side = moving.spent if line.spent else moving.held
            side[line.balance, line.window_start] += line.amount
    for line in _waiting_lines(books, store, keep):
        moving.units[line.balance] = line.unit
        moving.spent[line.balance, line.window_start] += line.amount
    return moving


def _waiting_lines(books: Database, store: Store, keep: Callable[[], None]) -> Iterator[Line]:
    """The lines of the entries that are not in the books: those may still be in the journal after their commit."""
    for page in _journal_pages(store):
        keep()
        with books.reading() as connection:
            rows = _keys_known(connection, [e.event.call_id for e in page if not isinstance(e, Unreadable)])
            dead = set(connection.scalars(select(DEAD.c.id).where(DEAD.c.id.in_([entry.id for entry in page]))))
        for entry in page:
            if entry.id in dead:
                continue
            if isinstance(entry, Unreadable):
                yield from entry.lines
                continue
            event = entry.event
            if (event.call_id, event.attempt, entry.kind, event.price_version) not in rows:
                yield from entry.lines


def _journal_pages(store: Store) -> Iterator[Sequence[JournalEntry | Unreadable]]:
    after = ""
    while page := store.read_journal(after, _PAGE):
        yield page
        if len(page) < _PAGE:
            return
        after = page[-1].position


def _keys_known(connection: Connection, call_ids: Sequence[str]) -> set[RowKey]:
    columns = (EVENTS.c.call_id, EVENTS.c.attempt, EVENTS.c.kind, EVENTS.c.price_version)
    found = connection.execute(select(*columns).where(EVENTS.c.call_id.in_(set(call_ids))))
    return {(call_id, attempt, kind, price_version) for call_id, attempt, kind, price_version in found}


def _differences(
    books: Database, states: Iterable[BalanceState], moving: _Moving, keep: Callable[[], None]
) -> Iterator[_Difference]:
    for chunk in chunks(states):
        keep()
        totals = _totals(books, [state.balance for state in chunk if state.kind in TOTALLED], moving)
        for state in chunk:
            if state.kind is Kind.CONCURRENT:
                continue
            key = (state.balance, state.window_start)
            if state.held != moving.held[key]:
                yield _Difference("held", state.balance, moving.held[key], state.held, state.changes)
            if state.kind in TOTALLED and state.spent != totals.get(key, 0) + moving.spent[key]:
                expected = totals.get(key, 0) + moving.spent[key]
                yield _Difference("spent", state.balance, expected, state.spent, state.changes)
            if state.spent < 0 or state.held < 0:
                yield _Difference("bounds", state.balance, 0, min(state.spent, state.held), state.changes)


def _totals(books: Database, balances: Sequence[str], moving: _Moving) -> dict[TotalKey, int]:
    totals: dict[TotalKey, int] = {}
    if balances:
        with books.reading() as connection:
            for row in connection.execute(select(TOTALS).where(TOTALS.c.balance.in_(balances))):
                totals[row.balance, row.window_start] = row.spent
                moving.units[row.balance] = Unit(row.unit)
    return totals


def _check_missing(
    books: Database, store: Store, states: dict[str, BalanceState], swept_at: int, report: Report
) -> None:
    """Balances that the books know and the store must not have forgotten: totals, and windows that began today."""
    recent = or_(TOTALS.c.window_start == 0, TOTALS.c.window_start > swept_at - MS_PER_DAY)
    with books.reading() as connection:
        found = connection.execute(select(TOTALS).where(recent, TOTALS.c.spent != 0)).all()
    for row in [row for row in found if row.balance not in states][:_TOLD_MAX]:
        if not store.peek([row.balance]):
            message = f"the books have {row.spent} spent on {row.balance}, and the store has no such balance"
            nanos = abs(row.spent) if row.unit == Unit.USD else 0
            report.findings.append(Finding("spent", row.balance, row.spent, 0, message, nanos))


_TOLD = {
    "spent": "the store has {actual} spent on {balance}, the books and what waits for them say {expected}",
    "held": "the store has {actual} held on {balance}, its open holds add up to {expected}",
    "bounds": "{balance} stands at {actual}, which no balance may",
}


def _told(difference: _Difference, moving: _Moving) -> Finding:
    message = _TOLD[difference.kind].format(
        actual=difference.actual, expected=difference.expected, balance=difference.balance
    )
    money = moving.units.get(difference.balance) is Unit.USD or f":{Unit.USD}:" in difference.balance
    nanos = abs(difference.expected - difference.actual) if money else 0
    return Finding(difference.kind, difference.balance, difference.expected, difference.actual, message, nanos)


# ---------------------------------------------------------------- the books against themselves


def _check_totals(books: Database, connection: Connection, report: Report) -> None:
    pruned = int(books.fact(connection, PRUNED_BEFORE) or 0)
    sums: Counter[TotalKey] = Counter()
    usd: set[str] = set()
    for table in (EVENTS, DEAD):
        for (encoded,) in connection.execute(select(table.c.lines).execution_options(yield_per=_PAGE)):
            for line in decode_lines(encoded):
                if line.kind in TOTALLED and _has_all_rows(line.window_start, pruned):
                    sums[line.balance, line.window_start] += line.amount
                    if line.unit is Unit.USD:
                        usd.add(line.balance)
    wrong: list[Finding] = []
    for row in connection.execute(select(TOTALS).execution_options(yield_per=_PAGE)):
        if not _has_all_rows(row.window_start, pruned):
            continue
        expected = sums.pop((row.balance, row.window_start), 0)
        if expected != row.spent:
            wrong.append(_wrong_total(row.balance, row.window_start, expected, row.spent, row.unit == Unit.USD))
    for (balance, window_start), expected in sums.items():
        if expected:
            wrong.append(_wrong_total(balance, window_start, expected, 0, balance in usd))
    report.findings.extend(wrong)


def _has_all_rows(window_start: int, pruned: int) -> bool:
    # An hour to spare: the rows' times are those of processes, whose clocks may differ.
    return pruned == 0 or window_start * 1000 >= pruned + 3_600_000_000


def _wrong_total(balance: str, window_start: int, expected: int, actual: int, money: bool) -> Finding:
    message = f"window_totals has {actual} for {balance} from {window_start}, its rows add up to {expected}"
    return Finding("window_total", balance, expected, actual, message, abs(expected - actual) if money else 0)


def _check_rollups(books: Database, connection: Connection, report: Report) -> None:
    first_day = books.fact(connection, PRUNED_BEFORE_DAY) or ""
    rows = _summed_rows(first_day)
    apart = or_(*(DAILY.c[name].is_distinct_from(rows.c[name]) for name in (*COUNTS, *SUMS)))
    columns = [DAILY.c.day, DAILY.c.cost_nanos, rows.c.cost_nanos, DAILY.c.rollup]
    joined = DAILY.outerjoin(rows, DAILY.c.rollup == rows.c.rollup)
    wrong = select(*columns).select_from(joined).where(DAILY.c.day >= first_day, apart).limit(_TOLD_MAX)
    for day, actual, expected, rollup in connection.execute(wrong):
        message = f"daily_usage {rollup} of {day} is not the sum of its rows"
        report.findings.append(Finding("rollup", None, _whole(expected), _whole(actual), message))
    columns = [rows.c.rollup, rows.c.cost_nanos]
    joined = rows.outerjoin(DAILY, DAILY.c.rollup == rows.c.rollup)
    missing = select(*columns).select_from(joined).where(DAILY.c.rollup.is_(None)).limit(_TOLD_MAX)
    for rollup, expected in connection.execute(missing):
        message = f"daily_usage {rollup} is missing, though there are rows of it"
        report.findings.append(Finding("rollup", None, _whole(expected), None, message))


def _summed_rows(first_day: str) -> Any:  # a Subquery; its columns are known at run time only
    kind = EVENTS.c.kind
    refused = kind == EntryKind.REFUSED
    closing = kind.in_(tuple(CLOSING))
    counts: dict[str, ColumnElement[Any]] = {
        "calls": func.count(distinct(case((closing, EVENTS.c.call_id)))),
        "exchanges": func.count(case((closing, 1))),
        "refused": func.sum(case((refused, EVENTS.c["count"]), else_=0)),
    }
    sums = {name: func.sum(case((~refused, EVENTS.c[name]))) for name in SUMS}
    return (
        select(EVENTS.c.rollup, *(column.label(name) for name, column in (counts | sums).items()))
        .where(kind != UNCOUNTED, EVENTS.c.day >= first_day)
        .group_by(EVENTS.c.rollup)
        .subquery()
    )


def _whole(value: Any) -> int | None:
    """Postgres sums BIGINT as NUMERIC."""
    return None if value is None else int(value)


def _check_closings(connection: Connection, report: Report) -> None:
    closings = (*CLOSING, EntryKind.RELEASE)
    closed = func.count(case((EVENTS.c.kind.in_(closings), 1)))
    corrected = func.count(case((EVENTS.c.kind == EntryKind.CORRECTION, 1)))
    twice = (
        select(EVENTS.c.call_id, EVENTS.c.attempt, closed, corrected)
        .where(EVENTS.c.kind.in_((*closings, EntryKind.CORRECTION)))
        .group_by(EVENTS.c.call_id, EVENTS.c.attempt)
        .having(or_(closed > 1, corrected > 1))
        .limit(_TOLD_MAX)
    )
    for call_id, attempt, closings_found, corrections in connection.execute(twice):
        message = f"exchange {call_id}/{attempt} has {closings_found} closing entries and {corrections} corrections"
        report.findings.append(Finding("closed_twice", None, 1, max(closings_found, corrections), message))


def _check_dead(connection: Connection, report: Report) -> None:
    for entry_id, error in connection.execute(select(DEAD.c.id, DEAD.c.error).order_by(DEAD.c.id).limit(_TOLD_MAX)):
        message = f"journal entry {entry_id} could not become a row and is in dead_entries: {error}"
        report.findings.append(Finding("dead_entry", None, None, None, message))
