"""The limits of one process by itself: what it grants, what it refuses, and what a settlement gives back."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from llm_guard_mw import local_cap
from llm_guard_mw.errors import StoreUnavailable
from llm_guard_mw.local_cap import LocalCap
from llm_guard_mw.model import Demand
from llm_guard_mw.stores.protocol import Granted, Moved, Refused
from tests.model.world import (
    DAY,
    MINUTE,
    NOON,
    concurrent,
    day_start,
    days,
    dollars,
    offer,
    prepaid,
    requests,
    tokens,
    wish,
)


def ask(cap: LocalCap, exchange: str, *demands: Demand, now: int = NOON, **rest: object) -> Granted | Refused:
    return cap.reserve(wish(exchange, offer(*demands), **rest), now)  # type: ignore[arg-type] # of a wish


def settle(cap: LocalCap, exchange: str, granted: Granted | Refused, actual: int, now: int = NOON) -> None:
    assert isinstance(granted, Granted)
    cap.settle(exchange, [Moved(line, actual) for line in granted.lines], now)


def granted(outcomes: Sequence[object]) -> int:
    return sum(isinstance(outcome, Granted) for outcome in outcomes)


def test_each_kind_of_limit_is_granted_up_to_its_amount() -> None:
    for demand in (
        dollars("day", 100, 30),
        prepaid("pot", 100, 30),
        tokens("tpm", 100, 30),
        requests("rpm", 3),
        concurrent("calls", 3),
    ):
        cap = LocalCap()

        outcomes = [ask(cap, f"{n}/0", demand) for n in range(5)]

        assert granted(outcomes) == 3, demand
        assert isinstance(outcomes[3], Refused)
        assert outcomes[3].short == ((0,),)


def test_a_refusal_leaves_no_trace() -> None:
    cap = LocalCap()
    assert isinstance(ask(cap, "a/0", prepaid("pot", 100, 10), dollars("day", 5, 6)), Refused)

    assert isinstance(ask(cap, "b/0", prepaid("pot", 100, 100)), Granted)


def test_what_was_not_used_is_given_back_and_what_was_used_beyond_counts() -> None:
    cap = LocalCap()
    first, second = ask(cap, "a/0", prepaid("pot", 100, 50)), ask(cap, "b/0", prepaid("pot", 100, 50))

    settle(cap, "a/0", first, 10)
    settle(cap, "a/0", first, 10)
    settle(cap, "b/0", second, 60)

    assert isinstance(ask(cap, "c/0", prepaid("pot", 100, 31)), Refused)
    assert isinstance(ask(cap, "d/0", prepaid("pot", 100, 30)), Granted)


def test_a_request_is_never_given_back() -> None:
    cap = LocalCap()
    outcome = ask(cap, "a/0", requests("rpm", 1))

    settle(cap, "a/0", outcome, 0)

    assert isinstance(ask(cap, "b/0", requests("rpm", 1)), Refused)


def test_others_claims_are_told_from_what_is_spent() -> None:
    cap = LocalCap()
    first = ask(cap, "a/0", prepaid("pot", 100, 60))
    settle(cap, "a/0", first, 20)
    ask(cap, "b/0", prepaid("pot", 100, 50))

    refused = ask(cap, "c/0", prepaid("pot", 100, 40))

    assert isinstance(refused, Refused)
    assert (refused.standings[0][0].spent, refused.standings[0][0].held) == (20, 50)


def test_a_taker_is_checked_as_if_what_it_takes_were_gone() -> None:
    cap = LocalCap()
    ask(cap, "a/0", dollars("day", 100, 80), requests("rpm", 1))

    taker = ask(cap, "a/1", dollars("day", 100, 90), takes="a/0")

    assert isinstance(taker, Granted)
    assert taker.took
    assert [(line.balance, line.amount, line.spent) for line in taker.lines] == [("rpm", 1, True), ("day", 90, False)]
    settle(cap, "a/0", taker, 0)
    assert isinstance(ask(cap, "b/0", dollars("day", 100, 11)), Refused)


def test_the_output_cap_is_lowered_to_what_the_rest_pays_for() -> None:
    cap = LocalCap()

    outcome = cap.reserve(wish("a/0", offer(dollars("day", 100, 10, 1), cap=200, at_least=50)), NOON)

    assert isinstance(outcome, Granted)
    assert (outcome.cap, outcome.lines[0].amount, outcome.lines[0].window_start) == (90, 100, day_start(NOON))


def test_what_is_forced_is_granted_and_hears_what_stood_in_the_way() -> None:
    outcome = ask(LocalCap(), "a/0", prepaid("pot", 5, 6), force=True)

    assert isinstance(outcome, Granted)
    assert outcome.short == (0,)


def test_a_new_day_is_a_new_window_and_late_settlements_stay_in_their_own() -> None:
    cap = LocalCap()
    first = ask(cap, "a/0", dollars("day", 100, 100))
    tomorrow = NOON + DAY
    second = ask(cap, "b/0", dollars("day", 100, 100, windows=days(tomorrow)), now=tomorrow)

    settle(cap, "a/0", first, 10, now=tomorrow)

    assert isinstance(second, Granted)
    assert isinstance(ask(cap, "c/0", dollars("day", 100, 1, windows=days(tomorrow)), now=tomorrow), Refused)


def test_a_bucket_lets_pass_its_capacity_in_the_time_in_which_it_fills() -> None:
    cap = LocalCap()
    demand = tokens("tpm", 120, 60, rate=60, period=MINUTE)  # it fills in two minutes
    start = NOON // (2 * MINUTE) * 2 * MINUTE

    outcomes = [ask(cap, f"{n}/0", demand, now=start + n * 1000) for n in range(4)]
    refused = outcomes[2]
    later = ask(cap, "z/0", demand, now=start + 2 * MINUTE)

    assert granted(outcomes) == 2
    assert isinstance(refused, Refused)
    assert refused.standings[0][0].window_end == start + 2 * MINUTE
    assert isinstance(later, Granted)
    assert later.lines[0].window_start == 0


def test_a_call_counts_once_and_leaves_when_it_is_over() -> None:
    cap = LocalCap()
    assert granted([ask(cap, "a/0", concurrent("calls", 1)), ask(cap, "a/1", concurrent("calls", 1))]) == 2
    assert isinstance(ask(cap, "b/0", concurrent("calls", 1)), Refused)

    cap.close_call("a")

    assert isinstance(ask(cap, "c/0", concurrent("calls", 1)), Granted)


def test_a_balance_too_many_is_not_counted_but_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_cap, "BALANCES_MAX", 3)
    cap = LocalCap()
    for n in range(3):
        ask(cap, f"{n}/0", prepaid(f"pot-{n}", 9, 1))

    with pytest.raises(StoreUnavailable, match="3 balances"):
        ask(cap, "z/0", prepaid("pot-z", 9, 1))

    assert isinstance(ask(cap, "1/1", prepaid("pot-1", 9, 1)), Granted)


def test_many_threads_get_no_more_than_there_is() -> None:
    cap = LocalCap()
    together = threading.Barrier(8)

    def hammer(thread: int) -> int:
        together.wait()
        return granted([ask(cap, f"{thread}-{n}/0", prepaid("pot", 100, 1)) for n in range(50)])

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(hammer, range(8))) == 100
