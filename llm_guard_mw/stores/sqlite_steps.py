"""The steps of the SQLite store: each is one verb of the protocol inside an open transaction.

Plain functions over a connection and a time. They read all, check all, then write all; a step that raises has
its transaction rolled back by the caller (`sqlite.py`), which also commits and answers.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterable, Sequence

import msgspec
from msgspec.structs import replace

from llm_guard_mw.arithmetic import MS_PER_DAY, drain
from llm_guard_mw.model import FOREVER, Demand, EntryKind, JournalEntry, Kind, Line, Offer, Unit, Window
from llm_guard_mw.stores.journal import read_event
from llm_guard_mw.stores.protocol import (
    ABANDONED_TOMBSTONE_MS,
    LATE_SETTLE_MS,
    TOMBSTONE_MS,
    BalanceState,
    ClockApart,
    Granted,
    HoldState,
    Moved,
    Refused,
    Renewed,
    Reserve,
    Settled,
    Settlement,
    Standing,
    TooLate,
    Unreadable,
)

#: Raised by one for each change of the tables below; an unknown (newer) one is refused.
SCHEMA_VERSION = 2

_FIRST = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE balances (
    name TEXT PRIMARY KEY, kind TEXT NOT NULL, window_start INTEGER NOT NULL,
    spent INTEGER NOT NULL, held INTEGER NOT NULL,                             -- a bucket's spent is its `used`
    rem INTEGER NOT NULL, stamp INTEGER NOT NULL,                              -- buckets: see arithmetic.drain
    rate INTEGER NOT NULL, period INTEGER NOT NULL, tick INTEGER NOT NULL,     -- as of the latest reserve
    changes INTEGER NOT NULL, expires INTEGER NOT NULL                         -- ms: then it says nothing any more
) STRICT, WITHOUT ROWID;
CREATE INDEX balances_expires ON balances (expires);
CREATE TABLE members (
    name TEXT NOT NULL, call TEXT NOT NULL, lease_end INTEGER NOT NULL, PRIMARY KEY (name, call)
) STRICT, WITHOUT ROWID;
CREATE INDEX members_call ON members (call);
CREATE INDEX members_lease_end ON members (lease_end);
CREATE TABLE holds (
    exchange TEXT PRIMARY KEY, call TEXT NOT NULL, lease_end INTEGER NOT NULL,
    lines BLOB NOT NULL, offer INTEGER NOT NULL, cap INTEGER NOT NULL, draft BLOB NOT NULL, took INTEGER NOT NULL
) STRICT;
CREATE INDEX holds_lease_end ON holds (lease_end);
CREATE TABLE tombstones (
    exchange TEXT PRIMARY KEY, ending TEXT NOT NULL, until INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX tombstones_until ON tombstones (until);
CREATE TABLE journal (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, at INTEGER NOT NULL,
    lines BLOB NOT NULL, payload BLOB NOT NULL, offer INTEGER, cap INTEGER
) STRICT;
CREATE TABLE scope_values (
    parent TEXT NOT NULL, scope TEXT NOT NULL, value TEXT NOT NULL, day INTEGER NOT NULL,
    PRIMARY KEY (parent, scope, value)
) STRICT, WITHOUT ROWID;
CREATE INDEX scope_values_day ON scope_values (parent, scope, day);
"""
_SECOND = """
CREATE TABLE deliveries (                                                      -- who has which entries in hand
    first INTEGER PRIMARY KEY, last INTEGER NOT NULL, consumer TEXT NOT NULL, at INTEGER NOT NULL
) STRICT;
"""
#: What each version added to the one before.
SCHEMAS = (_FIRST, _SECOND)

#: A time that is so far ahead was written by a clock that was wrong.
_CLOCK_WRONG_MS = 60_000
_KINDS = frozenset(EntryKind)

_TAKEN = "taken"
_CORRECTED = "corrected"

_encode = msgspec.json.Encoder().encode
_decode_lines = msgspec.json.Decoder(tuple[tuple[str, Kind, Unit, int, int, bool], ...]).decode


def create(db: sqlite3.Connection, version: int) -> None:
    """Make the tables that `version` has not; new contents get an identity of their own."""
    for schema in SCHEMAS[version:]:
        for statement in schema.split(";\n"):
            if statement.strip():
                db.execute(statement)
    if version == 0:
        db.execute("INSERT INTO meta VALUES ('epoch', ?)", (secrets.token_hex(8),))
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


