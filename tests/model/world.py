"""What the suites over stores share: a clock in the test's hand, the stores to try, and short words for values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from llm_guard_mw.arithmetic import next_window, window_at
from llm_guard_mw.model import Decision, Demand, EntryKind, Kind, Line, Offer, Unit, UsageEvent, Window
from llm_guard_mw.stores.journal import Estimate, encode_draft, encode_event
from llm_guard_mw.stores.protocol import Granted, Moved, Reserve, Settlement, Store
from llm_guard_mw.stores.redis import RedisStore
from llm_guard_mw.stores.sqlite import SQLiteStore
from tests.model import servers
from tests.model.reference import ReferenceStore

SECOND = 1000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR
LEASE = 2 * MINUTE

#: Noon of a day in UTC.
NOON = 1_760_011_200_000


@dataclass
class Clock:
    """Time as the test wants it; the stores call it."""

    now: int = NOON

    def __call__(self) -> int:
        return self.now

    def forward(self, ms: int) -> None:
        self.now += ms


def _reference(clock: Clock, folder: Path) -> Store:
    return ReferenceStore(clock)


def _sqlite(clock: Clock, folder: Path) -> Store:
    return SQLiteStore(folder / "store.db", clock=clock)


def _redis(leg: str, clock: Clock, folder: Path) -> Store:
    """On a server that all tests of this process share, emptied for each. The scripts go by `clock`."""
    reason = servers.missing(leg)
    if reason is not None:
        pytest.skip(reason)
    return RedisStore(servers.emptied(leg).url, clock=clock)


#: Every store by name. The reference is one of them, so that the suites themselves are tried.
STORES: Mapping[str, Callable[[Clock, Path], Store]] = {
    "reference": _reference,
    "sqlite": _sqlite,
    **{leg: partial(_redis, leg) for leg in servers.LEGS},
}


def make_store(name: str, clock: Clock, folder: Path) -> Store:
    """A new and empty store, which keeps its files in `folder`."""
    return STORES[name](clock, folder)


# ---------------------------------------------------------------- demands and offers


def days(at: int) -> tuple[Window, ...]:
    """The day of `at` and the next one, in UTC."""
    today = window_at("day", 1, "UTC", at)
    return today, next_window("day", 1, "UTC", today)


def day_start(at: int) -> int:
    return days(at)[0].start


def dollars(
    balance: str, ceiling: int, fixed: int = 0, per_output: int = 0, *, windows: tuple[Window, ...] = days(NOON)
) -> Demand:
    """A claim on a daily budget."""
    return Demand(balance, Kind.CALENDAR, Unit.USD, ceiling, fixed, per_output, windows=windows)


def prepaid(balance: str, ceiling: int, fixed: int = 0, per_output: int = 0) -> Demand:
    return Demand(balance, Kind.TOTAL, Unit.CREDITS, ceiling, fixed, per_output)


def tokens(
    balance: str,
    ceiling: int,
    fixed: int = 0,
    per_output: int = 0,
    *,
    rate: int = 60,
    period: int = MINUTE,
    tick: int = 1,
) -> Demand:
    """A claim on a bucket that drains `rate` units every `period` ticks."""
    return Demand(balance, Kind.BUCKET, Unit.TOKENS, ceiling, fixed, per_output, rate=rate, period=period, tick=tick)


def requests(balance: str, ceiling: int, *, rate: int = 60, period: int = MINUTE) -> Demand:
    return Demand(balance, Kind.BUCKET, Unit.REQUESTS, ceiling, 1, rate=rate, period=period)


def requests_a_day(balance: str, ceiling: int, *, windows: tuple[Window, ...] = days(NOON)) -> Demand:
    return Demand(balance, Kind.CALENDAR, Unit.REQUESTS, ceiling, 1, windows=windows)


def concurrent(balance: str, ceiling: int) -> Demand:
    return Demand(balance, Kind.CONCURRENT, Unit.CONCURRENT, ceiling, 1)


def offer(*demands: Demand, cap: int = 0, at_least: int | None = None, decision: Decision = "allow") -> Offer:
    return Offer(decision, f"model-{decision}", demands, cap, cap if at_least is None else at_least)


def wish(
    exchange: str,
    *offers: Offer,
    call: str | None = None,
    lease_ms: int = LEASE,
    takes: str | None = None,
    not_after: int | None = None,
    force: bool = False,
) -> Reserve:
    call = exchange.split("/")[0] if call is None else call
    event = event_of(exchange)
    draft = encode_draft(event, [Estimate(o.decision, o.model, 10, 1000, 7, "prices-1") for o in offers])
    return Reserve(exchange, call, offers, lease_ms, draft, takes, not_after, force)


def event_of(exchange: str, *, cost_nanos: int | None = None) -> UsageEvent:
    call, _, attempt = exchange.partition("/")
    return UsageEvent(call, int(attempt or 0), EntryKind.SETTLE, NOON * 1000, user="alice", cost_nanos=cost_nanos)


# ---------------------------------------------------------------- settlements


def settlement(
    exchange: str,
    lines: tuple[Line, ...],
    lease_end: int,
    actual: Mapping[str, int] | None = None,
    *,
    kind: EntryKind = EntryKind.SETTLE,
    fresh: bool = False,
) -> Settlement:
    """Settle at what was held, but for the balances in `actual`. A release gives all back but what was spent."""
    given_back = kind is EntryKind.RELEASE
    moved = tuple(
        Moved(line, (actual or {}).get(line.balance, 0 if given_back and not line.spent else line.amount))
        for line in lines
    )
    payload = encode_event(event_of(exchange, cost_nanos=500), held_nanos=1000)
    return Settlement(exchange, exchange.split("/")[0], kind, lease_end, moved, payload, fresh)


def settled(exchange: str, granted: Granted, actual: Mapping[str, int] | None = None) -> Settlement:
    return settlement(exchange, granted.lines, granted.lease_end, actual)


def released(exchange: str, granted: Granted) -> Settlement:
    return settlement(exchange, granted.lines, granted.lease_end, kind=EntryKind.RELEASE)


def booking(
    exchange: str, demand: Demand, actual: int, *, lease_end: int = NOON + LEASE, at: int = NOON, fresh: bool = False
) -> Settlement:
    """A settlement of `actual` on one balance that holds nothing for it."""
    start = day_start(at) if demand.kind is Kind.CALENDAR else 0
    line = Line(demand.balance, demand.kind, demand.unit, start, 0, demand.spent_at_reserve)
    return settlement(exchange, (line,), lease_end, {demand.balance: actual}, fresh=fresh)
