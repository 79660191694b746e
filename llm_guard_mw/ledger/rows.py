"""What a journal entry is in the books: pure functions, no database.

Rule 1. A row is a function of its entry and the configured timezone. Told twice, it is the same row.
Rule 2. Text that Postgres would not take (NUL) or that is no Unicode (lone surrogates) has U+FFFD in its place.
        A number that no column can hold is a ValueError: the drain puts such an entry aside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import msgspec

from llm_guard_mw.model import EntryKind, JournalEntry, Kind, Line, Unit, UsageEvent

#: One row as the database driver wants it: column name to value.
Row = dict[str, Any]

EVENT_FIELDS = UsageEvent.__struct_fields__

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
_canonical = msgspec.json.Encoder(order="deterministic").encode


def row_of(entry: JournalEntry, zone: ZoneInfo) -> Row:
    """The usage_events row of an entry; ValueError if no column could hold it."""
    event = entry.event
    row: Row = {name: _plain(name, getattr(event, name)) for name in EVENT_FIELDS}
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
    return datetime.fromtimestamp(at // 1_000_000, zone).date().isoformat()


def encode_lines(lines: Iterable[Line]) -> list[list[Any]]:
    return [
        [
            _text(line.balance),
            line.kind.value,
            line.unit.value,
            _whole("window_start", line.window_start, _BIGGEST),
            _whole("amount", line.amount, _BIGGEST),
            line.spent,
        ]
        for line in lines
    ]


def decode_lines(encoded: Iterable[Sequence[Any]]) -> tuple[Line, ...]:
    return tuple(
        Line(balance, Kind(kind), Unit(unit), window_start, amount, spent)
        for balance, kind, unit, window_start, amount, spent in encoded
    )


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


def _whole(name: str, value: int, biggest: int) -> int:
    if not -biggest <= value <= biggest:
        raise ValueError(f"{name} = {value} does not fit its column")
    return value


# ---------------------------------------------------------------- what rows add up to


def _rollup(row: Row) -> str:
    group = [row["day"], row["tags"], *(row[name] for name in DIMENSIONS)]
    return hashlib.blake2b(_canonical(group), digest_size=16).hexdigest()


def daily_of(rows: Iterable[Row], touched: set[tuple[str, str]]) -> list[Row]:
    """What these new rows add to daily_usage, in the order of its key.

    `touched` holds the (call_id, rollup) pairs that are counted already, and takes up the new ones.
    """
    groups: dict[str, Row] = {}
    for row in rows:
        if row["kind"] == UNCOUNTED:
            continue
        group = groups.setdefault(row["rollup"], _empty_group(row))
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


def totals_of(lines: Iterable[Line]) -> list[Row]:
    """What these lines add to window_totals, in the order of its key."""
    totals: dict[TotalKey, Row] = {}
    for line in lines:
        if line.kind not in TOTALLED:
            continue
        total = totals.setdefault(
            (line.balance, line.window_start),
            {
                "balance": line.balance,
                "window_start": line.window_start,
                "kind": line.kind.value,
                "unit": line.unit.value,
                "spent": 0,
            },
        )
        total["spent"] += line.amount
    return [totals[key] for key in sorted(totals)]