# ---------------------------------------------------------------- reserve


def reserve(db: sqlite3.Connection, now: int, wish: Reserve) -> Granted | Refused | ClockApart | TooLate:
    """Grant the first offer that fits; a refusal sweeps what is due and tries once more."""
    if wish.not_after is not None and now > wish.not_after:
        return TooLate(now)
    hold = db.execute(
        "SELECT lines, offer, cap, lease_end, took FROM holds WHERE exchange = ?", (wish.exchange,)
    ).fetchone()
    if hold is not None:
        return _granted_before(db, now, wish, *hold)
    if _tombstone(db, wish.exchange) is not None:
        return TooLate(now)
    outcome = _attempt(db, now, wish)
    if isinstance(outcome, Refused) and _anything_due(db, now):
        expire(db, now)
        outcome = _attempt(db, now, wish)
    return outcome


class _Balance:
    """A balance as this transaction sees it: rolled to the present window, drained to now, not yet written."""

    __slots__ = (
        "changes",
        "held",
        "inside",
        "kind",
        "name",
        "period",
        "rate",
        "rem",
        "spent",
        "stamp",
        "tick",
        "window_end",
        "window_start",
    )

    def __init__(self, name: str, kind: Kind, row: Sequence[int] | None) -> None:
        self.name = name
        self.kind = kind
        self.window_end: int | None = None
        self.inside = False  # concurrency: the call that asks is counted already
        if row is None:
            row = (0, 0, 0, 0, 0, 0, 0, 1, 0)
        (
            self.window_start,
            self.spent,
            self.held,
            self.rem,
            self.stamp,
            self.rate,
            self.period,
            self.tick,
            self.changes,
        ) = row

    def standing(self) -> Standing:
        return Standing(self.spent, self.held, self.rem, self.window_start, self.window_end)

    def drain_to(self, now: int) -> None:
        """Bring a bucket up to date. One that no reserve has described yet has no rate, and waits."""
        ticks = now // self.tick
        if self.rate:
            self.spent, self.rem, self.stamp = drain(self.spent, self.rem, self.stamp, ticks, self.rate, self.period)
        else:
            self.stamp = max(self.stamp, ticks)

    def expires(self, now: int) -> int:
        """When nothing can be told from this balance any more (with a day to spare)."""
        if self.kind is Kind.CALENDAR:
            return (self.window_end or now + 32 * MS_PER_DAY) + MS_PER_DAY
        if self.kind is Kind.BUCKET and self.rate:
            return now + (self.spent * self.period // self.rate) * self.tick + MS_PER_DAY
        return FOREVER


def _load(db: sqlite3.Connection, name: str, kind: Kind) -> _Balance:
    row = db.execute(
        "SELECT window_start, spent, held, rem, stamp, rate, period, tick, changes FROM balances WHERE name = ?",
        (name,),
    ).fetchone()
    return _Balance(name, kind, row)


def _write(db: sqlite3.Connection, balance: _Balance, now: int) -> None:
    balance.changes += 1
    db.execute(
        "INSERT INTO balances VALUES (?,?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT (name) DO UPDATE SET"
        " window_start = excluded.window_start, spent = excluded.spent, held = excluded.held, rem = excluded.rem,"
        " stamp = excluded.stamp, rate = excluded.rate, period = excluded.period, tick = excluded.tick,"
        " changes = excluded.changes, expires = excluded.expires",
        (
            balance.name,
            balance.kind,
            balance.window_start,
            balance.spent,
            balance.held,
            balance.rem,
            balance.stamp,
            balance.rate,
            balance.period,
            balance.tick,
            balance.changes,
            balance.expires(now),
        ),
    )


def _window_now(windows: Sequence[Window], now: int) -> Window | None:
    for window in windows:
        if window.start <= now < window.end:
            return window
    return None


def _as_of_now(
    db: sqlite3.Connection, now: int, call: str, demand: Demand, seen: dict[str, _Balance]
) -> _Balance | None:
    """The balance a demand speaks of, up to date; None when none of its windows contains the present."""
    balance = seen.get(demand.balance)
    if balance is not None:
        return balance
    if demand.kind is Kind.CONCURRENT:
        balance = _Balance(demand.balance, demand.kind, None)
        balance.spent, balance.inside = _members(db, now, demand.balance, call)
    else:
        balance = _load(db, demand.balance, demand.kind)
        if demand.kind is Kind.CALENDAR:
            window = _window_now(demand.windows, now)
            if window is None:
                return None
            if balance.window_start < window.start:
                balance.window_start, balance.spent, balance.held = window.start, 0, 0
            balance.window_end = next((w.end for w in demand.windows if w.start == balance.window_start), None)
        elif demand.kind is Kind.BUCKET:
            # A booking may have opened it, in ms, before anybody said in which ticks it drains.
            balance.stamp = balance.stamp * balance.tick // demand.tick
            balance.rate, balance.period, balance.tick = demand.rate, demand.period, demand.tick
            balance.drain_to(now)
    seen[demand.balance] = balance
    return balance


def _members(db: sqlite3.Connection, now: int, name: str, call: str) -> tuple[int, bool]:
    """How many calls are counted, and whether this one is among them."""
    db.execute("DELETE FROM members WHERE name = ? AND lease_end <= ?", (name, now))
    count, own = db.execute("SELECT count(*), total(call = ?) FROM members WHERE name = ?", (call, name)).fetchone()
    return count, own > 0


def _attempt(db: sqlite3.Connection, now: int, wish: Reserve) -> Granted | Refused | ClockApart:
    taken = _hold_lines(db, wish.takes) if wish.takes else None
    freed = {(line.balance, line.window_start): line.amount for line in taken or () if not line.spent}
    seen: dict[str, _Balance] = {}
    all_standings: list[tuple[Standing, ...]] = []
    all_short: list[tuple[int, ...]] = []
    for index, offer in enumerate(wish.offers):
        balances = []
        for demand in offer.demands:
            balance = _as_of_now(db, now, wish.call, demand, seen)
            if balance is None:
                return ClockApart(now)
            balances.append(balance)
        # What is forced keeps its cap, and hears what would have lowered or refused it.
        cap, short = _fit(offer, balances, freed, offer.cap if wish.force else offer.at_least)
        if not short or wish.force:
            return _grant(db, now, wish, index, offer.cap if wish.force else cap, balances, taken, short)
        all_standings.append(tuple(_without(balance, freed) for balance in balances))
        all_short.append(short)
    return Refused(tuple(all_standings), tuple(all_short), now)


def _without(balance: _Balance, freed: dict[tuple[str, int], int]) -> Standing:
    """How a balance stands for a taker: as if what it takes over were not held."""
    standing = balance.standing()
    own = freed.get((balance.name, balance.window_start), 0)
    return replace(standing, held=standing.held - own) if own else standing


def _fit(
    offer: Offer, balances: Sequence[_Balance], freed: dict[tuple[str, int], int], at_least: int
) -> tuple[int, tuple[int, ...]]:
    """The largest output cap that every balance can bear, and the demands that cannot even bear the least."""
    cap = offer.cap
    short: list[int] = []
    for index, (demand, balance) in enumerate(zip(offer.demands, balances, strict=True)):
        room = demand.ceiling - balance.spent - balance.held + freed.get((demand.balance, balance.window_start), 0)
        if balance.inside or demand.fixed + demand.per_output * cap <= room:
            continue
        bearable = (room - demand.fixed) // demand.per_output if demand.per_output else -1
        if bearable < at_least:
            short.append(index)
        else:
            cap = bearable
    return cap, tuple(short)


def _grant(
    db: sqlite3.Connection,
    now: int,
    wish: Reserve,
    index: int,
    cap: int,
    balances: Sequence[_Balance],
    taken: tuple[Line, ...] | None,
    short: tuple[int, ...],
) -> Granted:
    offer = wish.offers[index]
    lease_end = now + wish.lease_ms
    touched = {balance.name: balance for balance in balances}
    lines: list[Line] = []
    if taken is not None and wish.takes is not None:
        for line in taken:
            if line.spent:
                lines.append(line)
            else:
                balance = touched.get(line.balance) or _load(db, line.balance, line.kind)
                touched[line.balance] = balance
                if balance.window_start == line.window_start:
                    balance.held -= line.amount
        _end_hold(db, now, wish.takes, _TAKEN, TOMBSTONE_MS)
    for demand, balance in zip(offer.demands, balances, strict=True):
        amount = demand.fixed + demand.per_output * cap
        if demand.kind is Kind.CONCURRENT:
            db.execute(
                "INSERT INTO members VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET lease_end = excluded.lease_end",
                (demand.balance, wish.call, lease_end),
            )
            balance.spent += not balance.inside
            continue
        if demand.spent_at_reserve:
            balance.spent += amount
        else:
            balance.held += amount
        lines.append(
            Line(demand.balance, demand.kind, demand.unit, balance.window_start, amount, demand.spent_at_reserve)
        )
    for balance in touched.values():
        if balance.kind is not Kind.CONCURRENT:
            _write(db, balance, now)
    db.execute(
        "INSERT INTO holds VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (wish.exchange, wish.call, lease_end, _encode_lines(lines), index, cap, wish.draft, taken is not None),
    )
    standings = tuple(balance.standing() for balance in balances)
    return Granted(index, cap, tuple(lines), standings, lease_end, now, short, took=taken is not None)


def _granted_before(
    db: sqlite3.Connection, now: int, wish: Reserve, lines: bytes, offer: int, cap: int, lease_end: int, took: int
) -> Granted | ClockApart:
    """The same answer again, for a caller that lost the first one."""
    seen: dict[str, _Balance] = {}
    standings = []
    for demand in wish.offers[offer].demands:
        balance = _as_of_now(db, now, wish.call, demand, seen)
        if balance is None:
            return ClockApart(now)
        standings.append(balance.standing())
    return Granted(offer, cap, _lines(lines), tuple(standings), lease_end, now, took=bool(took))


# ---------------------------------------------------------------- settle, release, expire: one path


def settle(db: sqlite3.Connection, now: int, settlement: Settlement) -> Settled:
    """Close an exchange, once, whatever has become of its hold; a replayed one moves its mark in the same step."""
    replay = settlement.replay
    if replay is None:
        return _settle(db, now, settlement)
    if replayed(db, now, replay.source) >= replay.position:
        return Settled.AGAIN
    outcome = _settle(db, now, settlement)
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_mark(replay.source), str(replay.position)))
    return outcome


