"""Properties of buckets and windows: every store repeats this arithmetic, so it has to be exact."""

from __future__ import annotations

import calendar
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from llm_guard_mw.arithmetic import Period, drain, next_window, wait_ticks, window_at
from llm_guard_mw.model import EXACT_MAX, Window

HOUR_MS = 3_600_000

# ---------------------------------------------------------------- token buckets

#: The longest period in ms is a day; longer ones tick in seconds. The square of either stays below 2**53.
PERIODS = st.one_of(st.integers(1, 100), st.sampled_from([1000, 60_000, 3_600_000, 86_400_000, 94_906_265]))
RATES = st.one_of(st.integers(1, 1000), st.integers(1, 2**50))
USED = st.one_of(st.integers(0, 1000), st.integers(0, 2**51))
STAMPS = st.integers(0, 2_000_000_000_000)


@st.composite
def buckets(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """A bucket as it may stand: `used, rem, stamp, rate, period`."""
    period = draw(PERIODS)
    return draw(USED), draw(st.integers(0, period - 1)), draw(STAMPS), draw(RATES), period


@given(buckets(), st.lists(st.integers(0, 10**9), max_size=50))
def test_many_small_steps_drain_what_one_large_step_drains(
    bucket: tuple[int, int, int, int, int], steps: list[int]
) -> None:
    used, rem, stamp, rate, period = bucket
    one = drain(used, rem, stamp, stamp + sum(steps), rate, period)

    many, now = (used, rem, stamp), stamp
    for step in steps:
        now += step
        many = drain(*many, now, rate, period)

    assert many == one


def test_997_steps_of_a_tick_drain_what_one_step_of_997_ticks_drains() -> None:
    many = (1_000_000, 0, 0)
    for now in range(1, 998):
        many = drain(*many, now, 7, 1000)

    assert many == drain(1_000_000, 0, 0, 997, 7, 1000) == (1_000_000 - 6, 979, 997)


@given(buckets(), st.integers(0, 10**12))
def test_a_clock_that_jumps_back_changes_nothing(bucket: tuple[int, int, int, int, int], back: int) -> None:
    used, rem, stamp, rate, period = bucket

    assert drain(used, rem, stamp, stamp - back, rate, period) == (used, rem, stamp)


@given(buckets(), st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9))
def test_a_clock_that_went_back_and_came_again_drains_no_moment_twice(
    bucket: tuple[int, int, int, int, int], ahead: int, back: int, again: int
) -> None:
    used, rem, stamp, rate, period = bucket
    straight = drain(used, rem, stamp, stamp + ahead + again, rate, period)

    jumping = drain(used, rem, stamp, stamp + ahead, rate, period)
    jumping = drain(*jumping, stamp + ahead - back, rate, period)
    jumping = drain(*jumping, stamp + ahead + again, rate, period)

    assert jumping == straight


@given(buckets(), st.integers(0, 10**9))
def test_a_drain_is_the_rounded_down_product_of_time_and_rate(
    bucket: tuple[int, int, int, int, int], elapsed: int
) -> None:
    used, rem, stamp, rate, period = bucket
    units, left_over = divmod(elapsed * rate + rem, period)

    left = (used - units, left_over) if used > units else (0, 0) if elapsed else (used, rem)
    assert drain(used, rem, stamp, stamp + elapsed, rate, period) == (*left, stamp + elapsed)


