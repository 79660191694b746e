"""`events` and `report`: what the books answer, the same on both databases."""

from __future__ import annotations

from decimal import Decimal

import pytest

from llm_guard_mw.ledger.rows import DIMENSIONS
from llm_guard_mw.model import UsageEvent
from tests.ledger.bench import Bench, released_one
from tests.model.world import DAY, HOUR, NOON

# ---------------------------------------------------------------- events


def test_an_event_has_exactly_the_names_of_a_usage_event(bench: Bench) -> None:
    bench.exchange("c1/0", tags={"team": "blue"})
    bench.drain()

    (found,) = bench.ledger.events()

    assert list(found) == list(UsageEvent.__struct_fields__)
    assert found["tags"] == {"team": "blue"}
    assert (found["exact"], found["degraded"], found["success"]) == (False, False, None)


def test_the_time_of_an_event_is_rfc_3339_with_microseconds(bench: Bench) -> None:
    bench.exchange(at=NOON * 1000 + 7)
    bench.drain()

    assert [found["at"] for found in bench.ledger.events()] == ["2025-10-09T12:00:00.000007Z"]


def test_events_come_by_time_and_page_by_page(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_guard_mw.ledger.queries.PAGE", 3)
    times = [NOON * 1000 + offset for offset in (5, 1, 4, 1, 3, 2, 2)]
    for at in times:
        bench.exchange(at=at)
    bench.drain()

    found = [(one["at"][-4:-1], one["call_id"]) for one in bench.ledger.events()]

    assert found == [
        ("001", "call0001"),
        ("001", "call0003"),
        ("002", "call0005"),
        ("002", "call0006"),
        ("003", "call0004"),
        ("004", "call0002"),
        ("005", "call0000"),
    ]


def test_rows_that_come_in_while_events_are_read_are_left_to_the_next_reader(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_guard_mw.ledger.queries.PAGE", 1)
    bench.exchange(at=NOON * 1000)
    bench.exchange(at=NOON * 1000 + 1)
    bench.drain()

    reader = bench.ledger.events()
    next(reader)
    bench.exchange(at=NOON * 1000 + 2)
    bench.drain()

    assert len(list(reader)) == 1


@pytest.mark.parametrize(
    ("since", "until", "expected"),
    [
        ("2025-10-09", None, ["b", "c"]),
        ("2025-10-09T13:00:00Z", None, ["c"]),
        ("2025-10-09T15:00:00+02:00", None, ["c"]),
        (None, "2025-10-09", ["a"]),
        ("2025-10-08T12:00:00", "2025-10-09T12:00:00.000001Z", ["a", "b"]),
    ],
)
def test_since_and_until_bound_the_events(
    bench: Bench, since: str | None, until: str | None, expected: list[str]
) -> None:
    for exchange, at in (("a/0", NOON - DAY), ("b/0", NOON), ("c/0", NOON + HOUR)):
        bench.exchange(exchange, at=at * 1000)
    bench.drain()

    assert [found["call_id"] for found in bench.ledger.events(since, until)] == expected


def test_a_moment_can_be_so_long_ago(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_guard_mw.ledger.books._now", lambda: (NOON + HOUR) * 1000)
    bench.exchange("a/0", at=(NOON - DAY) * 1000)
    bench.exchange("b/0", at=NOON * 1000)
    bench.drain()

    assert [found["call_id"] for found in bench.ledger.events("24h")] == ["b"]
    assert [found["call_id"] for found in bench.ledger.events("2d")] == ["a", "b"]


@pytest.mark.parametrize("written", ["yesterday", "7 moons", "2025-13-01", "", "99999-01-01"])
def test_a_moment_that_is_none_is_named(bench: Bench, written: str) -> None:
    with pytest.raises(ValueError, match="is no moment: write a date"):
        bench.ledger.events(written)


# ---------------------------------------------------------------- report


def test_a_report_has_the_dimensions_then_calls_tokens_and_cost(bench: Bench) -> None:
    bench.exchange("a/0", feature="chat", cost_nanos=1_500_000_001)
    bench.drain()

    (group,) = bench.ledger.report(["feature", "model"])

    assert list(group.items()) == [
        ("feature", "chat"),
        ("model", "gpt-4o"),
        ("calls", 1),
        ("input_tokens", 10),
        ("output_tokens", 5),
        ("cost_nanos", 1_500_000_001),
        ("cost_usd", Decimal("1.500000001")),
    ]


def test_a_report_names_the_dearest_group_first(bench: Bench) -> None:
    for feature, cost in (("cheap", 1), ("dear", 100), ("middling", 50)):
        bench.exchange(feature=feature, cost_nanos=cost)
    bench.drain()

    assert [group["feature"] for group in bench.ledger.report(["feature"])] == ["dear", "middling", "cheap"]


def test_a_call_of_many_exchanges_is_one_call(bench: Bench) -> None:
    for exchange in ("a/0", "a/1", "a/2", "b/0"):
        bench.exchange(exchange)
    bench.drain()

    (group,) = bench.ledger.report(["feature"])

    assert (group["calls"], group["input_tokens"]) == (2, 40)


def test_refused_and_released_exchanges_are_no_calls(bench: Bench) -> None:
    bench.refuse("r1", feature="refused only", count=9)
    released_one(bench, "x/0")
    bench.exchange("a/0")
    bench.drain()

    (group,) = bench.ledger.report(["feature"])

    assert (group["feature"], group["calls"], group["cost_nanos"]) == ("chat", 1, 700)


def test_a_tag_is_a_dimension_whatever_its_name(bench: Bench) -> None:
    odd = """it's an "odd" $.name\\ [0] ü"""
    bench.exchange(tags={"team": "blue", odd: "1"}, cost_nanos=3)
    bench.exchange(tags={"team": "red"}, cost_nanos=2)
    bench.exchange(tags={}, cost_nanos=1)
    bench.drain()

    by_team = [(group["tag:team"], group["cost_nanos"]) for group in bench.ledger.report(["tag:team"])]
    by_odd = [(group[f"tag:{odd}"], group["cost_nanos"]) for group in bench.ledger.report([f"tag:{odd}"])]

    assert by_team == [("blue", 3), ("red", 2), (None, 1)]
    assert sorted(by_odd, key=str) == [("1", 3), (None, 3)]


def test_every_dimension_can_be_reported_together_with_tags_and_days(bench: Bench) -> None:
    bench.exchange(tags={"team": "blue", "app": "x"})
    bench.drain()

    (group,) = bench.ledger.report([*DIMENSIONS, "day", "tag:team", "tag:app"])

    assert (group["user"], group["day"], group["tag:app"], group["variant"]) == ("alice", "2025-10-09", "x", None)


def test_without_dimensions_all_is_one_group(bench: Bench) -> None:
    assert bench.ledger.report([]) == []

    bench.exchange("a/0")
    bench.exchange("b/0")
    bench.drain()

    assert [group["calls"] for group in bench.ledger.report([])] == [2]


def test_an_unknown_dimension_is_named_with_those_there_are(bench: Bench) -> None:
    with pytest.raises(ValueError, match=r"cannot report by 'colour': known are tenant, user, .* and tag:NAME"):
        bench.ledger.report(["feature", "colour"])


def test_a_cost_that_nobody_knows_is_not_zero(bench: Bench) -> None:
    bench.exchange(model="secret", cost_nanos=None)
    bench.exchange(model="partly", cost_nanos=None)
    bench.exchange(model="partly", cost_nanos=5)
    bench.drain()

    groups = {group["model"]: (group["cost_nanos"], group["cost_usd"]) for group in bench.ledger.report(["model"])}

    assert groups == {"secret": (None, None), "partly": (5, Decimal("5e-9"))}


def test_sums_pass_what_a_double_can_hold(bench: Bench) -> None:
    bench.exchange(cost_nanos=2)
    bench.exchange(cost_nanos=2**53 - 1)
    bench.drain()

    (group,) = bench.ledger.report(["feature"])

    assert group["cost_nanos"] == 2**53 + 1
    assert type(group["cost_nanos"]) is int


def test_a_report_of_pruned_days_comes_from_the_rollups(bench: Bench) -> None:
    for day, exchange in ((20, "a/0"), (20, "a/1"), (20, "b/0"), (5, "c/0"), (0, "d/0")):
        bench.exchange(exchange, at=(NOON - day * DAY) * 1000, tags={"team": "blue"})
    bench.refuse("r1", at=(NOON - 20 * DAY) * 1000, feature="refused only")
    bench.drain()
    before = bench.ledger.report(["tag:team", "day"])

    bench.ledger.prune(NOON, days=7)

    assert len(bench.rows("usage_events")) == 2
    assert bench.ledger.report(["tag:team", "day"]) == before
    assert [group["calls"] for group in bench.ledger.report(["feature"])] == [4]
    assert [group["calls"] for group in bench.ledger.report(["feature"], "2025-09-19", "2025-09-20")] == [2]
    assert bench.ledger.report(["feature"], "2025-09-20", "2025-10-04") == []
    assert [group["calls"] for group in bench.ledger.report(["feature"], "2025-10-04")] == [2]


def test_a_pruned_day_that_is_asked_for_in_part_is_left_out(bench: Bench) -> None:
    bench.exchange("a/0", at=(NOON - 20 * DAY) * 1000)
    bench.drain()
    bench.ledger.prune(NOON, days=7)

    assert bench.ledger.report(["feature"], since="2025-09-19T01:00:00Z") == []