def replayed(db: sqlite3.Connection, now: int, source: str) -> int:
    row = db.execute("SELECT value FROM meta WHERE key = ?", (_mark(source),)).fetchone()
    return 0 if row is None else int(row[0])


def end_replay(db: sqlite3.Connection, now: int, source: str) -> None:
    db.execute("DELETE FROM meta WHERE key = ?", (_mark(source),))


def _mark(source: str) -> str:
    return f"replayed:{source}"


def _settle(db: sqlite3.Connection, now: int, settlement: Settlement) -> Settled:
    tombstone = _tombstone(db, settlement.exchange)
    if tombstone is not None:
        return _settle_abandoned(db, now, settlement) if tombstone == EntryKind.ABANDONED else Settled.AGAIN
    held = _hold_lines(db, settlement.exchange)
    if held is not None:
        moves = settlement.moved or _given_back(held)
        for moved in moves:
            _move(db, now, moved.line, give_back=moved.line.amount, book=moved.actual)
        _end_hold(db, now, settlement.exchange, settlement.kind, TOMBSTONE_MS)
        _enter(db, now, settlement.exchange, settlement.kind, _actual(moves), settlement.payload)
        return Settled.DONE
    if settlement.kind is EntryKind.RELEASE and not settlement.moved and not settlement.fresh:
        return Settled.AGAIN
    if not settlement.fresh and now > settlement.lease_end + LATE_SETTLE_MS:
        return Settled.TOO_LATE
    for moved in settlement.moved:
        _move(db, now, moved.line, give_back=0, book=moved.actual, roll=True)
    kind = settlement.kind if settlement.fresh else EntryKind.ORPHAN
    _bury(db, now, settlement.exchange, kind, TOMBSTONE_MS)
    _enter(db, now, settlement.exchange, kind, _actual(settlement.moved), settlement.payload)
    return Settled.DONE if settlement.fresh else Settled.ORPHAN


