"""What every store has to do: one suite, each store, a clock in the test's hand."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from msgspec.structs import replace

from llm_guard_mw.model import Basis, EntryKind, JournalEntry, Line, Window
from llm_guard_mw.stores.journal import encode_event
from llm_guard_mw.stores.protocol import (
    ABANDONED_TOMBSTONE_MS,
    LATE_SETTLE_MS,
    TOMBSTONE_MS,
    ClockApart,
    Granted,
    HoldState,
    Refused,
    Replay,
    Reserve,
    Settled,
    Settlement,
    Standing,
    Store,
    TooLate,
    Unreadable,
)
from tests.model.world import (
    DAY,
    HOUR,
    LEASE,
    MINUTE,
    NOON,
    SECOND,
    Clock,
    booking,
    concurrent,
    day_start,
    days,
    dollars,
    event_of,
    offer,
    prepaid,
    released,
    requests,
    requests_a_day,
    settled,
    settlement,
    tokens,
    wish,
)

Ending = Callable[[str, Granted], Settlement]

TODAY = day_start(NOON)
TOMORROW = TODAY + DAY


def grant(store: Store, wished: Reserve) -> Granted:
    outcome = store.reserve(wished)
    assert isinstance(outcome, Granted), outcome
    return outcome


def refuse(store: Store, wished: Reserve) -> Refused:
    outcome = store.reserve(wished)
    assert isinstance(outcome, Refused), outcome
    return outcome


def account(store: Store, balance: str) -> tuple[int, int]:
    """What is spent and held under a name."""
    states = store.peek([balance])
    return (states[0].spent, states[0].held) if states else (0, 0)


def changes(store: Store, balance: str) -> int:
    states = store.peek([balance])
    return states[0].changes if states else 0


def journal(store: Store, after: str = "", count: int = 1000) -> list[JournalEntry]:
    entries = store.read_journal(after, count)
    assert not any(isinstance(entry, Unreadable) for entry in entries)
    return [entry for entry in entries if isinstance(entry, JournalEntry)]


def amounts(entry: JournalEntry) -> dict[str, int]:
    return {line.balance: line.amount for line in entry.lines}


# ---------------------------------------------------------------- reserve: what is granted


def test_a_grant_holds_what_was_claimed(store: Store) -> None:
    granted = grant(store, wish("c/1", offer(dollars("day", 1000, 100, 2), cap=50)))

    assert (granted.offer, granted.cap, granted.at, granted.short) == (0, 50, NOON, ())
    assert [(line.balance, line.window_start, line.amount, line.spent) for line in granted.lines] == [
        ("day", TODAY, 200, False)
    ]
    assert account(store, "day") == (0, 200)


def test_a_grant_is_leased(store: Store) -> None:
    granted = grant(store, wish("c/1", offer(prepaid("pot", 10, 1)), lease_ms=7 * SECOND))

    assert granted.lease_end == NOON + 7 * SECOND
    assert store.holds("", 10) == (HoldState("c/1", "c", NOON + 7 * SECOND, granted.lines),)


def test_the_standings_of_a_grant_include_it(store: Store) -> None:
    granted = grant(store, wish("c/1", offer(dollars("day", 1000, 100), prepaid("pot", 1000, 7), requests("rpm", 60))))

    assert granted.standings == (
        Standing(0, 100, 0, TODAY, TOMORROW),
        Standing(0, 7),
        Standing(1, 0),
    )


def test_a_claim_that_fills_a_balance_to_its_ceiling_is_granted(store: Store) -> None:
    granted = grant(store, wish("c/1", offer(dollars("day", 100, 100))))

    assert granted.lines[0].amount == 100


def test_held_money_counts_as_spent(store: Store) -> None:
    grant(store, wish("c/1", offer(dollars("day", 100, 60))))

    refused = refuse(store, wish("d/1", offer(dollars("day", 100, 41))))

    assert refused.short == ((0,),)
    assert refused.standings == ((Standing(0, 60, 0, TODAY, TOMORROW),),)
    assert refused.at == NOON


def test_a_request_is_spent_when_it_is_granted(store: Store) -> None:
    granted = grant(store, wish("c/1", offer(requests_a_day("rpd", 2))))

    assert granted.lines[0].spent
    assert account(store, "rpd") == (1, 0)


def test_the_first_offer_that_fits_is_granted(store: Store) -> None:
    full, cheaper, cheapest = (offer(dollars("day", 100, fixed)) for fixed in (150, 90, 10))

    granted = grant(store, wish("c/1", full, cheaper, cheapest))

    assert (granted.offer, granted.lines[0].amount) == (1, 90)


def test_an_offer_of_nothing_fits_always(store: Store) -> None:
    refused_first = offer(dollars("day", 0, 1))

    granted = grant(store, wish("c/1", refused_first, offer(decision="cache")))

    assert (granted.offer, granted.lines, granted.standings) == (1, (), ())


def test_offers_may_have_ceilings_of_their_own_on_one_balance(store: Store) -> None:
    grant(store, wish("c/1", offer(dollars("day", 100, 100))))

    granted = grant(store, wish("d/1", offer(dollars("day", 100, 10)), offer(dollars("day", 110, 10))))

    assert granted.offer == 1
    assert account(store, "day") == (0, 110)


def test_the_cap_is_lowered_to_what_the_tightest_balance_pays_for(store: Store) -> None:
    wished = wish("c/1", offer(dollars("day", 1000, 100, 3), tokens("tpm", 220, 20, 1), cap=500, at_least=100))

    granted = grant(store, wished)

    assert granted.cap == 200
    assert [line.amount for line in granted.lines] == [700, 220]


def test_the_cap_is_lowered_to_at_least_and_no_further(store: Store) -> None:
    grant(store, wish("c/1", offer(dollars("day", 300, 0, 1), cap=1000, at_least=300)))

    refused = refuse(store, wish("d/1", offer(dollars("day", 598, 0, 1), cap=1000, at_least=299)))

    assert refused.short == ((0,),)
    assert grant(store, wish("e/1", offer(dollars("day", 599, 0, 1), cap=1000, at_least=299))).cap == 299


def test_a_cap_is_not_lowered_for_a_balance_that_output_does_not_touch(store: Store) -> None:
    refused = refuse(store, wish("c/1", offer(dollars("day", 1000, 0, 1), prepaid("pot", 5, 6), cap=500, at_least=1)))

    assert refused.short == ((1,),)


def test_a_refusal_names_the_demands_of_each_offer_that_stood_in_the_way(store: Store) -> None:
    refused = refuse(
        store,
        wish(
            "c/1",
            offer(dollars("day", 10, 11), prepaid("pot", 10, 10), tokens("tpm", 10, 12)),
            offer(dollars("day", 10, 10), tokens("tpm", 10, 12)),
        ),
    )

    assert refused.short == ((0, 2), (1,))
    assert [len(standings) for standings in refused.standings] == [3, 2]


# ---------------------------------------------------------------- reserve: all or nothing


def test_a_refusal_leaves_no_trace(store: Store) -> None:
    refuse(
        store,
        wish("c/1", offer(requests("rpm", 10), dollars("day", 100, 1), concurrent("now", 5), prepaid("pot", 5, 6))),
    )

    assert store.balances("", 10) == ()
    assert store.holds("", 10) == ()
    assert journal(store) == []
    assert grant(store, wish("d/1", offer(concurrent("now", 1)))).standings[0].spent == 1


def test_a_refusal_changes_nothing_where_there_was_something(store: Store, clock: Clock) -> None:
    grant(store, wish("c/1", offer(tokens("tpm", 100, 50), dollars("day", 100, 50), requests("rpm", 5))))
    before = store.balances("", 10), store.holds("", 10)

    clock.forward(30 * SECOND)
    refuse(store, wish("d/1", offer(tokens("tpm", 100, 1), requests("rpm", 5), dollars("day", 100, 51))))

    assert (store.balances("", 10), store.holds("", 10)) == before


def test_a_refused_exchange_may_ask_again(store: Store) -> None:
    grant(store, wish("c/1", offer(dollars("day", 100, 60))))
    again = wish("d/1", offer(dollars("day", 100, 60)))
    refuse(store, again)

    store.settle(settlement("c/1", store.holds("", 1)[0].lines, NOON + LEASE, {"day": 0}))

    assert grant(store, again).lines[0].amount == 60


def test_a_policy_edit_keeps_what_was_used(store: Store) -> None:
    grant(store, wish("c/1", offer(dollars("day", 100, 80))))

    assert refuse(store, wish("d/1", offer(dollars("day", 79, 0)))).standings[0][0].held == 80
    assert grant(store, wish("e/1", offer(dollars("day", 200, 120)))).standings[0].held == 200


# ---------------------------------------------------------------- reserve: replay, time


def test_a_reserve_sent_again_gets_the_same_grant_and_holds_nothing_more(store: Store) -> None:
    wished = wish(
        "c/1",
        offer(dollars("day", 10, 11)),
        offer(dollars("day", 1000, 100, 1), requests("rpm", 9), cap=2000, at_least=10),
    )
    first = grant(store, wished)

    again = grant(store, wished)

    assert again == first
    assert account(store, "day") == (0, 1000)
    assert account(store, "rpm") == (1, 0)


def test_a_reserve_sent_again_later_sees_how_the_balances_stand_by_then(store: Store, clock: Clock) -> None:
    wished = wish("c/1", offer(dollars("day", 1000, 100)))
    first = grant(store, wished)
    grant(store, wish("d/1", offer(dollars("day", 1000, 50))))

    clock.forward(SECOND)
    again = grant(store, wished)

    assert (again.offer, again.cap, again.lines, again.lease_end) == (0, first.cap, first.lines, first.lease_end)
    assert (again.standings[0].held, again.at) == (150, NOON + SECOND)


def test_a_reserve_that_arrives_after_its_time_is_not_applied(store: Store, clock: Clock) -> None:
    clock.forward(2 * SECOND + 1)

    assert store.reserve(wish("c/1", offer(prepaid("pot", 10, 1)), not_after=NOON + 2 * SECOND)) == TooLate(clock.now)
    assert store.holds("", 10) == ()


def test_a_reserve_that_arrives_just_in_time_is_applied(store: Store, clock: Clock) -> None:
    clock.forward(2 * SECOND)

    grant(store, wish("c/1", offer(prepaid("pot", 10, 1)), not_after=NOON + 2 * SECOND))


@pytest.mark.parametrize("ending", [settled, released])
def test_a_reserve_sent_again_after_its_exchange_ended_is_not_applied(store: Store, ending: Ending) -> None:
    wished = wish("c/1", offer(prepaid("pot", 10, 1)))
    store.settle(ending("c/1", grant(store, wished)))
    before = account(store, "pot")

    assert store.reserve(wished) == TooLate(NOON)
    assert account(store, "pot") == before


def test_a_reserve_sent_again_after_its_exchange_was_abandoned_is_not_applied(store: Store, clock: Clock) -> None:
    wished = wish("c/1", offer(prepaid("pot", 10, 1)))
    grant(store, wished)
    clock.forward(LEASE)
    store.expire()

    assert store.reserve(wished) == TooLate(clock.now)


def test_a_reserve_sent_again_after_its_exchange_was_taken_over_is_not_applied(store: Store) -> None:
    wished = wish("c/0", offer(prepaid("pot", 10, 1)))
    grant(store, wished)
    grant(store, wish("c/1", offer(prepaid("pot", 10, 1)), takes="c/0"))

    assert store.reserve(wished) == TooLate(NOON)
    assert account(store, "pot") == (0, 1)


# ---------------------------------------------------------------- calendar windows


def test_the_store_picks_the_window_by_its_own_clock(store: Store, clock: Clock) -> None:
    sent = days(NOON)
    clock.now = TOMORROW

    granted = grant(store, wish("c/1", offer(dollars("day", 100, 10, windows=sent))))

    assert granted.lines[0].window_start == TOMORROW
    assert granted.standings[0].window_end == TOMORROW + DAY


@pytest.mark.parametrize("now", [TODAY - 1, TOMORROW + DAY])
def test_windows_that_are_not_those_of_the_stores_clock_are_sent_back(store: Store, clock: Clock, now: int) -> None:
    clock.now = now

    answer = store.reserve(wish("c/1", offer(prepaid("pot", 10, 1), concurrent("now", 1), dollars("day", 100, 10))))

    assert answer == ClockApart(now)
    assert store.balances("", 10) == ()
    assert grant(store, wish("d/1", offer(concurrent("now", 1)))).short == ()


def test_windows_of_one_wish_may_be_of_different_length(store: Store) -> None:
    month = (Window(TODAY - 8 * DAY, TODAY + 22 * DAY), Window(TODAY + 22 * DAY, TODAY + 53 * DAY))

    granted = grant(store, wish("c/1", offer(dollars("day", 9, 1), dollars("month", 9, 1, windows=month))))

    assert [standing.window_end for standing in granted.standings] == [TOMORROW, TODAY + 22 * DAY]


def test_a_new_window_starts_with_nothing_spent_or_held(store: Store, clock: Clock) -> None:
    grant(store, wish("c/1", offer(dollars("day", 100, 100))))
    clock.now = TOMORROW

    granted = grant(store, wish("d/1", offer(dollars("day", 100, 70))))

    assert granted.standings == (Standing(0, 70, 0, TOMORROW, TOMORROW + DAY),)
    assert store.peek(["day"])[0].window_start == TOMORROW


def test_a_refusal_does_not_open_a_new_window(store: Store, clock: Clock) -> None:
    grant(store, wish("c/1", offer(dollars("day", 100, 30)), lease_ms=DAY))
    clock.now = TOMORROW

    refused = refuse(store, wish("d/1", offer(dollars("day", 100, 101))))

    assert refused.standings == ((Standing(0, 0, 0, TOMORROW, TOMORROW + DAY),),)
    assert store.peek(["day"])[0].window_start == TODAY


def test_a_line_of_an_older_window_moves_the_journal_and_no_balance(store: Store, clock: Clock) -> None:
    old = grant(store, wish("c/1", offer(dollars("day", 100, 40))))
    clock.now = TOMORROW
    grant(store, wish("d/1", offer(dollars("day", 100, 5))))
    moved = changes(store, "day")

    assert store.settle(settled("c/1", old, {"day": 25})) is Settled.DONE

    assert account(store, "day") == (0, 5)
    assert [(line.window_start, line.amount) for line in journal(store)[0].lines] == [(TODAY, 25)]
    assert changes(store, "day") > moved


def test_a_hold_of_an_older_window_expires_into_the_journal_and_no_balance(store: Store, clock: Clock) -> None:
    grant(store, wish("c/1", offer(dollars("day", 100, 40)), lease_ms=12 * HOUR))
    clock.now = TOMORROW
    grant(store, wish("d/1", offer(dollars("day", 100, 5))))

    store.expire()

    assert account(store, "day") == (0, 5)
    assert [(line.window_start, line.amount) for line in journal(store)[0].lines] == [(TODAY, 40)]


def test_a_balance_whose_window_is_over_is_still_moved_until_a_reserve_opens_the_next(
    store: Store, clock: Clock
) -> None:
    old = grant(store, wish("c/1", offer(dollars("day", 100, 40))))
    clock.now = TOMORROW

    store.settle(settled("c/1", old, {"day": 25}))

    assert store.peek(["day"])[0].window_start == TODAY
    assert account(store, "day") == (25, 0)


def test_a_clock_that_jumps_back_over_a_window_edge_leaves_the_balance_in_the_later_window(
    store: Store, clock: Clock
) -> None:
    clock.now = TOMORROW
    grant(store, wish("c/1", offer(dollars("day", 100, 60))))
    clock.now = TOMORROW - 1

    granted = grant(store, wish("d/1", offer(dollars("day", 100, 40))))

    assert granted.standings == (Standing(0, 100, 0, TOMORROW, TOMORROW + DAY),)
    assert granted.lines[0].window_start == TOMORROW
    refuse(store, wish("e/1", offer(dollars("day", 100, 1))))


def test_the_end_of_a_window_that_was_not_sent_is_not_made_up(store: Store, clock: Clock) -> None:
    clock.now = NOON + 5 * DAY
    grant(store, wish("c/1", offer(dollars("day", 100, 60, windows=days(clock.now)))))
    clock.now = NOON

    granted = grant(store, wish("d/1", offer(dollars("day", 100, 40))))

    assert granted.standings == (Standing(0, 100, 0, TODAY + 5 * DAY, None),)


def test_a_total_never_resets(store: Store, clock: Clock) -> None:
    store.settle(settled("c/1", grant(store, wish("c/1", offer(prepaid("pot", 10, 10))))))

    clock.forward(400 * DAY)

    assert refuse(store, wish("d/1", offer(prepaid("pot", 10, 1)))).standings == ((Standing(10, 0),),)
    grant(store, wish("d/1", offer(prepaid("pot", 11, 1))))


# ---------------------------------------------------------------- buckets


def test_a_bucket_drains_with_time_and_keeps_the_fraction(store: Store, clock: Clock) -> None:
    store.settle(settled("c/1", grant(store, wish("c/1", offer(tokens("tpm", 100, 50, rate=60, period=MINUTE))))))
    clock.forward(2500)

    granted = grant(store, wish("d/1", offer(tokens("tpm", 100, 1, rate=60, period=MINUTE))))

    assert granted.standings == (Standing(48, 1, 500 * 60),)


def test_what_a_bucket_holds_does_not_drain(store: Store, clock: Clock) -> None:
    grant(store, wish("c/1", offer(tokens("tpm", 100, 80)), lease_ms=HOUR))
    clock.forward(30 * MINUTE)

    refused = refuse(store, wish("d/1", offer(tokens("tpm", 100, 21))))

    assert refused.standings == ((Standing(0, 80),),)


def test_a_settlement_drains_the_bucket_before_it_adds(store: Store, clock: Clock) -> None:
    granted = grant(store, wish("c/1", offer(tokens("tpm", 100, 10))))
    clock.forward(MINUTE)

    store.settle(settled("c/1", granted, {"tpm": 100}))

    assert grant(store, wish("d/1", offer(tokens("tpm", 101, 1)))).standings[0] == Standing(100, 1)


def test_an_expiry_drains_the_bucket_before_it_adds(store: Store, clock: Clock) -> None:
    grant(store, wish("c/1", offer(tokens("tpm", 100, 10))))
    clock.forward(LEASE)

    store.expire()

    assert grant(store, wish("d/1", offer(tokens("tpm", 100, 1)))).standings[0] == Standing(10, 1)


def test_a_settlement_may_push_a_bucket_past_its_capacity_and_the_debt_drains(store: Store, clock: Clock) -> None:
    granted = grant(store, wish("c/1", offer(tokens("tpm", 100, 10))))

    store.settle(settled("c/1", granted, {"tpm": 160}))

    clock.forward(60 * SECOND)
    assert refuse(store, wish("d/1", offer(tokens("tpm", 100, 1)))).standings == ((Standing(100, 0),),)
    clock.forward(SECOND)
    assert grant(store, wish("d/1", offer(tokens("tpm", 100, 1)))).standings == (Standing(99, 1),)


def test_a_clock_that_jumps_back_neither_fills_nor_drains_a_bucket(store: Store, clock: Clock) -> None:
    store.settle(settled("c/1", grant(store, wish("c/1", offer(tokens("tpm", 100, 50))))))
    clock.forward(-HOUR)
    assert grant(store, wish("d/1", offer(tokens("tpm", 100, 1)))).standings == (Standing(50, 1),)

    clock.now = NOON + 10 * SECOND

    assert grant(store, wish("e/1", offer(tokens("tpm", 100, 1)))).standings == (Standing(40, 2),)


def test_a_bucket_of_a_long_period_ticks_in_seconds(store: Store, clock: Clock) -> None:
    week = 7 * 86_400
    store.settle(
        settled("c/1", grant(store, wish("c/1", offer(tokens("roll", 9, 7, rate=7, period=week, tick=SECOND)))))
    )

    clock.forward(DAY + 999)

    granted = grant(store, wish("d/1", offer(tokens("roll", 9, 1, rate=7, period=week, tick=SECOND))))
    assert (granted.standings[0].spent, granted.standings[0].held) == (6, 1)


def test_a_new_rate_drains_what_the_old_one_left(store: Store, clock: Clock) -> None:
    store.settle(settled("c/1", grant(store, wish("c/1", offer(tokens("tpm", 100, 50, rate=60))))))
    clock.forward(10 * SECOND)

    granted = grant(store, wish("d/1", offer(tokens("tpm", 100, 1, rate=120))))

    assert granted.standings[0].spent == 30


@pytest.mark.parametrize("tick", [1, SECOND])
def test_a_bucket_that_a_booking_opened_drains_as_soon_as_a_reserve_says_how(
    store: Store, clock: Clock, tick: int
) -> None:
    demand = tokens("tpm", 100, 1, rate=1, period=SECOND // tick, tick=tick)
    store.settle(booking("c/1", demand, 50, fresh=True))
    clock.forward(20 * SECOND)

    granted = grant(store, wish("d/1", offer(demand)))

    assert granted.standings == (Standing(30, 1),)


# ---------------------------------------------------------------- concurrency


def test_calls_beyond_the_number_are_refused_until_one_closes(store: Store) -> None:
    for call in ("a", "b"):
        grant(store, wish(f"{call}/0", offer(concurrent("now", 2))))
    refused = refuse(store, wish("c/0", offer(concurrent("now", 2))))
    assert (refused.standings, refused.short) == (((Standing(2, 0),),), ((0,),))

    store.close_call("a")

    assert grant(store, wish("c/0", offer(concurrent("now", 2)))).standings == (Standing(2, 0),)


def test_a_place_is_not_money_and_has_no_line(store: Store) -> None:
    granted = grant(store, wish("c/0", offer(concurrent("now", 2), prepaid("pot", 10, 1))))

    assert [line.balance for line in granted.lines] == ["pot"]


def test_a_settlement_does_not_free_the_place_of_its_call(store: Store) -> None:
    store.settle(settled("a/0", grant(store, wish("a/0", offer(concurrent("now", 1))))))

    refuse(store, wish("b/0", offer(concurrent("now", 1))))


def test_a_call_that_is_in_counts_once_and_always_fits(store: Store) -> None:
    grant(store, wish("a/0", offer(concurrent("now", 2))))
    grant(store, wish("b/0", offer(concurrent("now", 2))))

    assert grant(store, wish("a/1", offer(concurrent("now", 2)))).standings == (Standing(2, 0),)
    assert grant(store, wish("b/1", offer(concurrent("now", 1)))).standings == (Standing(2, 0),)


def test_a_call_that_is_in_is_seen_by_its_own_refusal(store: Store) -> None:
    grant(store, wish("a/0", offer(concurrent("now", 2))))

    refused = refuse(store, wish("a/1", offer(concurrent("now", 2), prepaid("pot", 0, 1))))

    assert refused.short == ((1,),)
    assert refused.standings[0][0] == Standing(1, 0)


def test_a_place_whose_lease_ran_out_is_free(store: Store, clock: Clock) -> None:
    grant(store, wish("a/0", offer(concurrent("now", 1))))

    clock.forward(LEASE - 1)
    refuse(store, wish("b/0", offer(concurrent("now", 1))))
    clock.forward(1)

    grant(store, wish("b/0", offer(concurrent("now", 1))))


def test_a_renewed_call_keeps_its_place(store: Store, clock: Clock) -> None:
    grant(store, wish("a/0", offer(concurrent("now", 1))))
    clock.forward(LEASE - 1)
    store.renew([], ["a"], LEASE)

    clock.forward(LEASE - 1)

    refuse(store, wish("b/0", offer(concurrent("now", 1))))


def test_a_close_of_an_unknown_call_is_no_matter(store: Store) -> None:
    store.close_call("nobody")

    assert store.balances("", 10) == ()


# ---------------------------------------------------------------- take-over


def test_a_taker_is_checked_as_if_the_taken_hold_were_gone(store: Store) -> None:
    grant(store, wish("c/0", offer(dollars("day", 100, 90), tokens("tpm", 100, 100))))

    granted = grant(store, wish("c/1", offer(dollars("day", 100, 100), tokens("tpm", 100, 40)), takes="c/0"))

    assert [line.amount for line in granted.lines] == [100, 40]
    assert [standing.held for standing in granted.standings] == [100, 40]
    assert [hold.exchange for hold in store.holds("", 10)] == ["c/1"]
    assert granted.took


def test_a_taken_exchange_ends_without_an_entry(store: Store) -> None:
    grant(store, wish("c/0", offer(dollars("day", 100, 90))))
    taker = grant(store, wish("c/1", offer(dollars("day", 100, 50)), takes="c/0"))

    store.settle(settled("c/1", taker))

    assert [entry.id for entry in journal(store)] == ["c/1/settle"]
    assert account(store, "day") == (50, 0)


def test_the_request_that_was_spent_goes_to_the_taker(store: Store) -> None:
    grant(store, wish("c/0", offer(requests("rpm", 1), dollars("day", 100, 90))))

    taker = grant(store, wish("c/1", offer(dollars("day", 100, 50)), takes="c/0"))
    store.settle(settled("c/1", taker))

    assert {(line.balance, line.spent) for line in taker.lines} == {("day", False), ("rpm", True)}
    assert account(store, "rpm") == (1, 0)
    assert amounts(journal(store)[0]) == {"day": 50, "rpm": 1}


def test_a_take_over_gives_back_what_the_taker_does_not_ask_for(store: Store) -> None:
    grant(store, wish("c/0", offer(dollars("day", 100, 90), prepaid("pot", 10, 4))))
    moved = changes(store, "pot")

    grant(store, wish("c/1", offer(dollars("day", 100, 50)), takes="c/0"))

    assert account(store, "pot") == (0, 0)
    assert changes(store, "pot") > moved


def test_a_refused_taker_leaves_the_hold_for_the_next_attempt(store: Store) -> None:
    grant(store, wish("c/0", offer(dollars("day", 100, 90))))

    refused = refuse(store, wish("c/1", offer(dollars("day", 100, 101)), takes="c/0"))

    assert refused.short == ((0,),)
    assert account(store, "day") == (0, 90)
    grant(store, wish("c/2", offer(dollars("day", 100, 100)), takes="c/0"))


def test_a_taker_that_finds_the_hold_gone_reserves_afresh(store: Store) -> None:
    grant(store, wish("c/0", offer(dollars("day", 100, 60))))
    grant(store, wish("c/1", offer(dollars("day", 100, 60)), takes="c/0"))

    refuse(store, wish("c/2", offer(dollars("day", 100, 41)), takes="c/0"))

    granted = grant(store, wish("c/2", offer(dollars("day", 100, 40)), takes="c/0"))
    assert (granted.standings[0].held, granted.took) == (100, False)


def test_a_take_over_sent_again_takes_over_once(store: Store) -> None:
    grant(store, wish("c/0", offer(requests("rpm", 5), dollars("day", 100, 60))))
    taking = wish("c/1", offer(dollars("day", 100, 50)), takes="c/0")

    first, again = grant(store, taking), grant(store, taking)

    assert again == first
    assert again.took
    assert account(store, "day") == (0, 50)


def test_a_settle_of_a_taken_exchange_moves_nothing(store: Store) -> None:
    taken = grant(store, wish("c/0", offer(dollars("day", 100, 60))))
    grant(store, wish("c/1", offer(dollars("day", 100, 50)), takes="c/0"))

    assert store.settle(settled("c/0", taken)) is Settled.AGAIN

    assert account(store, "day") == (0, 50)
    assert journal(store) == []


def test_a_take_over_in_the_next_window_holds_nothing_back_from_it(store: Store, clock: Clock) -> None:
    grant(store, wish("c/0", offer(dollars("day", 100, 60))))
    clock.now = TOMORROW

    granted = grant(store, wish("c/1", offer(dollars("day", 100, 100)), takes="c/0"))

    assert granted.standings == (Standing(0, 100, 0, TOMORROW, TOMORROW + DAY),)


def test_a_take_over_keeps_the_place_of_its_call(store: Store) -> None:
    grant(store, wish("c/0", offer(concurrent("now", 1), prepaid("pot", 9, 1))))

    grant(store, wish("c/1", offer(prepaid("pot", 9, 2)), takes="c/0"))

    refuse(store, wish("d/0", offer(concurrent("now", 1))))


# ---------------------------------------------------------------- force


def test_a_forced_reserve_is_granted_whatever_the_balances_say(store: Store) -> None:
    grant(store, wish("c/1", offer(dollars("day", 100, 100), requests("rpm", 1), concurrent("now", 1))))

    granted = grant(
        store,
        wish(
            "d/1",
            offer(dollars("day", 100, 30), prepaid("pot", 9, 1), requests("rpm", 1), concurrent("now", 1)),
            force=True,
        ),
    )

    assert (granted.offer, granted.short) == (0, (0, 2, 3))
    assert [line.amount for line in granted.lines] == [30, 1, 1]
    assert account(store, "day") == (0, 130)
    assert granted.standings[3] == Standing(2, 0)


def test_a_forced_reserve_keeps_its_cap_and_names_what_would_have_lowered_it(store: Store) -> None:
    granted = grant(store, wish("c/1", offer(dollars("day", 100, 0, 1), cap=500, at_least=10), force=True))

    assert (granted.cap, granted.short) == (500, (0,))


def test_a_forced_reserve_takes_the_first_offer_even_where_the_second_fits(store: Store) -> None:
    granted = grant(store, wish("c/1", offer(dollars("day", 10, 11)), offer(dollars("day", 10, 1)), force=True))

    assert (granted.offer, granted.lines[0].amount) == (0, 11)


def test_a_forced_reserve_that_fits_is_short_of_nothing(store: Store) -> None:
    assert grant(store, wish("c/1", offer(dollars("day", 10, 10)), force=True)).short == ()


# ---------------------------------------------------------------- settle and release


def test_a_settlement_books_what_was_used_and_gives_back_the_rest(store: Store) -> None:
    granted = grant(store, wish("c/1", offer(dollars("day", 1000, 100), prepaid("pot", 100, 10))))

    assert store.settle(settled("c/1", granted, {"day": 60})) is Settled.DONE

    assert account(store, "day") == (60, 0)
    assert account(store, "pot") == (10, 0)
    assert store.holds("", 10) == ()


def test_a_settlement_may_book_more_than_was_held(store: Store) -> None:
    granted = grant(store, wish("c/1", offer(dollars("day", 100, 100))))

    store.settle(settled("c/1", granted, {"day": 130}))

    assert account(store, "day") == (130, 0)


def test_a_settlement_leaves_the_holds_of_others_alone(store: Store) -> None:
    granted = grant(store, wish("c/1", offer(dollars("day", 1000, 100))))
    grant(store, wish("d/1", offer(dollars("day", 1000, 70))))

    store.settle(settled("c/1", granted))

    assert account(store, "day") == (100, 70)


def test_a_settlement_enters_what_moved_and_why(store: Store, clock: Clock) -> None:
    granted = grant(store, wish("c/3", offer(dollars("day", 1000, 100), requests("rpm", 9), prepaid("pot", 9, 1))))
    clock.forward(5 * SECOND)

    store.settle(settled("c/3", granted, {"day": 60, "pot": 0}))

    (entry,) = journal(store)
    assert (entry.id, entry.kind, entry.at) == ("c/3/settle", EntryKind.SETTLE, NOON + 5 * SECOND)
    assert amounts(entry) == {"day": 60, "rpm": 1}
    assert (entry.event.call_id, entry.event.attempt, entry.event.kind) == ("c", 3, EntryKind.SETTLE)
    assert (entry.event.user, entry.event.cost_nanos) == ("alice", 500)


def test_a_release_gives_all_back_but_the_request(store: Store) -> None:
    granted = grant(store, wish("c/1", offer(dollars("day", 1000, 100), requests("rpm", 9), tokens("tpm", 99, 9))))

    assert store.settle(released("c/1", granted)) is Settled.DONE

    assert (account(store, "day"), account(store, "tpm"), account(store, "rpm")) == ((0, 0), (0, 0), (1, 0))
    (entry,) = journal(store)
    assert (entry.id, entry.kind, entry.event.kind) == ("c/1/release", EntryKind.RELEASE, EntryKind.RELEASE)
    assert amounts(entry) == {"rpm": 1}


def test_a_release_by_somebody_who_never_learnt_the_grant_gives_back_what_is_held(store: Store) -> None:
    grant(store, wish("c/1", offer(dollars("day", 1000, 100), requests("rpm", 9))))
    unknown = settlement("c/1", (), NOON + LEASE, kind=EntryKind.RELEASE)

    assert store.settle(unknown) is Settled.DONE

    assert (account(store, "day"), account(store, "rpm")) == ((0, 0), (1, 0))
    assert amounts(journal(store)[0]) == {"rpm": 1}
    assert store.settle(unknown) is Settled.AGAIN


def test_a_release_by_somebody_who_was_never_granted_anything_moves_nothing(store: Store) -> None:
    assert store.settle(settlement("c/1", (), NOON + LEASE, kind=EntryKind.RELEASE)) is Settled.AGAIN

    assert journal(store) == []


@pytest.mark.parametrize("ending", [settled, released])
@pytest.mark.parametrize("again", [settled, released])
def test_a_second_ending_moves_nothing(store: Store, ending: Ending, again: Ending) -> None:
    granted = grant(store, wish("c/1", offer(dollars("day", 1000, 100))))
    store.settle(ending("c/1", granted))
    before = store.balances("", 10), journal(store)

    assert store.settle(again("c/1", granted)) is Settled.AGAIN

    assert (store.balances("", 10), journal(store)) == before


def test_each_settlement_is_a_change_of_its_balances(store: Store) -> None:
    granted = grant(store, wish("c/1", offer(dollars("day", 1000, 100))))
    reserved = changes(store, "day")

    store.settle(settled("c/1", granted))

    assert 0 < reserved < changes(store, "day")


def test_a_hold_past_its_lease_that_nobody_swept_settles_as_usual(store: Store, clock: Clock) -> None:
    granted = grant(store, wish("c/1", offer(dollars("day", 1000, 100))))
    clock.forward(LEASE + MINUTE)

    assert store.settle(settled("c/1", granted, {"day": 60})) is Settled.DONE

    assert [entry.kind for entry in journal(store)] == [EntryKind.SETTLE]


def test_usage_without_a_hold_is_booked_in_full(store: Store) -> None:
    line = booking("c/2", dollars("day", 0), 70, fresh=True)

    assert store.settle(line) is Settled.DONE

    assert account(store, "day") == (70, 0)
    (entry,) = journal(store)
    assert (entry.id, entry.kind, amounts(entry)) == ("c/2/settle", EntryKind.SETTLE, {"day": 70})


def test_usage_without_a_hold_is_booked_once(store: Store) -> None:
    store.settle(booking("c/2", dollars("day", 0), 70, fresh=True))

    assert store.settle(booking("c/2", dollars("day", 0), 70, fresh=True)) is Settled.AGAIN

    assert account(store, "day") == (70, 0)


def test_usage_without_a_hold_adds_to_what_is_there(store: Store) -> None:
    grant(store, wish("c/1", offer(dollars("day", 1000, 100))))

    store.settle(booking("c/2", dollars("day", 0), 70, fresh=True))

    assert account(store, "day") == (70, 100)


def test_a_booking_opens_the_window_it_speaks_of(store: Store, clock: Clock) -> None:
    grant(store, wish("c/1", offer(dollars("day", 1000, 100)), lease_ms=2 * DAY))
    clock.now = TOMORROW

    store.settle(booking("c/2", dollars("day", 0), 70, at=TOMORROW, fresh=True))

    assert store.peek(["day"])[0].window_start == TOMORROW
    assert account(store, "day") == (70, 0)


def test_a_booking_for_an_older_window_moves_only_the_journal(store: Store, clock: Clock) -> None:
    clock.now = TOMORROW
    grant(store, wish("c/1", offer(dollars("day", 1000, 100))))

    store.settle(booking("c/2", dollars("day", 0), 70, at=NOON, fresh=True))

    assert account(store, "day") == (0, 100)
    assert journal(store)[0].lines[0].window_start == TODAY


def test_a_release_without_a_hold_is_entered_as_one(store: Store) -> None:
    spent = booking("c/2", requests_a_day("rpd", 9), 1, fresh=True)

    assert store.settle(replace(spent, kind=EntryKind.RELEASE)) is Settled.DONE

    assert account(store, "rpd") == (1, 0)
    assert [entry.id for entry in journal(store)] == ["c/2/release"]


def test_a_release_that_never_held_anything_is_entered_as_well(store: Store) -> None:
    nothing = settlement("c/2", (), NOON + LEASE, kind=EntryKind.RELEASE, fresh=True)

    assert store.settle(nothing) is Settled.DONE

    assert [entry.id for entry in journal(store)] == ["c/2/release"]


# ---------------------------------------------------------------- replays of a spool


def replay(exchange: str, position: int, source: str = "spool-1", actual: int = 70) -> Settlement:
    return replace(booking(exchange, dollars("day", 0), actual, fresh=True), replay=Replay(source, position))


def test_a_replay_is_settled_and_marked(store: Store) -> None:
    assert store.replayed("spool-1") == 0

    assert store.settle(replay("c/1", 3)) is Settled.DONE

    assert account(store, "day") == (70, 0)
    assert store.replayed("spool-1") == 3


def test_a_replay_that_comes_again_the_next_day_counts_once(store: Store, clock: Clock) -> None:
    store.settle(replay("c/1", 1))
    store.settle(replay("c/2", 2))
    clock.forward(DAY)
    store.expire()  # no ending is remembered any more

    assert [store.settle(replay("c/1", 1)), store.settle(replay("c/2", 2))] == [Settled.AGAIN, Settled.AGAIN]

    assert [entry.id for entry in journal(store)] == ["c/1/settle", "c/2/settle"]
    assert account(store, "day") == (140, 0)


def test_each_spool_has_a_mark_of_its_own(store: Store) -> None:
    store.settle(replay("c/1", 5))

    assert store.settle(replay("d/1", 1, source="spool-2")) is Settled.DONE

    assert (store.replayed("spool-1"), store.replayed("spool-2")) == (5, 1)
    assert account(store, "day") == (140, 0)


def test_the_mark_moves_past_a_replay_that_changes_nothing(store: Store, clock: Clock) -> None:
    granted = grant(store, wish("c/1", offer(dollars("day", 1000, 100))))
    store.settle(settled("c/1", granted))
    again = replace(settled("c/1", granted), replay=Replay("spool-1", 1))
    late = replace(booking("c/9", dollars("day", 0), 70), replay=Replay("spool-1", 2))

    assert store.settle(again) is Settled.AGAIN
    clock.forward(LEASE + LATE_SETTLE_MS + 1)
    assert store.settle(late) is Settled.TOO_LATE

    assert store.replayed("spool-1") == 2
    assert account(store, "day") == (100, 0)


def test_the_replay_of_a_settlement_ends_its_hold(store: Store) -> None:
    granted = grant(store, wish("c/1", offer(dollars("day", 1000, 100))))

    store.settle(replace(settled("c/1", granted, {"day": 60}), replay=Replay("spool-1", 1)))

    assert account(store, "day") == (60, 0)


def test_the_replay_of_an_abandoned_exchange_corrects_it(store: Store, clock: Clock) -> None:
    granted = grant(store, wish("c/1", offer(dollars("day", 1000, 100))))
    clock.forward(LEASE)
    store.expire()
    late = replace(settled("c/1", granted, {"day": 60}), replay=Replay("spool-1", 1))

    assert [store.settle(late), store.settle(late)] == [Settled.CORRECTED, Settled.AGAIN]

    assert account(store, "day") == (60, 0)
    assert store.replayed("spool-1") == 1


def test_a_spool_that_is_gone_leaves_no_mark(store: Store) -> None:
    store.settle(replay("c/1", 7))

    store.end_replay("spool-1")
    store.end_replay("spool-2")

    assert store.replayed("spool-1") == 0


# ---------------------------------------------------------------- expiry, corrections, orphans


def test_a_hold_whose_lease_ran_out_is_booked_in_full(store: Store, clock: Clock) -> None:
    grant(store, wish("c/1", offer(dollars("day", 1000, 100), requests("rpm", 9, rate=1, period=HOUR))))
    clock.forward(LEASE)

    assert store.expire() == 1

    assert (account(store, "day"), account(store, "rpm")) == ((100, 0), (1, 0))
    assert store.holds("", 10) == ()


def test_a_hold_is_not_booked_before_its_lease_runs_out(store: Store, clock: Clock) -> None:
    grant(store, wish("c/1", offer(dollars("day", 1000, 100))))
    clock.forward(LEASE - 1)

    assert store.expire() == 0

    assert account(store, "day") == (0, 100)


def test_an_abandoned_exchange_is_attributed_by_its_draft(store: Store, clock: Clock) -> None:
    too_dear = offer(dollars("day", 1, 2))
    cheaper = offer(dollars("day", 1000, 100, 1), requests("rpm", 9), cap=2000, at_least=100, decision="degrade")
    grant(store, wish("c/1", too_dear, cheaper))
    clock.forward(LEASE)

    store.expire()

    (entry,) = journal(store)
    assert (entry.id, entry.kind, entry.at) == ("c/1/abandoned", EntryKind.ABANDONED, NOON + LEASE)
    assert amounts(entry) == {"day": 1000, "rpm": 1}
    event = entry.event
    assert (event.call_id, event.user, event.model) == ("c", "alice", "model-degrade")
    assert (event.basis, event.exact, event.degraded) == (Basis.ABANDONED, False, True)
    assert (event.estimated_output_tokens, event.cost_nanos) == (900, 1000 + 7 * 900)
    assert event.at == (NOON + LEASE) * 1000


def test_expiry_takes_the_oldest_first_and_no_more_than_asked(store: Store, clock: Clock) -> None:
    for number, lease_ms in enumerate((30 * SECOND, 10 * SECOND, 20 * SECOND)):
        grant(store, wish(f"c/{number}", offer(prepaid("pot", 10, 1)), lease_ms=lease_ms))
    clock.forward(MINUTE)

    assert store.expire(2) == 2

    assert [entry.id for entry in journal(store)] == ["c/1/abandoned", "c/2/abandoned"]
    assert store.expire(2) == 1
    assert store.expire(2) == 0


def test_a_reserve_that_would_be_refused_sweeps_what_is_due_first(store: Store, clock: Clock) -> None:
    grant(store, wish("c/1", offer(tokens("tpm", 100, 100))))
    clock.forward(LEASE)

    refused = refuse(store, wish("d/1", offer(tokens("tpm", 100, 1))))

    assert [entry.id for entry in journal(store)] == ["c/1/abandoned"]
    assert refused.standings == ((Standing(100, 0),),)


def test_a_renewed_hold_does_not_expire(store: Store, clock: Clock) -> None:
    grant(store, wish("c/1", offer(prepaid("pot", 10, 1))))
    clock.forward(LEASE - 1)

    renewed = store.renew(["c/1"], ["c"], LEASE)

    clock.forward(LEASE - 1)
    assert (renewed.lease_end, renewed.gone) == (NOON + 2 * LEASE - 1, ())
    assert store.expire() == 0
    assert store.holds("", 10)[0].lease_end == renewed.lease_end


def test_a_hold_past_its_lease_that_nobody_swept_can_be_renewed(store: Store, clock: Clock) -> None:
    grant(store, wish("c/1", offer(prepaid("pot", 10, 1))))
    clock.forward(LEASE + MINUTE)

    assert store.renew(["c/1"], [], LEASE).gone == ()

    assert store.expire() == 0


def test_a_renewal_tells_which_holds_are_gone(store: Store) -> None:
    granted = grant(store, wish("c/1", offer(prepaid("pot", 10, 1))))
    grant(store, wish("c/2", offer(prepaid("pot", 10, 1))))
    store.settle(settled("c/1", granted))

    assert store.renew(["c/1", "c/2", "c/9"], [], LEASE).gone == ("c/1", "c/9")


def _abandon(store: Store, clock: Clock, *, fixed: int = 100) -> Granted:
    granted = grant(store, wish("c/1", offer(dollars("day", 1000, fixed), requests_a_day("rpd", 9))))
    clock.forward(LEASE)
    store.expire()
    return granted


@pytest.mark.parametrize("actual", [60, 130, 0])
def test_a_late_settle_corrects_what_was_booked(store: Store, clock: Clock, actual: int) -> None:
    granted = _abandon(store, clock)

    assert store.settle(settled("c/1", granted, {"day": actual})) is Settled.CORRECTED

    assert (account(store, "day"), account(store, "rpd")) == ((actual, 0), (1, 0))
    entry = journal(store)[1]
    assert (entry.id, entry.kind, amounts(entry)) == ("c/1/correction", EntryKind.CORRECTION, {"day": actual - 100})
    assert (entry.event.kind, entry.event.cost_nanos) == (EntryKind.CORRECTION, 500 - 1000)


def test_a_late_release_corrects_what_was_booked(store: Store, clock: Clock) -> None:
    granted = _abandon(store, clock)

    assert store.settle(released("c/1", granted)) is Settled.CORRECTED

    assert (account(store, "day"), account(store, "rpd")) == ((0, 0), (1, 0))
    assert amounts(journal(store)[1]) == {"day": -100}


def test_a_late_settle_that_found_the_hold_right_still_says_so(store: Store, clock: Clock) -> None:
    granted = _abandon(store, clock)

    assert store.settle(settled("c/1", granted)) is Settled.CORRECTED

    assert (journal(store)[1].kind, journal(store)[1].lines) == (EntryKind.CORRECTION, ())


def test_an_exchange_is_corrected_once(store: Store, clock: Clock) -> None:
    granted = _abandon(store, clock)
    store.settle(settled("c/1", granted, {"day": 60}))

    assert store.settle(settled("c/1", granted, {"day": 60})) is Settled.AGAIN

    assert account(store, "day") == (60, 0)
    assert len(journal(store)) == 2


def test_a_correction_stops_at_zero(store: Store, clock: Clock) -> None:
    granted = grant(store, wish("c/1", offer(tokens("tpm", 100, 50))))
    clock.forward(LEASE)
    store.expire()
    clock.forward(20 * SECOND)

    store.settle(settled("c/1", granted, {"tpm": 0}))

    assert account(store, "tpm") == (0, 0)
    assert amounts(journal(store)[1]) == {"tpm": -50}


def test_a_correction_for_an_older_window_moves_only_the_journal(store: Store, clock: Clock) -> None:
    clock.now = TOMORROW - LEASE
    granted = _abandon(store, clock)
    grant(store, wish("d/1", offer(dollars("day", 1000, 10))))

    store.settle(settled("c/1", granted, {"day": 60}))

    assert account(store, "day") == (0, 10)
    assert [(line.window_start, line.amount) for line in journal(store)[1].lines] == [(TODAY, -40)]


def test_the_last_moment_for_a_late_settle_is_an_hour_past_its_lease(store: Store, clock: Clock) -> None:
    granted = _abandon(store, clock)
    clock.now = granted.lease_end + LATE_SETTLE_MS
    store.expire()

    assert store.settle(settled("c/1", granted, {"day": 60})) is Settled.CORRECTED


def test_a_settle_after_that_moves_nothing(store: Store, clock: Clock) -> None:
    granted = _abandon(store, clock)
    clock.now = granted.lease_end + LATE_SETTLE_MS + 1

    assert store.settle(settled("c/1", granted, {"day": 60})) is Settled.TOO_LATE

    assert account(store, "day") == (100, 0)
    assert len(journal(store)) == 1


def test_a_settle_long_after_the_tombstone_is_gone_moves_nothing(store: Store, clock: Clock) -> None:
    granted = _abandon(store, clock)
    clock.forward(ABANDONED_TOMBSTONE_MS + HOUR)
    store.expire()

    assert store.settle(settled("c/1", granted, {"day": 60})) is Settled.TOO_LATE

    assert account(store, "day") == (100, 0)


def test_a_settle_that_finds_neither_hold_nor_tombstone_is_booked_in_full(store: Store) -> None:
    assert store.settle(booking("c/1", dollars("day", 0), 70)) is Settled.ORPHAN

    assert account(store, "day") == (70, 0)
    (entry,) = journal(store)
    assert (entry.id, entry.kind, entry.event.kind) == ("c/1/orphan", EntryKind.ORPHAN, EntryKind.ORPHAN)
    assert amounts(entry) == {"day": 70}


def test_an_orphan_is_booked_once(store: Store) -> None:
    orphan = booking("c/1", dollars("day", 0), 70)
    store.settle(orphan)

    assert store.settle(orphan) is Settled.AGAIN

    assert account(store, "day") == (70, 0)


def test_an_orphan_is_booked_up_to_an_hour_past_its_lease(store: Store, clock: Clock) -> None:
    clock.forward(LEASE + LATE_SETTLE_MS)
    assert store.settle(booking("c/1", dollars("day", 0), 70)) is Settled.ORPHAN

    clock.forward(1)
    assert store.settle(booking("c/2", dollars("day", 0), 70)) is Settled.TOO_LATE

    assert account(store, "day") == (70, 0)
    assert len(journal(store)) == 1


def test_usage_without_a_hold_is_never_too_late(store: Store, clock: Clock) -> None:
    clock.forward(LEASE + LATE_SETTLE_MS + 1)

    assert store.settle(booking("c/1", prepaid("pot", 0), 70, fresh=True)) is Settled.DONE


@pytest.mark.parametrize("ending", [settled, released])
def test_an_ending_is_remembered_for_its_time(store: Store, clock: Clock, ending: Ending) -> None:
    granted = grant(store, wish("c/1", offer(dollars("day", 1000, 100)), lease_ms=HOUR))
    store.settle(ending("c/1", granted))
    before = account(store, "day")
    clock.forward(TOMBSTONE_MS)
    store.expire()

    assert store.settle(ending("c/1", granted)) is Settled.AGAIN

    assert account(store, "day") == before


def test_expiry_forgets_endings_that_had_their_time(store: Store, clock: Clock) -> None:
    wished = wish("c/1", offer(prepaid("pot", 10, 1)))
    store.settle(released("c/1", grant(store, wished)))
    clock.forward(TOMBSTONE_MS + 1)

    store.expire()

    grant(store, wished)


# ---------------------------------------------------------------- scope values


def test_new_values_are_admitted_up_to_the_days_number(store: Store) -> None:
    assert [store.admit("acme", "tag:team", value, 1, 2) for value in ("a", "b", "c")] == [True, True, False]


def test_a_known_value_is_admitted_for_good(store: Store) -> None:
    store.admit("acme", "tag:team", "a", 1, 1)

    assert store.admit("acme", "tag:team", "a", 1, 1)
    assert store.admit("acme", "tag:team", "a", 400, 0)


def test_values_are_counted_by_parent_scope_and_day(store: Store) -> None:
    store.admit("acme", "tag:team", "a", 1, 1)

    assert store.admit("other", "tag:team", "b", 1, 1)
    assert store.admit("acme", "workflow", "b", 1, 1)
    assert store.admit("acme", "tag:team", "b", 2, 1)
    assert not store.admit("acme", "tag:team", "c", 2, 1)


def test_a_known_value_does_not_count_as_new(store: Store) -> None:
    store.admit("acme", "tag:team", "a", 1, 2)
    store.admit("acme", "tag:team", "a", 2, 2)

    assert [store.admit("acme", "tag:team", value, 2, 2) for value in ("b", "c", "d")] == [True, True, False]


def test_a_value_that_was_turned_away_may_come_another_day(store: Store) -> None:
    store.admit("acme", "tag:team", "a", 1, 1)
    assert not store.admit("acme", "tag:team", "b", 1, 1)

    assert store.admit("acme", "tag:team", "b", 2, 1)


# ---------------------------------------------------------------- the journal


def _refusal(store: Store, number: int) -> None:
    store.append(f"c{number}/1/refused", encode_event(event_of(f"c{number}/1")))


def test_a_refusal_is_entered_without_lines(store: Store) -> None:
    _refusal(store, 1)

    (entry,) = journal(store)
    assert (entry.id, entry.kind, entry.at, entry.lines) == ("c1/1/refused", EntryKind.REFUSED, NOON, ())
    assert (entry.event.kind, entry.event.call_id) == (EntryKind.REFUSED, "c1")


def test_a_refusal_is_entered_once(store: Store) -> None:
    _refusal(store, 1)
    _refusal(store, 1)
    _refusal(store, 2)

    assert [entry.id for entry in journal(store)] == ["c1/1/refused", "c2/1/refused"]
    assert store.journal_length() == 2


def test_the_journal_is_read_in_pages_and_in_order(store: Store) -> None:
    for number in range(5):
        _refusal(store, number)

    first = journal(store, "", 2)
    second = journal(store, first[-1].position, 2)
    third = journal(store, second[-1].position, 2)

    assert [entry.event.call_id for page in (first, second, third) for entry in page] == ["c0", "c1", "c2", "c3", "c4"]
    assert journal(store, third[-1].position) == []


def _take(store: Store, consumer: str, count: int, idle_ms: int = HOUR) -> list[str]:
    """The positions of what somebody is given."""
    return [entry.position for entry in store.take_journal(consumer, count, idle_ms)]


def _refusals(store: Store, count: int) -> list[str]:
    """So many entries; their positions."""
    for number in range(count):
        _refusal(store, number)
    return [entry.position for entry in journal(store)]


def test_what_one_has_in_hand_nobody_else_is_given(store: Store) -> None:
    positions = _refusals(store, 5)

    assert _take(store, "a", 2) == positions[:2]
    assert _take(store, "b", 2) == positions[2:4]
    assert _take(store, "c", 2) == positions[4:]
    assert _take(store, "d", 2) == []


def test_what_one_has_in_hand_he_is_given_again_before_anything_new(store: Store) -> None:
    positions = _refusals(store, 4)
    _take(store, "a", 2)

    assert _take(store, "a", 4) == positions[:2]
    assert _take(store, "a", 1) == positions[:1]


def test_what_is_taken_is_what_the_journal_says(store: Store) -> None:
    grant(store, wish("c/1", offer(prepaid("pot", 10, 4))))
    _refusal(store, 1)

    assert tuple(store.take_journal("a", 10)) == tuple(store.read_journal("", 10))


def test_to_take_entries_is_not_to_remove_them(store: Store) -> None:
    positions = _refusals(store, 3)

    _take(store, "a", 2)

    assert [entry.position for entry in journal(store)] == positions
    assert store.journal_length() == 3


def test_what_was_dropped_is_gone_and_the_rest_keeps_its_position(store: Store) -> None:
    positions = _refusals(store, 4)
    _take(store, "a", 2)

    store.drop_journal(positions[:2])

    assert [entry.position for entry in journal(store)] == positions[2:]
    assert store.journal_length() == 2
    assert _take(store, "a", 9) == positions[2:]


def test_a_later_batch_may_be_dropped_before_an_earlier_one(store: Store) -> None:
    positions = _refusals(store, 5)
    _take(store, "a", 2)
    _take(store, "b", 2)

    store.drop_journal(positions[2:4])

    assert [entry.position for entry in journal(store)] == [*positions[:2], positions[4]]
    assert store.journal_length() == 3
    assert (_take(store, "a", 9), _take(store, "b", 9)) == (positions[:2], positions[4:])


def test_a_part_of_a_batch_may_be_dropped(store: Store) -> None:
    positions = _refusals(store, 3)
    _take(store, "a", 3)

    store.drop_journal(positions[1:2])

    assert _take(store, "a", 9) == [positions[0], positions[2]]
    assert store.journal_length() == 2


def test_what_is_dropped_twice_takes_nothing_else_along(store: Store) -> None:
    positions = _refusals(store, 3)
    _take(store, "a", 2)

    store.drop_journal(positions[:2])
    store.drop_journal(positions[:2])
    store.drop_journal([])

    assert [entry.position for entry in journal(store)] == positions[2:]


def test_what_somebody_left_alone_is_given_to_another_one(store: Store) -> None:
    positions = _refusals(store, 3)
    _take(store, "dead", 2)

    assert _take(store, "a", 9, idle_ms=HOUR) == positions[2:]
    store.drop_journal(positions[2:])
    assert _take(store, "a", 9, idle_ms=0) == positions[:2]
    assert _take(store, "b", 9, idle_ms=HOUR) == []


def test_one_who_was_only_slow_may_drop_what_another_one_has_in_hand_by_now(store: Store) -> None:
    positions = _refusals(store, 3)
    _take(store, "slow", 2)
    _take(store, "a", 9, idle_ms=0)

    store.drop_journal(positions[:2])

    assert _take(store, "a", 9) == positions[2:]
    assert store.journal_length() == 1


def test_a_dropped_journal_goes_on_behind_what_it_was(store: Store) -> None:
    positions = _refusals(store, 3)
    _take(store, "a", 9)
    store.drop_journal(positions)
    assert store.journal_length() == 0

    _refusal(store, 9)

    assert [entry.event.call_id for entry in journal(store, positions[-1])] == ["c9"]
    store.drop_journal(positions)
    assert store.journal_length() == 1
    assert len(_take(store, "a", 9)) == 1


def test_many_who_take_at_the_same_time_are_given_each_entry_once(shared_store: Store) -> None:
    positions = _refusals(shared_store, 60)

    def work(consumer: str) -> list[str]:
        mine: list[str] = []
        while taken := _take(shared_store, consumer, 3):
            mine += taken
            shared_store.drop_journal(taken)
        return mine

    with ThreadPoolExecutor(4) as pool:
        shares = list(pool.map(work, "abcd"))

    assert sorted(position for share in shares for position in share) == positions
    assert shared_store.journal_length() == 0


def test_a_worker_says_for_how_long_it_is_at_the_journal(store: Store, clock: Clock) -> None:
    assert not store.attended()

    store.attend(10 * SECOND)
    assert store.attended()
    clock.forward(10 * SECOND)
    assert not store.attended()

    store.attend(10 * SECOND)
    store.attend(0)
    assert not store.attended()


def test_an_entry_that_cannot_be_read_is_handed_out_with_what_it_moved(store: Store) -> None:
    granted = grant(store, wish("c/1", offer(prepaid("pot", 10, 4))))
    store.settle(replace(settled("c/1", granted), payload=b'{"event":'))
    _refusal(store, 2)

    damaged, sound = store.read_journal("", 10)

    assert isinstance(damaged, Unreadable)
    assert (damaged.id, damaged.kind, damaged.at, damaged.payload) == (
        "c/1/settle",
        EntryKind.SETTLE,
        NOON,
        b'{"event":',
    )
    assert [line.amount for line in damaged.lines] == [4]
    assert damaged.error
    assert damaged.position < sound.position
    assert isinstance(sound, JournalEntry)


def test_an_empty_journal_has_nothing_to_take(store: Store) -> None:
    assert (_take(store, "a", 10), _take(store, "a", 10, idle_ms=0)) == ([], [])
    assert (store.journal_length(), store.read_journal("", 10)) == (0, ())


# ---------------------------------------------------------------- reading


def test_a_peek_answers_what_is_known(store: Store) -> None:
    grant(store, wish("c/1", offer(dollars("day", 1000, 100), tokens("tpm", 100, 7))))

    states = store.peek(["tpm", "nothing", "day"])

    assert {(s.balance, s.kind.value, s.window_start, s.spent, s.held) for s in states} == {
        ("day", "calendar", TODAY, 0, 100),
        ("tpm", "bucket", 0, 0, 7),
    }


def test_balances_are_paged_by_name(store: Store) -> None:
    grant(store, wish("c/1", offer(*(prepaid(name, 10, 1) for name in ("c", "a", "e", "b", "d")))))

    first = store.balances("", 3)
    second = store.balances(first[-1].balance, 3)

    assert [state.balance for state in (*first, *second)] == ["a", "b", "c", "d", "e"]


def test_holds_are_paged_by_exchange(store: Store) -> None:
    for exchange in ("c/2", "a/1", "b/1"):
        grant(store, wish(exchange, offer(prepaid("pot", 10, 1))))

    first = store.holds("", 2)
    second = store.holds(first[-1].exchange, 2)

    assert [(hold.exchange, hold.call) for hold in (*first, *second)] == [("a/1", "a"), ("b/1", "b"), ("c/2", "c")]


def test_a_name_may_hold_anything(store: Store) -> None:
    name = "tenant=*none&user=%C3%A9'\"\\;--|calendar:usd:day::UTC:all"
    line = Line(name, dollars("x", 1).kind, dollars("x", 1).unit, TODAY, 5)

    granted = grant(store, wish("cé'/1", offer(dollars(name, 10, 5))))

    assert granted.lines == (line,)
    assert store.holds("", 1)[0].lines == (line,)


def test_the_largest_exact_integers_stay_exact(store: Store) -> None:
    most = 2**53 - 1

    granted = grant(store, wish("c/1", offer(dollars("day", most, most - 1))))
    store.settle(settled("c/1", granted))

    assert account(store, "day") == (most - 1, 0)
    assert grant(store, wish("d/1", offer(dollars("day", most, 1)))).lines[0].amount == 1


def test_the_clock_is_the_stores_own(store: Store, clock: Clock) -> None:
    clock.forward(123)

    assert store.now() == NOON + 123


def test_the_epoch_stays_while_the_contents_do(store: Store) -> None:
    epoch = store.epoch()
    grant(store, wish("c/1", offer(prepaid("pot", 10, 1))))

    assert epoch == store.epoch() != ""


# ---------------------------------------------------------------- what may be forgotten


def test_windows_long_over_and_buckets_long_empty_are_forgotten(store: Store, clock: Clock) -> None:
    store.settle(settled("c/1", grant(store, wish("c/1", offer(dollars("day", 100, 50), tokens("tpm", 100, 50))))))
    clock.forward(60 * DAY)

    assert store.forget() == 2

    assert store.balances("", 10) == ()


def test_what_still_says_something_is_not_forgotten(store: Store, clock: Clock) -> None:
    demands = dollars("day", 100, 50), prepaid("pot", 100, 50), tokens("slow", 100, 50, rate=1, period=DAY)
    store.settle(settled("c/1", grant(store, wish("c/1", offer(*demands)))))
    grant(store, wish("d/1", offer(tokens("held", 100, 50)), lease_ms=400 * DAY))
    assert store.forget() == 0

    clock.forward(30 * DAY)
    store.forget()

    assert {state.balance for state in store.balances("", 10)} >= {"held", "pot", "slow"}


def test_a_balance_ahead_of_a_clock_that_jumped_back_is_not_forgotten(store: Store, clock: Clock) -> None:
    clock.now = NOON + 5 * DAY
    grant(store, wish("c/1", offer(requests_a_day("rpd", 9, windows=days(clock.now)))))
    clock.now = NOON
    grant(store, wish("d/1", offer(requests_a_day("rpd", 9))))
    clock.now = NOON + 3 * DAY

    store.forget()

    assert account(store, "rpd") == (2, 0)


def test_forgetting_takes_no_more_than_asked(store: Store, clock: Clock) -> None:
    granted = grant(store, wish("c/1", offer(*(tokens(name, 100, 50) for name in "abc"))))
    store.settle(settled("c/1", granted))
    clock.forward(60 * DAY)

    assert [store.forget(2), store.forget(2), store.forget(2)] == [2, 1, 0]


def test_a_settlement_on_a_forgotten_balance_still_enters_the_journal(store: Store, clock: Clock) -> None:
    granted = grant(store, wish("c/1", offer(dollars("day", 100, 50)), lease_ms=100 * DAY))
    clock.now = TOMORROW
    store.settle(settled("d/1", grant(store, wish("d/1", offer(dollars("day", 100, 1))))))
    clock.forward(60 * DAY)
    store.forget()

    assert store.settle(settled("c/1", granted)) is Settled.DONE

    assert amounts(journal(store)[1]) == {"day": 50}
    assert account(store, "day") == (0, 0)


# ---------------------------------------------------------------- many at once


def test_callers_at_the_same_moment_share_one_budget(shared_store: Store) -> None:
    def one(number: int) -> bool:
        return isinstance(shared_store.reserve(wish(f"c{number}/1", offer(dollars("day", 1000, 10)))), Granted)

    with ThreadPoolExecutor(16) as pool:
        granted = sum(pool.map(one, range(300)))

    assert granted == 100
    assert account(shared_store, "day") == (0, 1000)


def test_one_wish_sent_by_many_is_granted_once(shared_store: Store) -> None:
    wished = wish("c/1", offer(dollars("day", 1000, 10)))

    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(lambda _: shared_store.reserve(wished), range(50)))

    assert {outcome.lines for outcome in outcomes if isinstance(outcome, Granted)} == {
        (Line("day", dollars("x", 1).kind, dollars("x", 1).unit, TODAY, 10),)
    }
    assert account(shared_store, "day") == (0, 10)
