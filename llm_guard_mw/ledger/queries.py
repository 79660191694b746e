"""What the books answer: the events one by one, and what groups of them add up to.

Rule 1. Events are read in pages, so that any number of them costs the same memory, and no read transaction stays
        open. Rows that come in meanwhile are left to the next reader.
Rule 2. Days whose raw rows were pruned are reported from daily_usage, whole days only. There a call counts once
        for each group of equal dimensions that it touched.
Rule 3. A sum of which no part is known is None. Refused and released exchanges spent nothing, and are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

from sqlalchemy import ColumnElement, Connection, Select, Table, delete, distinct, func, or_, select, tuple_

from llm_guard_mw.ledger.database import Database
from llm_guard_mw.ledger.drain import DAILY, DEAD, EVENTS
from llm_guard_mw.ledger.moments import local_day, midnight, rfc3339
from llm_guard_mw.ledger.rows import CLOSING, DIMENSIONS, EVENT_FIELDS, day_of
from llm_guard_mw.model import EntryKind

PAGE = 1000

#: Until when raw rows were pruned: µs, and the first day that has all of its rows.
PRUNED_BEFORE = "pruned_before"
PRUNED_BEFORE_DAY = "pruned_before_day"

_SPENDING = tuple(kind for kind in EntryKind if kind not in (EntryKind.REFUSED, EntryKind.RELEASE))
_REPORTED = ("input_tokens", "output_tokens", "cost_nanos")


# ---------------------------------------------------------------- events


def events(books: Database, since: int | None, until: int | None) -> Iterator[dict[str, Any]]:
    """The rows as UsageEvents, by time; `at` is RFC 3339."""
    with books.reading() as connection:
        last = connection.scalar(select(func.max(EVENTS.c.number))) or 0
    columns = [EVENTS.c.number, *(EVENTS.c[name] for name in EVENT_FIELDS)]
    statement = select(*columns).where(EVENTS.c.number <= last, *_between(since, until))
    statement = statement.order_by(EVENTS.c.at, EVENTS.c.number).limit(PAGE)
    after: tuple[int, int] | None = None
    while True:
        page = statement if after is None else statement.where(tuple_(EVENTS.c.at, EVENTS.c.number) > after)
        with books.reading() as connection:
            rows = connection.execute(page).all()
        for row in rows:
            event = dict(zip(EVENT_FIELDS, row[1:], strict=True))
            event["at"] = rfc3339(event["at"])
            yield event
        if len(rows) < PAGE:
            return
        after = (rows[-1].at, rows[-1].number)


def _between(since: int | None, until: int | None) -> list[ColumnElement[bool]]:
    bounds = []
    if since is not None:
        bounds.append(EVENTS.c.at >= since)
    if until is not None:
        bounds.append(EVENTS.c.at < until)
    return bounds


# ---------------------------------------------------------------- report


def report(
    books: Database, zone: ZoneInfo, by: Sequence[str], since: int | None, until: int | None
) -> list[dict[str, Any]]:
    """One dict a group, the dearest first: the dimensions, then calls, tokens and cost."""
    names = list(dict.fromkeys(by))
    for name in names:
        check_dimension(name)
    groups: dict[tuple[Any, ...], list[int | None]] = {}
    with books.reading() as connection:
        pruned = int(books.fact(connection, PRUNED_BEFORE) or 0)
        raw = _raw_groups(books, names, max(since or pruned, pruned), until)
        _merge(groups, connection, raw, len(names))
        first_day = books.fact(connection, PRUNED_BEFORE_DAY)
        if first_day is not None and (since is None or since < pruned):
            _merge(groups, connection, _daily_groups(books, names, zone, first_day, since, until), len(names))
    found = [_described(names, group, sums) for group, sums in groups.items()]
    return sorted(found, key=lambda row: (-(row["cost_nanos"] or 0), *(str(row[name] or "") for name in names)))


def check_dimension(name: str) -> None:
    if name in DIMENSIONS or name == "day" or (name.startswith("tag:") and len(name) > len("tag:")):
        return
    raise ValueError(f"cannot report by {name!r}: known are {', '.join((*DIMENSIONS, 'day'))} and tag:NAME")


def _raw_groups(books: Database, names: Sequence[str], since: int, until: int | None) -> Select[Any]:
    # A tag's name is a bound value, and Postgres takes two bound values for two expressions: so the dimensions
    # are named in an inner query, and grouped by these names.
    inner = (
        select(
            *_dimensions(books, EVENTS, names),
            *(EVENTS.c[name] for name in ("kind", "call_id", *_REPORTED)),
        )
        .where(EVENTS.c.kind.in_(_SPENDING), *_between(since or None, until))
        .subquery()
    )
    group = [inner.c[f"d{index}"] for index in range(len(names))]
    calls = func.count(distinct(inner.c.call_id)).filter(inner.c.kind.in_(tuple(CLOSING)))
    sums = (func.sum(inner.c[name]) for name in _REPORTED)
    return select(*group, calls, *sums, func.count()).group_by(*group)


def _daily_groups(
    books: Database, names: Sequence[str], zone: ZoneInfo, first_day: str, since: int | None, until: int | None
) -> Select[Any]:
    days = [DAILY.c.day < first_day]
    if since is not None:
        whole = local_day(since, zone)
        days.append(DAILY.c.day >= whole.isoformat() if midnight(whole, zone) == since else DAILY.c.day > str(whole))
    if until is not None:
        days.append(DAILY.c.day < day_of(until, zone))
    spent = or_(DAILY.c.exchanges > 0, *(DAILY.c[name].is_not(None) for name in _REPORTED))
    inner = (
        select(*_dimensions(books, DAILY, names), *(DAILY.c[name] for name in ("calls", *_REPORTED)))
        .where(*days, spent)
        .subquery()
    )
    group = [inner.c[f"d{index}"] for index in range(len(names))]
    sums = (func.sum(inner.c[name]) for name in ("calls", *_REPORTED))
    return select(*group, *sums, func.count()).group_by(*group)


def _dimensions(books: Database, table: Table, names: Sequence[str]) -> list[ColumnElement[Any]]:
    return [_dimension(books, table, name).label(f"d{index}") for index, name in enumerate(names)]


def _dimension(books: Database, table: Table, name: str) -> ColumnElement[Any]:
    if not name.startswith("tag:"):
        return table.c[name]
    tag = name.removeprefix("tag:")
    if not books.is_sqlite:
        return table.c.tags.op("->>")(tag)
    # A JSON path would have to quote the name, and SQLite has no way to quote a quote.
    each = func.json_each(table.c.tags).table_valued("key", "value")
    return select(each.c.value).where(each.c.key == tag).scalar_subquery()


def _merge(
    groups: dict[tuple[Any, ...], list[int | None]], connection: Connection, statement: Select[Any], width: int
) -> None:
    for row in connection.execute(statement):
        if not row[-1]:  # without dimensions, no rows are a group as well
            continue
        found: list[int | None] = [None if value is None else int(value) for value in row[width:-1]]
        before = groups.get(tuple(row[:width]))
        groups[tuple(row[:width])] = (
            found if before is None else [_sum(*pair) for pair in zip(before, found, strict=True)]
        )


def _sum(one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _described(names: Sequence[str], group: tuple[Any, ...], sums: Sequence[int | None]) -> dict[str, Any]:
    calls, input_tokens, output_tokens, cost_nanos = sums
    return {
        **dict(zip(names, group, strict=True)),
        "calls": calls or 0,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "cost_nanos": cost_nanos,
        "cost_usd": None if cost_nanos is None else Decimal(cost_nanos).scaleb(-9),
    }


# ---------------------------------------------------------------- retention


def prune(books: Database, zone: ZoneInfo, now: int, days: int) -> int:
    """Drop the raw rows of all days but the last `days` and today, in small transactions. Returns how many."""
    kept_from = local_day(now, zone) - timedelta(days=days)
    cutoff = midnight(kept_from, zone)
    with books.writing() as connection:
        # Said before it is done: from here on nobody expects to find these rows.
        if int(books.fact(connection, PRUNED_BEFORE) or 0) < cutoff:
            books.set_facts(connection, {PRUNED_BEFORE: str(cutoff), PRUNED_BEFORE_DAY: kept_from.isoformat()})
        connection.execute(delete(DEAD).where(DEAD.c.at < cutoff // 1000))
    pruned = 0
    while True:
        oldest = select(EVENTS.c.number).where(EVENTS.c.at < cutoff).order_by(EVENTS.c.at).limit(PAGE)
        with books.writing() as connection:
            gone = connection.execute(delete(EVENTS).where(EVENTS.c.number.in_(oldest.scalar_subquery()))).rowcount
        pruned += gone
        if gone < PAGE:
            return pruned
