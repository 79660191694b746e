"""What a journal entry is in the books: pure functions, no database.

Rule 1. A row is a function of its entry and the configured timezone. Told twice, it is the same row.
Rule 2. Text that Postgres would not take (NUL) or that is no Unicode (lone surrogates) has U+FFFD in its place.
        A number that no column can hold is a ValueError: the drain puts such an entry aside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any
from zoneinfo import ZoneInfo

import msgspec

from llm_guard_mw.model import EXACT_MAX, EntryKind, JournalEntry, Kind, Line, Unit, UsageEvent

#: One row as the database driver wants it: column name to value.
Row = dict[str, Any]

EVENT_FIELDS = UsageEvent.__struct_fields__
_KIND_OF = {name: str(UsageEvent.__annotations__[name]) for name in EVENT_FIELDS}
_WHOLE = tuple(name for name, kind in _KIND_OF.items() if kind in ("int", "int | None"))
_TEXT = tuple(name for name, kind in _KIND_OF.items() if not kind.startswith(("int", "bool", "Mapping")))
_values = attrgetter(*EVENT_FIELDS)
_numbers = attrgetter(*_WHOLE)
_words = attrgetter(*_TEXT)

#: What a report can be grouped by, and what a DailyUsage row stands for; free tags come on top.
DIMENSIONS = (
    "tenant",
    "user",
    "tier",
    "key_id",
    "feature",
    "route",
    "workflow_id",
    "session_id",
    "experiment",
    "variant",
    "provider",
    "api",
    "requested_model",
    "model",
)

#: Sums that stay NULL as long as nobody knew the number.
SUMS = (
    "input_tokens",
    "cached_input_tokens",
    "cache_write_tokens",
    "output_tokens",
    "reasoning_tokens",
    "audio_input_tokens",
    "audio_output_tokens",
    "credits",
    "cost_nanos",
    "saved_nanos",
)
COUNTS = ("calls", "exchanges", "refused")

#: The entries that close an exchange; the others only add to one that was closed.
CLOSING = frozenset({EntryKind.SETTLE, EntryKind.ABANDONED, EntryKind.ORPHAN})
#: A released exchange sent no bytes, so that it counts nowhere.
UNCOUNTED = EntryKind.RELEASE

#: The balances whose windows have totals in the books.
TOTALLED = frozenset({Kind.CALENDAR, Kind.TOTAL})

RowKey = tuple[str, int, str, str]
TotalKey = tuple[str, int]

_BIGGEST = 2**63 - 1
_BIGGEST_INTEGER = 2**31 - 1
#: What stands in an index must fit a third of one of Postgres' pages.
_NAME_MAX = 2000
#: Users come back: their groups' digests are made once.
_DIGESTS_KEPT = 2048
#: All timezones change at quarters of an hour.
_QUARTER_SECONDS = 900
_canonical = msgspec.json.Encoder(order="deterministic").encode


def row_of(entry: JournalEntry, zone: ZoneInfo) -> Row:
    """The usage_events row of an entry; ValueError if no column could hold it."""
    event = entry.event
    row: Row = dict(zip(EVENT_FIELDS, _values(event), strict=True))
    if _is_plain(event):
        row["tags"] = dict(sorted(event.tags.items()))
        row["basis"] = None if event.basis is None else event.basis.value
    else:
        row = {name: _plain(name, value) for name, value in row.items()}
    if len(row["call_id"]) + len(row["price_version"]) > _NAME_MAX // 4:
        raise ValueError(f"call_id and price_version together are longer than {_NAME_MAX // 4} characters")
    row["kind"] = entry.kind.value
    row["lines"] = encode_lines(entry.lines)
    row["day"] = day_of(event.at, zone)
    row["rollup"] = _rollup(row)
    return row


def key_of(row: Row) -> RowKey:
    """What makes a row unique."""
    return row["call_id"], row["attempt"], row["kind"], row["price_version"]


def day_of(at: int, zone: ZoneInfo) -> str:
    """The local day of a time in microseconds."""
    return _day_of(at // (1_000_000 * _QUARTER_SECONDS), zone)


@lru_cache(maxsize=256)
def _day_of(quarter: int, zone: ZoneInfo) -> str:
    return datetime.fromtimestamp(quarter * _QUARTER_SECONDS, zone).date().isoformat()


def encode_lines(lines: Iterable[Line]) -> list[list[Any]]:
    return [
        [
            _name(line.balance),
            line.kind.value,
            line.unit.value,
            _whole("window_start", line.window_start, _BIGGEST),
            _whole("amount", line.amount, EXACT_MAX),
            line.spent,
        ]
        for line in lines
    ]


def decode_lines(encoded: Iterable[Sequence[Any]]) -> tuple[Line, ...]:
    return tuple(
        Line(balance, Kind(kind), Unit(unit), window_start, amount, spent)
        for balance, kind, unit, window_start, amount, spent in encoded
    )


def _is_plain(event: UsageEvent) -> bool:
    """Whether every value of an event can stay as it is: so it is nearly always, and a look at all costs little."""
    try:
        text = "".join(filter(None, chain(_words(event), event.tags, event.tags.values())))
        if "\0" in text or not (text.isascii() or text.encode()):
            return False
        numbers = [number for number in _numbers(event) if number is not None]
        return (
            max(numbers) <= _BIGGEST
            and min(numbers) >= -_BIGGEST
            and -_BIGGEST_INTEGER <= event.attempt <= _BIGGEST_INTEGER
            and -_BIGGEST_INTEGER <= (event.status or 0) <= _BIGGEST_INTEGER
        )
    except (TypeError, UnicodeEncodeError):
        return False


def _plain(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return _whole(name, value, _BIGGEST_INTEGER if name in ("attempt", "status") else _BIGGEST)
    if isinstance(value, Mapping):
        return {_text(key): _text(item) for key, item in sorted(value.items())}
    raise ValueError(f"{name} = {value!r} is of a kind that no column holds")


def _text(value: str) -> str:
    if value.isascii() and "\0" not in value:
        return str(value)
    return value.replace("\0", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _name(balance: str) -> str:
    if len(balance) > _NAME_MAX // 4 and len(balance.encode("utf-8", "replace")) > _NAME_MAX:
        raise ValueError(f"the name of a balance is longer than {_NAME_MAX} bytes: {balance[:100]}...")
    return _text(balance)


def _whole(name: str, value: int, biggest: int) -> int:
    if not -biggest <= value <= biggest:
        raise ValueError(f"{name} = {value} does not fit its column")
    return value


# ---------------------------------------------------------------- what rows add up to


_dimensions = itemgetter(*DIMENSIONS)


def _rollup(row: Row) -> str:
    return _digest(row["day"], tuple(row["tags"].items()), _dimensions(row))


@lru_cache(maxsize=_DIGESTS_KEPT)
def _digest(day: str, tags: tuple[tuple[str, str], ...], dimensions: tuple[str | None, ...]) -> str:
    group = [day, dict(tags), *dimensions]
    return hashlib.blake2b(_canonical(group), digest_size=16).hexdigest()


def daily_of(rows: Iterable[Row], touched: set[tuple[str, str]]) -> list[Row]:
    """What these new rows add to daily_usage, in the order of its key.

    `touched` holds the (call_id, rollup) pairs that are counted already, and takes up the new ones.
    """
    groups: dict[str, Row] = {}
    for row in rows:
        if row["kind"] == UNCOUNTED:
            continue
        group = groups.get(row["rollup"])
        if group is None:
            group = groups[row["rollup"]] = _empty_group(row)
        if row["kind"] == EntryKind.REFUSED:
            group["refused"] += row["count"]
            continue
        if row["kind"] in CLOSING:
            group["exchanges"] += 1
            if (row["call_id"], row["rollup"]) not in touched:
                touched.add((row["call_id"], row["rollup"]))
                group["calls"] += 1
        for name in SUMS:
            if row[name] is not None:
                group[name] = (group[name] or 0) + row[name]
    return [groups[rollup] for rollup in sorted(groups)]


def _empty_group(row: Row) -> Row:
    group = {name: row[name] for name in ("rollup", "day", "tags", *DIMENSIONS)}
    return group | dict.fromkeys(COUNTS, 0) | dict.fromkeys(SUMS)


def totals_of(lines: Iterable[Sequence[Any]]) -> list[Row]:
    """What these lines, as `encode_lines` makes them, add to window_totals, in the order of its key."""
    totals: dict[TotalKey, Row] = {}
    for balance, kind, unit, window_start, amount, _spent in lines:
        if kind not in TOTALLED:
            continue
        total = totals.get((balance, window_start))
        if total is None:
            total = totals[balance, window_start] = {
                "balance": balance,
                "window_start": window_start,
                "kind": kind,
                "unit": unit,
                "spent": 0,
            }
        total["spent"] += amount
    return [totals[key] for key in sorted(totals)]
