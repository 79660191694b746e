"""How limits are written, and what is said about those that cannot be read."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_guard_mw.model import EXACT_MAX, Kind, Unit
from llm_guard_mw.policy import Budgets, Limit, NotationError, parse_limit

MINUTE = 60_000
DAY = 86_400_000


def complaint(limit: object, **known: object) -> str:
    with pytest.raises(NotationError) as caught:
        parse_limit(limit, **known)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "kind", "unit", "amount", "capacity", "period"),
    [
        ("20 requests/minute per user", Kind.BUCKET, Unit.REQUESTS, 20, 20, MINUTE),
        ("1 request/2 seconds per user", Kind.BUCKET, Unit.REQUESTS, 1, 1, 2000),
        ("20/minute per user", Kind.BUCKET, Unit.REQUESTS, 20, 20, MINUTE),
        ("20 requests per minute per user", Kind.BUCKET, Unit.REQUESTS, 20, 20, MINUTE),
        ("1_000 requests / 5 minutes per user", Kind.BUCKET, Unit.REQUESTS, 1000, 1000, 5 * MINUTE),
        ("40k tokens/minute per user burst 80k", Kind.BUCKET, Unit.TOKENS, 40_000, 80_000, MINUTE),
        ("40k tokens/minute burst 80k per user", Kind.BUCKET, Unit.TOKENS, 40_000, 80_000, MINUTE),
        ("1.5k output tokens/hour per user", Kind.BUCKET, Unit.OUTPUT_TOKENS, 1500, 1500, 60 * MINUTE),
        ("$1/hour per user burst $5", Kind.BUCKET, Unit.USD, 10**9, 5 * 10**9, 60 * MINUTE),
        ("$0.001/hour per user", Kind.BUCKET, Unit.USD, 10**6, 10**6, 60 * MINUTE),
        ("$10/month per user rolling", Kind.BUCKET, Unit.USD, 10**10, 10**10, 30 * DAY),
        ("$10/week rolling per user", Kind.BUCKET, Unit.USD, 10**10, 10**10, 7 * DAY),
        ("5 credits/2 days per user burst 9 rolling", Kind.BUCKET, Unit.CREDITS, 5, 9, 2 * DAY),
        ("5 REQUESTS/Hour Per User", Kind.BUCKET, Unit.REQUESTS, 5, 5, 60 * MINUTE),
        ("$2/day per user", Kind.CALENDAR, Unit.USD, 2 * 10**9, 2 * 10**9, "day"),
        ("$500/day global", Kind.CALENDAR, Unit.USD, 500 * 10**9, 500 * 10**9, "day"),
        ("$500/day per global", Kind.CALENDAR, Unit.USD, 500 * 10**9, 500 * 10**9, "day"),
        ("2M input tokens/week per tenant", Kind.CALENDAR, Unit.INPUT_TOKENS, 2_000_000, 2_000_000, "week"),
        ("100 requests/month per key", Kind.CALENDAR, Unit.REQUESTS, 100, 100, "month"),
        ("$5 total per tenant", Kind.TOTAL, Unit.USD, 5 * 10**9, 5 * 10**9, None),
        ("1k credits total per tenant+feature", Kind.TOTAL, Unit.CREDITS, 1000, 1000, None),
        ("2 concurrent per user", Kind.CONCURRENT, Unit.CONCURRENT, 2, 2, None),
    ],
)
def test_the_notation_says_kind_unit_amount_and_period(
    text: str, kind: Kind, unit: Unit, amount: int, capacity: int, period: int | str | None
) -> None:
    limit = parse_limit(text)

    assert (limit.kind, limit.unit, limit.amount, limit.capacity) == (kind, unit, amount, capacity)
    assert (limit.period_ms if kind is Kind.BUCKET else limit.period) == period
    assert limit.text == text


@pytest.mark.parametrize(
    ("written", "scope"),
    [
        ("per user", ("user",)),
        ("per tenant+feature", ("tenant", "feature")),
        ("per feature + tenant", ("tenant", "feature")),
        ("per tenant+user", ("user",)),  # a user always stands within its tenant
        ("per tag:Team", ("tag:Team",)),
        ("per tag:b+tag:a+tenant", ("tag:a", "tag:b")),
        ("per session+workflow", ("workflow", "session")),
        ("global", ("global",)),
        ("per global", ("global",)),
    ],
)
def test_scopes_are_kept_in_one_order_without_what_goes_without_saying(written: str, scope: tuple[str, ...]) -> None:
    assert parse_limit(f"$2/day {written}").scope == scope


def test_a_bucket_ticks_in_milliseconds_up_to_a_day_and_in_seconds_beyond() -> None:
    a_day = parse_limit("5 requests/24 hours per user")
    more = parse_limit("5 requests/25 hours per user")

    assert (a_day.tick_ms, a_day.period_ticks) == (1, DAY)
    assert (more.tick_ms, more.period_ticks) == (1000, 25 * 3600)


def test_a_bucket_of_one_day_written_in_two_ways_is_one_balance() -> None:
    assert parse_limit("5 requests/24 hours per user").counted == parse_limit("9 requests/day per user rolling").counted


def test_the_table_form_overrides_anchor_timezone_and_parts() -> None:
    limit = parse_limit(
        {"limit": "$50/month per tenant", "anchor": 15, "timezone": "Europe/Berlin", "hard": 1.1, "overdraft": 0},
        timezone="UTC",
        budgets=Budgets(warning=Fraction(1, 2)),
    )

    assert (limit.anchor, limit.timezone) == (15, "Europe/Berlin")
    assert (limit.warning, limit.hard, limit.overdraft) == (Fraction(1, 2), Fraction(11, 10), 0)
    assert limit.ceiling() == limit.ceiling(degraded=True) == 55 * 10**9


def test_a_condition_takes_one_value_or_a_list() -> None:
    limit = parse_limit(
        {"limit": "5 requests/minute per user", "when": {"tier": ["free", "trial"], "tag:team": "x"}}, tier="free"
    )

    assert dict(limit.when) == {"tier": ("free", "trial"), "tag:team": ("x",)}


def test_weeks_begin_on_monday_months_on_the_first_and_days_have_no_anchor() -> None:
    anchors = [parse_limit(f"$1/{period} per user").anchor for period in ("day", "week", "month")]

    assert anchors == [0, 1, 1]


def test_only_budgets_have_room_for_a_cheaper_model() -> None:
    def ceilings(text: str) -> tuple[int, int]:
        limit = parse_limit(text, budgets=Budgets(hard=Fraction(11, 10), overdraft=Fraction(1, 10)))
        return limit.ceiling(), limit.ceiling(degraded=True)

    assert ceilings("10 tokens/day per user") == (11, 12)
    assert ceilings("15 credits total per user") == (16, 18)  # rounded down
    assert ceilings("10 requests/day per user") == (10, 10)
    assert ceilings("10 tokens/hour per user burst 30") == (30, 30)
    assert ceilings("3 concurrent per user") == (3, 3)


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ("20 reqests/minute per user", ['unknown unit "reqests"', 'did you mean "requests"?']),
        ("20 requests/minut per user", ['unknown period "minut"', 'did you mean "minute"?']),
        ("20 requests/min per user", ['write "/minute"']),
        ("20 requests/5 min per user", ['write "/5 minutes"']),
        ("20 requests/minute per usr", ['unknown scope "usr"', 'did you mean "user"?']),
        ("$5/month per customer", ['write "per tenant"']),
        ("$5/day", ['add a scope: "$5/day per user"', '"$5/day global"']),
        ("$5 per user", ['"$5" says no period', '"$5/day"']),
        ("hello", ['"hello" is not a limit', '"$2/day per user"']),
        ("", ["is not a limit"]),
        ("0.5 requests/second per user", ['write "1 request/2 seconds"']),
        ("1.5 requests/5 minutes per user", ['write "3 requests/10 minutes"']),
        ("0.5 tokens/day per user", ['write "1 token/2 days … rolling"']),
        ("1.5 concurrent per user", ["write 1 or 2"]),
        ("0.5 credits total per user", ["write 1 or 1"]),
        ("-5 requests/minute per user", ["negative"]),
        ("0 requests/minute per user", ["allows nothing"]),
        ("1,000 requests/minute per user", ['write "1_000"']),
        ("1__0 requests/minute per user", ['"1__0" is not a number']),
        ("2m tokens/day per user", ['write "2M"']),
        ("5requests/minute per user", ['write "5 requests"']),
        ("5 USD/day per user", ['write "$5"']),
        ("$5 tokens/day per user", ["has two units"]),
        ("$0.0000000001/hour per user", ["finer than a nano-dollar"]),
        ("$5_000_000/month global", ["more than can be counted exactly", "$4_503_599"]),
        ("5 requests/0 minutes per user", ["is empty"]),
        ("5 requests/2000 days per user rolling", ["too long", "1098 days"]),
        ("$5/2 weeks per user", ["no calendar period", "rolling"]),
        ("$5/year per user", ["365 days", "rolling"]),
        ("$5/month/user", ['"month/user" is not a period']),
        ("$5/day per user burst $9", ['"burst" is for buckets only']),
        ("$5/hour per user burst 9", ['write "burst $9"']),
        ("5 tokens/hour per user burst 9 requests", ["another unit"]),
        ("5 tokens/hour per user burst 0.5", ["is no capacity"]),
        ("5 tokens/hour per user burst", ["says no amount"]),
        ("$5 total per user rolling", ['leave "rolling" out']),
        ("5 requests/minute per user per feature", ['"per user+feature"']),
        ("5 requests/minute per user, feature", ['"per user+feature"']),
        ("5 requests/minute per user+user", ["twice"]),
        ("5 requests/minute per user+global", ['"global" stands alone']),
        ("5 requests/minute per tag:", ["names no tag"]),
        ("5 requests/minute per tag:user_tier", ['write "per tier"']),
        ("2 concurrent requests per user", ['write "2 concurrent per user"']),
        ("$2 concurrent per user", ["nothing else"]),
        ({"limt": "$5/day per user"}, ['did you mean "limit"?', 'has no "limit"']),
        ({"limit": 5}, ["5 is not a limit"]),
        ({"limit": "$5/day per user", "anchor": 3}, ["anchor = 3 means nothing"]),
        ({"limit": "$5/week per user", "anchor": 8}, ["write 1 to 7"]),
        ({"limit": "$5/week per user", "anchor": True}, ["anchor = true"]),
        ({"limit": "$5/month per user", "timezone": "Europe/Berln"}, ['did you mean "Europe/Berlin"?']),
        ({"limit": "$5/month per user", "timezone": "Europe"}, ["unknown timezone"]),
        ({"limit": "5 tokens/hour per user", "timezone": "UTC"}, ["timezone", "means nothing"]),
        ({"limit": "5 requests/day per user", "hard": 1.1}, ['"hard" is for budgets']),
        ({"limit": "$5/day per user", "hard": 0.5}, ["hard = 0.5 is below critical = 0.9"]),
        ({"limit": "$5/day per user", "warning": float("nan")}, ["no part of an amount"]),
        ({"limit": "$5/day per user", "when": {}}, ["is not a condition"]),
        ({"limit": "$5/day per user", "when": {"tir": "x"}}, ['unknown condition "tir"', 'did you mean "tier"?']),
        ({"limit": "$5/day per user", "when": {"tier": []}}, ["tier = [] is not a text"]),
        ({"limit": "$5/day per user", "when": {"tag:feature": "x"}}, ["write when = { feature = … }"]),
        ({"limit": "$4_000_000/day global", "hard": 3}, ["with hard and overdraft"]),
    ],
)
def test_what_cannot_be_read_is_named_with_what_would_be_right(limit: object, says: list[str]) -> None:
    said = complaint(limit)

    assert [words for words in says if words not in said] == []


def test_every_wrong_piece_of_a_limit_is_named_at_once() -> None:
    with pytest.raises(NotationError) as caught:
        parse_limit({"limit": "20 reqests/minut per usr", "anchr": 3, "when": {"tir": "x"}})

    assert len(caught.value.faults) == 5
    assert {fault.key for fault in caught.value.faults} == {"limit", "anchr", "when"}


def test_a_tier_condition_that_can_never_hold_is_a_mistake() -> None:
    limit = {"limit": "$5/day per user", "when": {"tier": "pro"}}

    assert "can never hold" in complaint(limit, tier="free")


@given(
    amount=st.integers(1, 2**52),
    unit=st.sampled_from(["requests", "tokens", "input tokens", "output tokens", "credits"]),
    count=st.integers(1, 60),
    period=st.sampled_from(["second", "minute", "hour", "day"]),
)
def test_no_bucket_that_is_accepted_leaves_exact_arithmetic(amount: int, unit: str, count: int, period: str) -> None:
    limit = parse_limit(f"{amount} {unit}/{count} {period}s per user rolling")

    assert limit.period_ms is not None
    assert limit.period_ticks * limit.tick_ms == limit.period_ms
    assert limit.period_ticks**2 <= EXACT_MAX  # elapsed * (rate mod period) + rem
    assert limit.amount + limit.capacity <= EXACT_MAX + 1  # whole periods * rate


def read_or_refused(text: str) -> bool:
    try:
        return isinstance(parse_limit(text), Limit)
    except NotationError as error:
        return bool(error.faults) and all(fault.problem and fault.fix for fault in error.faults)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused_with_a_reason(text: str) -> None:
    assert read_or_refused(text)


_PIECES = st.sampled_from(
    ["$", "5", "0.5", "40k", "2M", "requests", "tokens", "/", "minute", "5 minutes", "day", "per", "user", "tag:", "+",
     "global", "burst", "rolling", "total", "concurrent", "-1", "1,0", "€"]
)  # fmt: skip


@given(st.lists(_PIECES, max_size=9))
def test_any_mixture_of_the_pieces_is_read_or_refused_with_a_reason(pieces: list[str]) -> None:
    assert read_or_refused(" ".join(pieces))
