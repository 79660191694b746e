"""What is left to a caller: the account is read, and nothing in it moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from llm_guard_mw import AsyncGuard, Guard, process
from llm_guard_mw.allowance import allowances
from llm_guard_mw.balances import Limit, ScopeValues
from llm_guard_mw.config import load_config
from llm_guard_mw.model import Kind
from llm_guard_mw.stores.protocol import BalanceState

Guarded = Callable[..., process.Installation]

NOON = int(datetime(2026, 11, 21, 12, tzinfo=UTC).timestamp() * 1000)
USAGE = {"model": "gpt-4o", "input_tokens": 1000, "output_tokens": 100}  # $0.0025 + $0.001


def names(**who: Any) -> list[tuple[str, str]]:
    return [(each.limit, each.place) for each in Guard().allowances(**who)]


def test_what_was_spent_is_gone_and_the_rest_is_left(guarded: Guarded) -> None:
    guarded(limits=["$1/day per user", "5k tokens/day per user", "$2 total per user"])
    with Guard().as_user(user="ada") as call:
        call.record(USAGE)

    day, tokens, total = Guard().allowances(user="ada")

    assert (day.amount, day.spent, day.held, day.left) == (1, Decimal("0.0035"), 0, Decimal("0.9965"))
    assert (tokens.amount, tokens.spent, tokens.left) == (5000, 1100, 3900)
    assert total.left == Decimal("1.9965")
    assert day.used_percent == 0
    assert tokens.used_percent == 22
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
    assert (day.resets_at, tokens.resets_at, total.resets_at) == (midnight, midnight, None)


def test_nobody_else_has_spent_it(guarded: Guarded) -> None:
    guarded(limits=["$1/day per user", "$3/day per tenant"])
    with Guard().as_user(user="ada", tenant="acme") as call:
        call.record(USAGE)

    bob = [each.left for each in Guard().allowances(user="bob", tenant="acme")]
    other_ada = [each.left for each in Guard().allowances(user="ada", tenant="initech")]

    assert bob == [1, Decimal("2.9965")]
    assert other_ada == [1, 3]


def test_a_number_is_the_same_name_as_in_as_user(guarded: Guarded) -> None:
    guarded()
    with Guard().as_user(user="7") as call:
        call.record(USAGE)

    [day] = Guard().allowances(user=7)

    assert day.spent == Decimal("0.0035")


def test_what_a_call_under_way_holds_is_not_left(guarded: Guarded) -> None:
    guarded(limits=["40 requests/day per user", "$1/day per user"])

    with Guard().as_user(user="ada"):
        requests, money = Guard().allowances(user="ada")

    assert (requests.spent, requests.left) == (1, 39)
    assert money.spent == 0
    assert money.held > 0
    assert money.left == 1 - money.held


def test_looking_moves_nothing(guarded: Guarded) -> None:
    installed = guarded(limits=["2 requests/day per user", "$1/day per user"])

    for _ in range(5):
        Guard().allowances(user="ada")

    assert list(installed.desk.store.balances("", 10)) == []
    assert installed.desk.store.journal_length() == 0


def test_each_routes_limits_are_there_with_those_of_all_calls_and_of_the_tier(guarded: Guarded) -> None:
    guarded(
        limits=["$9/day global"],
        tiers={
            "free": {"limits": ["$1/month per user", "2 concurrent per user"]},
            "pro": {"limits": ["$8/month per user"]},
        },
        routes=[
            {"path": "/chat", "feature": "chat", "limits": ["$2/day per user", "$3/day per feature"]},
            {"path": "/story", "name": "story", "feature": "story", "limits": ["$2/day per user"]},
        ],
    )

    assert names(user="ada", tier="free") == [
        ("$2/day per user", "route /chat"),
        ("$3/day per feature", "route /chat"),
        ("$9/day global", "all"),
        ("$1/month per user", "all"),
        ("$2/day per user", "route story"),
    ]
    assert ("$8/month per user", "all") in names(user="ada", tier="pro")


def test_limits_on_what_only_a_call_can_say_are_left_out(guarded: Guarded) -> None:
    guarded(limits=["$1/day per user", "$1/day per session", "$1/day per tag:team", "$1/day per user+model"])

    assert names(user="ada") == [("$1/day per user", "all")]


def test_a_name_that_could_not_be_one_is_an_error(guarded: Guarded) -> None:
    guarded()

    with pytest.raises(ValueError, match="user=''"):
        Guard().allowances(user="")


@pytest.mark.anyio
async def test_the_async_guard_says_the_same(guarded: Guarded) -> None:
    guarded(limits=["$1/day per user", "60 requests/hour per user"])
    async with AsyncGuard().as_user(user="ada") as call:
        call.record(USAGE)

    left = await AsyncGuard().allowances(user="ada")

    assert [each.left for each in left] == [Decimal("0.9965"), 59]


# ---------------------------------------------------------------- by the clock


def limit_of(text: str) -> Mapping[str, Limit]:
    [limit] = load_config({"limits": [text]}).policy.limits
    return {limit.balance(ScopeValues(user="ada")): limit}


def stand(text: str, at: int = NOON, **state: int) -> Any:
    limits = limit_of(text)
    [name] = limits
    kept = {"window_start": 0, "spent": 0, "held": 0, "changes": 1, **state}
    [found] = allowances(limits, [BalanceState(name, Kind.BUCKET, **kept)], at)
    return found


def test_a_bucket_has_drained_since_it_was_last_looked_at() -> None:
    bucket = stand("60 requests/hour per user", spent=30, stamp=NOON - 10 * 60_000)

    assert (bucket.spent, bucket.left) == (20, 40)
    assert bucket.resets_at == datetime(2026, 11, 21, 12, 20, tzinfo=UTC)


def test_a_slow_bucket_that_counts_in_seconds_drains_alike() -> None:
    bucket = stand("30 requests/30 days per user rolling", spent=12, stamp=NOON - 48 * 3_600_000)

    assert (bucket.spent, bucket.left) == (10, 20)
    assert bucket.resets_at == datetime(2026, 12, 1, 12, tzinfo=UTC)


def test_a_bucket_in_debt_has_nothing_left() -> None:
    bucket = stand("60 tokens/hour per user", spent=90, stamp=NOON)

    assert (bucket.left, bucket.used_percent) == (0, 100)
    assert bucket.resets_at == datetime(2026, 11, 21, 13, 30, tzinfo=UTC)


def test_a_full_bucket_resets_never() -> None:
    assert stand("60 requests/hour per user", spent=1, stamp=NOON - 3_600_000).resets_at is None


def test_what_was_spent_yesterday_is_left_again_today() -> None:
    day = stand("$1/day per user", spent=900_000_000, held=5, window_start=NOON - 36 * 3_600_000)

    assert (day.spent, day.held, day.left) == (0, 0, 1)
    assert day.resets_at == datetime(2026, 11, 22, tzinfo=UTC)