def _settle_abandoned(db: sqlite3.Connection, now: int, settlement: Settlement) -> Settled:
    """The hold was booked when its lease ran out; its owner, late, says what it really was."""
    if settlement.kind is EntryKind.RELEASE and not settlement.moved:
        return Settled.AGAIN  # it does not know what was held, so it cannot say what to give back
    if now > settlement.lease_end + LATE_SETTLE_MS:
        return Settled.TOO_LATE
    deltas = []
    for moved in settlement.moved:
        line = moved.line
        delta = moved.actual - line.amount
        if not delta:
            continue
        _move(db, now, line, give_back=0, book=delta)
        deltas.append(Line(line.balance, line.kind, line.unit, line.window_start, delta, line.spent))
    _bury(db, now, settlement.exchange, _CORRECTED, ABANDONED_TOMBSTONE_MS)
    _enter(db, now, settlement.exchange, EntryKind.CORRECTION, deltas, settlement.payload)
    return Settled.CORRECTED


def _given_back(lines: Iterable[Line]) -> tuple[Moved, ...]:
    """What a release means for lines whose owner never learnt them: the money back, the requests spent."""
    return tuple(Moved(line, line.amount if line.spent else 0) for line in lines)


def _actual(moved: Iterable[Moved]) -> list[Line]:
    return [
        Line(m.line.balance, m.line.kind, m.line.unit, m.line.window_start, m.actual, m.line.spent)
        for m in moved
        if m.actual
    ]


