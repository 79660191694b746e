"""Buckets and windows: the arithmetic that every store repeats, in exact integers.

Nothing here knows a clock: times come in as arguments, so that tests choose them. The formulas are those of
docs/explanation/accounting.md, and each product stays below 2**53, so that a Lua script can do the same.
"""

from __future__ import annotations

import calendar
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from typing import Literal
from zoneinfo import ZoneInfo

from llm_guard_mw.model import Window

Period = Literal["day", "week", "month"]

MS_PER_SECOND = 1000
MS_PER_DAY = 86_400_000


# ---------------------------------------------------------------- token buckets


def drain(used: int, rem: int, stamp: int, now: int, rate: int, period: int) -> tuple[int, int, int]:
    """What is left in a bucket at `now`: the new `(used, rem, stamp)`.

    `rate` units drain every `period` ticks; `stamp` and `now` are ticks. `rem` is the fraction of a unit, in
    1/period, that drained already but does not make a whole one. So 997 small steps end where one large step
    does. Time never runs backwards: an earlier `now` changes nothing.

    Whole periods drain exactly `rate` each and leave `rem` alone, so they are taken out first. That bounds the
    elapsed part by one period, and with it every product.
    """
    if now <= stamp:
        return used, rem, stamp
    periods, elapsed = divmod(now - stamp, period)
    periods = min(periods, used // rate + 1)  # more of them would only drain an empty bucket
    per_tick, fraction = divmod(rate, period)
    whole, rem = divmod(elapsed * fraction + rem, period)
    left = used - (periods * rate + elapsed * per_tick + whole)
    # An empty bucket has nothing that could have drained in part: a fraction kept would let the next unit out early.
    return (left, rem, now) if left > 0 else (0, 0, now)


def wait_ticks(over: int, rem: int, rate: int, period: int) -> int:
    """Ticks until `over` more units have drained from a bucket that nobody adds to.

    They count from the bucket's stamp, and never run in a store: `over * period` may pass 2**53.
    """
    if over <= 0:
        return 0
    return -((rem - over * period) // rate)


# ---------------------------------------------------------------- calendar windows


def window_at(period: Period, anchor: int, timezone: str, at: int) -> Window:
    """The calendar window that contains `at` (ms since the epoch).

    Windows begin with the first moment of a local day of `timezone`. `anchor` is the day that a window begins
    with: 1..31 of the month (in shorter months their last day), 1 (Monday) .. 7 of the week; a day has none. A
    local day with a change of the clocks is 23 or 25 hours long, and so is its window.
    """
    local_day = datetime.fromtimestamp(at / 1000, ZoneInfo(timezone)).date()
    window = _window_of_day(period, anchor, timezone, local_day)
    while at >= window.end:
        # The clocks went back over midnight (St John's did so at 00:01), so that yesterday's date is shown once
        # more. Today's window has begun all the same, and no window begins twice.
        local_day += timedelta(days=1)
        window = _window_of_day(period, anchor, timezone, local_day)
    return window


def next_window(period: Period, anchor: int, timezone: str, window: Window) -> Window:
    """The window that begins where `window` ends."""
    return window_at(period, anchor, timezone, window.end)


@lru_cache(maxsize=256)
def _window_of_day(period: Period, anchor: int, timezone: str, day: date) -> Window:
    if period == "day":
        first, after = day, day + timedelta(days=1)
    elif period == "week":
        first = day - timedelta(days=(day.isoweekday() - anchor) % 7)
        after = first + timedelta(days=7)
    else:
        first = _anchored(day.year, day.month, anchor)
        if first > day:
            first = _anchored(*_month_before(day.year, day.month), anchor)
        after = _anchored(*_month_after(first.year, first.month), anchor)
    return Window(_midnight(first, timezone), _midnight(after, timezone))


def _anchored(year: int, month: int, anchor: int) -> date:
    return date(year, month, min(anchor, calendar.monthrange(year, month)[1]))


def _month_before(year: int, month: int) -> tuple[int, int]:
    return (year - 1, 12) if month == 1 else (year, month - 1)


def _month_after(year: int, month: int) -> tuple[int, int]:
    return (year + 1, 1) if month == 12 else (year, month + 1)


def _midnight(day: date, timezone: str) -> int:
    """The first moment of a local day, in ms.

    Of two midnights `fold=0` picks the first. Where the clocks skip midnight, `fold=0` reads it by the offset
    before the jump, which lands on the jump or behind it, and `fold=1` by the offset after, which lands before
    it: the jump lies between the two, and the day begins there.
    """
    zone = ZoneInfo(timezone)
    midnight = datetime.combine(day, time(0), zone)
    latest = int(midnight.timestamp())
    earliest = int(midnight.replace(fold=1).timestamp())
    while latest - earliest > 1:
        middle = (earliest + latest) // 2
        if datetime.fromtimestamp(middle, zone).date() < day:
            earliest = middle
        else:
            latest = middle
    return latest * MS_PER_SECOND


def utc(at: int) -> datetime:
    """Milliseconds since the epoch as an aware datetime."""
    return datetime.fromtimestamp(at / 1000, UTC)