class Watched(int):
    """An int that refuses to become larger than a double can hold exactly, whatever is done with it."""

    def __new__(cls, value: int) -> Watched:
        assert abs(value) <= EXACT_MAX, f"{value} is beyond 2**53"
        return super().__new__(cls, value)

    def __add__(self, other: int) -> Watched:
        return Watched(int(self) + int(other))

    def __sub__(self, other: int) -> Watched:
        return Watched(int(self) - int(other))

    def __mul__(self, other: int) -> Watched:
        return Watched(int(self) * int(other))

    def __floordiv__(self, other: int) -> Watched:
        return Watched(int(self) // int(other))

    def __divmod__(self, other: int) -> tuple[Watched, Watched]:
        whole, rest = divmod(int(self), int(other))
        return Watched(whole), Watched(rest)

    __radd__ = __add__
    __rmul__ = __mul__


@given(buckets(), st.integers(0, 10**13))
@example((2**51, 94_906_264, 0, 2**50, 94_906_265), 10**13)
@example((2**51, 86_399_999, 0, 86_399_999, 86_400_000), 86_399_999)
def test_no_intermediate_value_of_a_drain_leaves_the_exact_range_of_a_double(
    bucket: tuple[int, int, int, int, int], elapsed: int
) -> None:
    used, rem, stamp, rate, period = map(Watched, bucket)

    drained = drain(used, rem, stamp, stamp + elapsed, rate, period)

    assert all(isinstance(value, int) for value in drained)


def test_an_empty_bucket_saves_nothing_up() -> None:
    hour = 3_600_000
    used, rem, stamp = drain(0, 0, 0, 59 * hour // 60, rate=1, period=hour)  # nobody has used it for 59 minutes

    used, _, _ = drain(used + 1, rem, stamp, stamp + hour // 60, rate=1, period=hour)  # one request, one minute later

    assert used == 1


@given(buckets(), st.integers(1, 2**50), st.integers(0, 2**50))
def test_the_wait_ends_with_the_first_tick_at_which_the_claim_fits(
    bucket: tuple[int, int, int, int, int], capacity: int, claim: int
) -> None:
    used, rem, stamp, rate, period = bucket
    claim = min(claim, capacity)
    over = used + claim - capacity

    wait = wait_ticks(over, rem, rate, period)

    def fits(ticks: int) -> bool:
        return drain(used, rem, stamp, stamp + ticks, rate, period)[0] + claim <= capacity

    assert fits(wait)
    assert wait == 0 or not fits(wait - 1)


# ---------------------------------------------------------------- calendar windows

ZONES = (
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "America/Sao_Paulo",  # until 2019 the clocks skipped midnight
    "America/Asuncion",
    "America/Havana",  # 01:00 becomes 00:00: midnight twice
    "America/St_Johns",  # until 2011 00:01 became 23:01 of the day before
    "America/Moncton",
    "Africa/Cairo",
    "Asia/Beirut",
    "Asia/Tehran",
    "Asia/Kathmandu",
    "Asia/Pyongyang",
    "Australia/Lord_Howe",  # half an hour of daylight saving
    "Antarctica/Casey",
    "Pacific/Apia",  # 2011-12-30 never was
    "Pacific/Kiritimati",
    "Pacific/Kwajalein",
)
RULES = st.one_of(
    st.tuples(st.just("day"), st.just(1)),
    st.tuples(st.just("week"), st.integers(1, 7)),
    st.tuples(st.just("month"), st.one_of(st.integers(1, 31), st.sampled_from([28, 29, 30, 31]))),
)


def _ms(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1000)


def _local(zone: str, at: int) -> datetime:
    return datetime.fromtimestamp(at / 1000, ZoneInfo(zone))


#: Two days to either side of changes of the clocks that are unlike the usual ones.
AWKWARD = [
    _ms(text)
    for text in (
        "2018-11-04T03:00Z",  # Sao Paulo skips midnight
        "2018-02-18T02:00Z",  # Sao Paulo has 23:00 twice
        "2023-04-27T22:00Z",  # Cairo skips midnight
        "2023-10-26T21:00Z",  # Cairo has 23:00 twice
        "2024-03-30T22:00Z",  # Beirut skips midnight
        "2024-10-26T21:00Z",
        "2011-12-30T10:00Z",  # Apia skips a day
        "1995-01-01T10:00Z",  # Kiritimati skips one
        "1993-08-21T12:00Z",  # Kwajalein skips one
        "2024-10-05T15:30Z",  # Lord Howe
        "2024-11-03T05:00Z",  # Havana has midnight twice
        "2010-11-07T02:31Z",  # St John's has the end of the sixth twice
        "1993-10-31T03:01Z",  # Moncton likewise
        "2010-03-04T15:00Z",  # Casey goes back from 02:00 to 23:00
        "2018-05-04T15:00Z",  # Pyongyang skips the half hour before midnight
        "2024-03-31T01:00Z",  # Berlin
        "2024-10-27T01:00Z",
    )
]
MOMENTS = st.one_of(
    st.integers(0, 4_000_000_000_000),
    st.builds(
        lambda change, offset: change + offset, st.sampled_from(AWKWARD), st.integers(-48 * HOUR_MS, 48 * HOUR_MS)
    ),
)


@given(RULES, st.sampled_from(ZONES), MOMENTS)
def test_a_window_contains_its_moment(rule: tuple[Period, int], zone: str, at: int) -> None:
    window = window_at(*rule, zone, at)

    assert window.start <= at < window.end


@given(RULES, st.sampled_from(ZONES), MOMENTS)
def test_windows_tile_time_without_gap_or_overlap(rule: tuple[Period, int], zone: str, at: int) -> None:
    window = window_at(*rule, zone, at)
    following = next_window(*rule, zone, window)
    before = window_at(*rule, zone, window.start - 1)

    assert before.end == window.start
    assert window.end == following.start
    assert following.start < following.end
    assert {window_at(*rule, zone, moment) for moment in (window.start, window.end - 1)} == {window}


@given(RULES, st.sampled_from(ZONES), MOMENTS)
def test_a_window_begins_with_the_true_first_moment_of_the_anchored_day(
    rule: tuple[Period, int], zone: str, at: int
) -> None:
    start = window_at(*rule, zone, at).start
    shown = _local(zone, start)
    before = [_local(zone, start - step * 60_000).date() for step in range(1, 26 * 60)]

    assert max([*before, _local(zone, start - 1).date()]) < shown.date()
    assert _is_anchored(*rule, shown.date()) or _anchor_was_skipped(*rule, zone, start)


def _is_anchored(period: Period, anchor: int, day: date) -> bool:
    if period == "day":
        return True
    if period == "week":
        return day.isoweekday() == anchor
    return day.day == min(anchor, calendar.monthrange(day.year, day.month)[1])


def _anchor_was_skipped(period: Period, anchor: int, zone: str, start: int) -> bool:
    """The anchored day never was: the window begins where it would have, with the day after."""
    skipped = _local(zone, start).date() - timedelta(days=1)
    return _local(zone, start - 1).date() < skipped and _is_anchored(period, anchor, skipped)


def test_a_day_that_was_skipped_has_no_window() -> None:
    eve = window_at("day", 1, "Pacific/Apia", _ms("2011-12-29T12:00-10:00"))
    after = next_window("day", 1, "Pacific/Apia", eve)

    assert eve == Window(_ms("2011-12-29T00:00-10:00"), _ms("2011-12-31T00:00+14:00"))
    assert after == Window(_ms("2011-12-31T00:00+14:00"), _ms("2012-01-01T00:00+14:00"))


@pytest.mark.parametrize("anchor", [30, 31])
def test_a_month_anchored_on_the_skipped_day_begins_with_the_day_after(anchor: int) -> None:
    window = window_at("month", anchor, "Pacific/Apia", _ms("2012-01-10T12:00+14:00"))

    assert window.start == _ms("2011-12-31T00:00+14:00")


def test_a_week_anchored_on_the_skipped_day_begins_with_the_day_after() -> None:
    friday = 5

    window = window_at("week", friday, "Pacific/Apia", _ms("2012-01-03T12:00+14:00"))

    assert window.start == _ms("2011-12-31T00:00+14:00")


@pytest.mark.parametrize(
    ("zone", "noon", "start"),
    [
        ("America/Sao_Paulo", "2018-11-04T12:00-02:00", "2018-11-04T01:00-02:00"),
        ("Africa/Cairo", "2023-04-28T12:00+03:00", "2023-04-28T01:00+03:00"),
        ("Asia/Beirut", "2024-03-31T12:00+03:00", "2024-03-31T01:00+03:00"),
        ("America/Toronto", "1919-03-31T12:00-04:00", "1919-03-31T00:30-04:00"),  # 23:30 became 00:30
        ("America/Havana", "2024-11-03T12:00-05:00", "2024-11-03T00:00-04:00"),  # the first of two midnights
        ("America/St_Johns", "2010-11-07T12:00-03:30", "2010-11-07T00:00-02:30"),  # 00:01 became 23:01
    ],
)
def test_a_day_begins_where_the_clocks_enter_it(zone: str, noon: str, start: str) -> None:
    assert window_at("day", 1, zone, _ms(noon)).start == _ms(start)


def test_a_date_that_is_shown_twice_does_not_begin_twice() -> None:
    """At 00:01 of the seventh St John's went back to 23:01 of the sixth; the seventh's budget was open by then."""
    seventh = window_at("day", 1, "America/St_Johns", _ms("2010-11-07T12:00-03:30"))

    moment = _ms("2010-11-06T23:30-03:30")

    assert _local("America/St_Johns", moment).date() == date(2010, 11, 6)
    assert window_at("day", 1, "America/St_Johns", moment) == seventh


@pytest.mark.parametrize(
    ("zone", "noon", "hours"),
    [
        ("Europe/Berlin", "2024-03-31T12:00+02:00", 23),
        ("Europe/Berlin", "2024-10-27T12:00+01:00", 25),
        ("Europe/Berlin", "2024-06-01T12:00+02:00", 24),
        ("America/Sao_Paulo", "2018-11-04T12:00-02:00", 23),
        ("America/Sao_Paulo", "2018-02-17T12:00-02:00", 25),
        ("Australia/Lord_Howe", "2024-10-06T12:00+11:00", 23.5),
        ("Australia/Lord_Howe", "2024-04-07T12:00+10:30", 24.5),
    ],
)
def test_a_day_with_a_change_of_the_clocks_is_as_long_as_it_was(zone: str, noon: str, hours: float) -> None:
    window = window_at("day", 1, zone, _ms(noon))

    assert window.end - window.start == hours * HOUR_MS


@pytest.mark.parametrize(
    ("anchor", "starts"),
    [
        (29, ["2022-12-29", "2023-01-29", "2023-02-28", "2023-03-29"]),
        (30, ["2022-12-30", "2023-01-30", "2023-02-28", "2023-03-30", "2023-04-30"]),
        (31, ["2022-12-31", "2023-01-31", "2023-02-28", "2023-03-31", "2023-04-30", "2023-05-31"]),
        (31, ["2023-12-31", "2024-01-31", "2024-02-29", "2024-03-31"]),
        (1, ["2023-11-01", "2023-12-01", "2024-01-01"]),
    ],
)
def test_a_billing_month_begins_on_its_anchor_or_the_months_last_day(anchor: int, starts: list[str]) -> None:
    edges = [_ms(f"{day}T00:00Z") for day in starts]

    for start, end in pairwise(edges):
        assert window_at("month", anchor, "UTC", start) == Window(start, end)
        assert window_at("month", anchor, "UTC", end - 1) == Window(start, end)


@given(st.integers(1, 7), st.sampled_from(ZONES), MOMENTS)
def test_a_week_has_seven_dates(anchor: int, zone: str, at: int) -> None:
    assume(zone not in ("Pacific/Apia", "Pacific/Kiritimati", "Pacific/Kwajalein"))

    window = window_at("week", anchor, zone, at)

    assert _local(zone, window.end).date() - _local(zone, window.start).date() == timedelta(days=7)


def test_a_moment_far_from_today_still_has_a_window() -> None:
    for year in (1971, 2100, 2500):
        at = round(datetime(year, 2, 28, 23, 59, 59, tzinfo=UTC).timestamp() * 1000)

        window = window_at("month", 31, "America/New_York", at)

        assert window.start <= at < window.end