def _move(db: sqlite3.Connection, now: int, line: Line, *, give_back: int, book: int, roll: bool = False) -> None:
    """Take `give_back` off what is held and add `book` to what is spent, on the line's own window.

    A line of an older window moves nothing here (its window has its total in the ledger), but it counts as a
    change. `roll` lets a booking without a hold open the window it speaks of. What was spent at reserve is
    part of `spent` already, so only the difference is booked.
    """
    balance = _load(db, line.balance, line.kind)
    if line.kind is Kind.BUCKET:
        balance.drain_to(now)
    elif roll and line.window_start > balance.window_start:
        balance.window_start, balance.spent, balance.held = line.window_start, 0, 0
    if line.window_start == balance.window_start:
        if line.spent:
            book -= give_back
        else:
            balance.held -= give_back
        balance.spent = max(0, balance.spent + book)
    _write(db, balance, now)


def expire(db: sqlite3.Connection, now: int, most: int = 1000) -> int:
    """Book the holds whose lease has run out, oldest first, and drop what has had its time."""
    due = db.execute(
        "SELECT exchange, lines, offer, cap, draft FROM holds WHERE lease_end <= ?"
        " ORDER BY lease_end, exchange LIMIT ?",
        (now, most),
    ).fetchall()
    for exchange, encoded, offer, cap, draft in due:
        lines = _lines(encoded)
        for line in lines:
            _move(db, now, line, give_back=line.amount, book=line.amount)
        _end_hold(db, now, exchange, EntryKind.ABANDONED, ABANDONED_TOMBSTONE_MS)
        _enter(db, now, exchange, EntryKind.ABANDONED, lines, draft, offer, cap)
    db.execute("DELETE FROM tombstones WHERE until < ?", (now,))
    db.execute("DELETE FROM members WHERE lease_end <= ?", (now,))
    return len(due)


def _anything_due(db: sqlite3.Connection, now: int) -> bool:
    return db.execute("SELECT 1 FROM holds WHERE lease_end <= ? LIMIT 1", (now,)).fetchone() is not None


def _tombstone(db: sqlite3.Connection, exchange: str) -> str | None:
    row = db.execute("SELECT ending FROM tombstones WHERE exchange = ?", (exchange,)).fetchone()
    return None if row is None else str(row[0])


def _end_hold(db: sqlite3.Connection, now: int, exchange: str, ending: str, keep_ms: int) -> None:
    db.execute("DELETE FROM holds WHERE exchange = ?", (exchange,))
    _bury(db, now, exchange, ending, keep_ms)


def _bury(db: sqlite3.Connection, now: int, exchange: str, ending: str, keep_ms: int) -> None:
    db.execute("INSERT OR REPLACE INTO tombstones VALUES (?, ?, ?)", (exchange, ending, now + keep_ms))


def _enter(
    db: sqlite3.Connection,
    now: int,
    exchange: str,
    kind: EntryKind,
    lines: Sequence[Line],
    payload: bytes,
    offer: int | None = None,
    cap: int | None = None,
) -> None:
    db.execute(
        "INSERT INTO journal (id, kind, at, lines, payload, offer, cap) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (f"{exchange}/{kind}", kind, now, _encode_lines(lines), payload, offer, cap),
    )


def _encode_lines(lines: Iterable[Line]) -> bytes:
    return _encode([(x.balance, x.kind, x.unit, x.window_start, x.amount, x.spent) for x in lines])


def _lines(encoded: bytes) -> tuple[Line, ...]:
    return tuple(Line(*fields) for fields in _decode_lines(encoded))


def _hold_lines(db: sqlite3.Connection, exchange: str) -> tuple[Line, ...] | None:
    row = db.execute("SELECT lines FROM holds WHERE exchange = ?", (exchange,)).fetchone()
    return None if row is None else _lines(row[0])


# ---------------------------------------------------------------- leases, calls, scope values


def renew(db: sqlite3.Connection, now: int, exchanges: Sequence[str], calls: Sequence[str], lease_ms: int) -> Renewed:
    lease_end = now + lease_ms
    gone = []
    for exchange in exchanges:
        changed = db.execute("UPDATE holds SET lease_end = ? WHERE exchange = ?", (lease_end, exchange)).rowcount
        if not changed:
            gone.append(exchange)
    db.executemany("UPDATE members SET lease_end = ? WHERE call = ?", [(lease_end, call) for call in calls])
    return Renewed(lease_end, tuple(gone))


def close_call(db: sqlite3.Connection, now: int, call: str) -> None:
    db.execute("DELETE FROM members WHERE call = ?", (call,))


def admit(db: sqlite3.Connection, now: int, parent: str, scope: str, value: str, day: int, most: int) -> bool:
    known = db.execute(
        "SELECT 1 FROM scope_values WHERE parent = ? AND scope = ? AND value = ?", (parent, scope, value)
    ).fetchone()
    if known is not None:
        return True
    (today,) = db.execute(
        "SELECT count(*) FROM scope_values WHERE parent = ? AND scope = ? AND day = ?", (parent, scope, day)
    ).fetchone()
    if today >= most:
        return False
    db.execute("INSERT INTO scope_values VALUES (?, ?, ?, ?)", (parent, scope, value, day))
    return True


def forget(db: sqlite3.Connection, now: int, most: int = 1000) -> int:
    return db.execute(
        "DELETE FROM balances WHERE name IN"
        " (SELECT name FROM balances WHERE expires <= ? AND held = 0 ORDER BY expires LIMIT ?)",
        (now, most),
    ).rowcount


# ---------------------------------------------------------------- reading


_STATE = "SELECT name, kind, window_start, spent, held, changes, rem, stamp * tick FROM balances"


def _state(row: tuple[str, str, int, int, int, int, int, int]) -> BalanceState:
    name, kind, *rest = row
    return BalanceState(name, Kind(kind), *rest)


def peek(db: sqlite3.Connection, now: int, balances: Sequence[str]) -> tuple[BalanceState, ...]:
    rows = (db.execute(_STATE + " WHERE name = ?", (name,)).fetchone() for name in balances)
    return tuple(_state(row) for row in rows if row is not None)


def balances(db: sqlite3.Connection, now: int, after: str, count: int) -> tuple[BalanceState, ...]:
    rows = db.execute(_STATE + " WHERE name > ? ORDER BY name LIMIT ?", (after, count))
    return tuple(_state(row) for row in rows)


def holds(db: sqlite3.Connection, now: int, after: str, count: int) -> tuple[HoldState, ...]:
    rows = db.execute(
        "SELECT exchange, call, lease_end, lines FROM holds WHERE exchange > ? ORDER BY exchange LIMIT ?",
        (after, count),
    )
    return tuple(HoldState(exchange, call, lease_end, _lines(lines)) for exchange, call, lease_end, lines in rows)


def append(db: sqlite3.Connection, now: int, entry_id: str, payload: bytes) -> None:
    db.execute(
        # An insert that is ignored would use up a number of the sequence, which the journal's length counts by.
        "INSERT INTO journal (id, kind, at, lines, payload) SELECT ?, ?, ?, ?, ?"
        " WHERE NOT EXISTS (SELECT 1 FROM journal WHERE id = ?)",
        (entry_id, EntryKind.REFUSED, now, b"[]", payload, entry_id),
    )


def take_journal(
    db: sqlite3.Connection, now: int, consumer: str, count: int, idle_ms: int
) -> tuple[JournalEntry | Unreadable, ...]:
    """A delivery is a range of the journal in somebody's hands: the rows themselves are not written for it."""
    in_hand = db.execute(
        # A time far ahead was written by a clock that was wrong.
        "SELECT first, last FROM deliveries WHERE consumer = ? OR at <= ? OR at > ? ORDER BY consumer <> ?, first",
        (consumer, now - idle_ms, now + _CLOCK_WRONG_MS, consumer),
    ).fetchall()
    for first, last in in_hand:
        entries = _page(db, "seq BETWEEN ? AND ?", (first, last), count)
        if entries:
            db.execute("UPDATE deliveries SET consumer = ?, at = ? WHERE first = ?", (consumer, now, first))
            return entries
        db.execute("DELETE FROM deliveries WHERE first = ?", (first,))
    (taken,) = db.execute("SELECT coalesce(max(last), 0) FROM deliveries").fetchone()
    entries = _page(db, "seq > ?", (taken,), count)
    if entries:
        first, last = int(entries[0].position), int(entries[-1].position)
        db.execute("INSERT INTO deliveries VALUES (?, ?, ?, ?)", (first, last, consumer, now))
    return entries


def drop_journal(db: sqlite3.Connection, now: int, positions: Sequence[str]) -> None:
    db.executemany("DELETE FROM journal WHERE seq = ?", [(int(position),) for position in positions])
    db.execute("DELETE FROM deliveries WHERE NOT EXISTS (SELECT 1 FROM journal WHERE seq BETWEEN first AND last)")


def read_journal(db: sqlite3.Connection, now: int, after: str, count: int) -> tuple[JournalEntry | Unreadable, ...]:
    return _page(db, "seq > ?", (int(after or 0),), count)


def _page(
    db: sqlite3.Connection, where: str, values: tuple[int, ...], count: int
) -> tuple[JournalEntry | Unreadable, ...]:
    rows = db.execute(
        "SELECT seq, id, kind, at, lines, payload, offer, cap FROM journal"  # noqa: S608 - constants of this module
        f" WHERE {where} ORDER BY seq LIMIT ?",
        (*values, count),
    )
    return tuple(_entry(*row) for row in rows)


def _entry(
    seq: int, entry_id: str, kind: str, at: int, lines: bytes, payload: bytes, offer: int | None, cap: int | None
) -> JournalEntry | Unreadable:
    position = f"{seq:020d}"  # so that the order of strings is the order of entries
    moved: tuple[Line, ...] = ()
    try:
        moved = _lines(lines)
        event = read_event(EntryKind(kind), at, payload, offer=offer, cap=cap)
    except Exception as error:  # whatever it is, it was written by another version, or damaged
        known = EntryKind(kind) if kind in _KINDS else EntryKind.REFUSED
        return Unreadable(entry_id, known, at, moved, payload, f"{type(error).__name__}: {error}", position)
    return JournalEntry(entry_id, EntryKind(kind), at, moved, event, position)


def attend(db: sqlite3.Connection, now: int, for_ms: int) -> None:
    db.execute("INSERT OR REPLACE INTO meta VALUES ('attended', ?)", (str(now + for_ms),))


def attended(db: sqlite3.Connection, now: int) -> bool:
    found = db.execute("SELECT value FROM meta WHERE key = 'attended'").fetchone()
    return found is not None and now < int(found[0]) <= now + _CLOCK_WRONG_MS


def journal_length(db: sqlite3.Connection, now: int) -> int:
    """Entries waiting. They are taken in order, so that only those in somebody's hands have to be counted."""
    (in_hand,) = db.execute("SELECT count(*) FROM deliveries JOIN journal ON seq BETWEEN first AND last").fetchone()
    first, last = db.execute(
        "SELECT (SELECT min(seq) FROM journal WHERE seq > (SELECT coalesce(max(last), 0) FROM deliveries)),"
        " (SELECT max(seq) FROM journal)"
    ).fetchone()
    return int(in_hand + (0 if first is None else last - first + 1))


def epoch(db: sqlite3.Connection, now: int) -> str:
    (value,) = db.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()
    return str(value)


def time_now(db: sqlite3.Connection, now: int) -> int:
    return now
