"""The drain turns journal entries into rows, rollups and totals, once each."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from llm_guard_mw.ledger import Ledger
from llm_guard_mw.ledger.drain import LEASE_MS, lease
from llm_guard_mw.ledger.rows import EVENT_FIELDS
from llm_guard_mw.model import Basis, UsageEvent
from llm_guard_mw.stores.sqlite import SQLiteStore
from tests.ledger.bench import DAY_BUDGET, DAY_REQUESTS, Bench, event, released_one
from tests.model.world import DAY, LEASE, NOON, Clock, day_start


def test_a_settled_exchange_becomes_a_row_with_all_of_its_event(bench: Bench) -> None:
    facts = UsageEvent(
        "c1",
        0,
        event("c1/0").kind,
        NOON * 1000 + 123_456,
        request_id="r1",
        tenant="acme",
        user="alice",
        tags={"team": "blue", 'odd "name"': "ü"},
        cost_nanos=123_456_789_012_345,
        price_version="prices-1",
        basis=Basis.EXACT,
        exact=True,
        success=True,
        status=200,
        decision="allow",
    )
    exchange, granted = bench.hold("c1/0")
    bench.settle(exchange, granted, facts)

    assert bench.drain() == 1

    (row,) = bench.rows("usage_events")
    assert {name: row[name] for name in EVENT_FIELDS} == {name: getattr(facts, name) for name in EVENT_FIELDS}
    assert [line[0] for line in row["lines"]] == [line.balance for line in granted.lines]
    assert row["day"] == "2025-10-09"


def test_the_journal_is_trimmed_once_the_rows_are_in(bench: Bench) -> None:
    for _ in range(7):
        bench.exchange()

    assert bench.ledger.drain(bench.store, most=5) == 5

    assert bench.store.journal_length() == 2
    assert bench.ledger.drain(bench.store, most=5) == 2
    assert bench.ledger.drain(bench.store, most=5) == 0


def test_window_totals_get_the_lines_of_calendar_balances_and_no_buckets(bench: Bench) -> None:
    bench.exchange(cost_nanos=700)
    bench.exchange(cost_nanos=300)

    bench.drain()

    totals = {row["balance"]: (row["window_start"], row["spent"], row["unit"]) for row in bench.rows("window_totals")}
    today = day_start(NOON)
    assert totals == {DAY_BUDGET: (today, 1000, "usd"), DAY_REQUESTS: (today, 2, "requests")}


def test_a_day_of_usage_counts_calls_exchanges_and_refusals(bench: Bench) -> None:
    bench.exchange("c1/0", tags={"team": "blue"})
    bench.exchange("c1/1", tags={"team": "blue"})
    bench.exchange("c2/0", tags={"team": "blue"}, input_tokens=None)
    bench.refuse("c3", tags={"team": "blue"}, count=4)

    bench.drain(most=1)

    (group,) = bench.rows("daily_usage")
    assert (group["calls"], group["exchanges"], group["refused"]) == (2, 3, 4)
    assert (group["input_tokens"], group["output_tokens"], group["cost_nanos"]) == (20, 15, 2100)
    assert (group["reasoning_tokens"], group["credits"]) == (None, None)


def test_an_abandoned_exchange_and_its_correction_add_up_to_the_truth(bench: Bench) -> None:
    exchange, granted = bench.hold("c1/0")
    bench.clock.forward(LEASE + 1)
    bench.store.expire()
    bench.settle(exchange, granted, event(exchange, cost_nanos=700))

    bench.drain()

    kinds = {row["kind"]: row["cost_nanos"] for row in bench.rows("usage_events")}
    assert kinds == {"abandoned": 1000, "correction": -300}
    totals = {row["balance"]: row["spent"] for row in bench.rows("window_totals")}
    assert totals[DAY_BUDGET] == 700


def test_a_released_exchange_has_a_row_and_no_rollup(bench: Bench) -> None:
    released_one(bench, "c1/0")

    bench.drain()

    assert [row["kind"] for row in bench.rows("usage_events")] == ["release"]
    assert bench.rows("daily_usage") == []


def test_a_drain_that_died_before_the_trim_changes_nothing_when_repeated(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        bench.exchange()

    def killed(self: SQLiteStore, upto: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SQLiteStore, "trim_journal", killed)
        with pytest.raises(KeyboardInterrupt):
            bench.drain()
    before = {table: bench.rows(table) for table in ("usage_events", "daily_usage", "window_totals")}
    assert bench.store.journal_length() == 3

    bench.exchange()
    bench.drain()

    after = {table: bench.rows(table) for table in ("usage_events", "daily_usage", "window_totals")}
    assert len(before["usage_events"]) == 3
    assert len(after["usage_events"]) == 4
    assert after["daily_usage"][0]["calls"] == 4
    assert {row["balance"]: row["spent"] for row in after["window_totals"]}[DAY_BUDGET] == 2800


def test_only_one_drains_at_a_time(bench: Bench) -> None:
    bench.exchange()
    other = Ledger(bench.ledger.url)

    with lease(other.database, bench.store.epoch()) as held:
        assert held is not None
        assert bench.ledger.drain(bench.store) is None
    assert bench.ledger.drain(bench.store) == 1
    other.close()


def test_the_lease_of_a_dead_drainer_runs_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.exchange()
    dead = lease(bench.ledger.database, bench.store.epoch())
    assert dead.__enter__() is not None
    import llm_guard_mw.ledger.drain as module

    later = module._now() + LEASE_MS
    monkeypatch.setattr(module, "_now", lambda: later)

    assert bench.ledger.drain(bench.store) == 1
    dead.__exit__(None, None, None)


def test_who_lost_the_lease_writes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.exchange()
    read = bench.store.read_journal

    def slowly(after: str, count: int) -> object:
        entries = read(after, count)
        with bench.ledger.database.writing() as connection:
            connection.exec_driver_sql("UPDATE drain_watermarks SET holder = 'another'")
        return entries

    monkeypatch.setattr(bench.store, "read_journal", slowly)

    assert bench.ledger.drain(bench.store) is None

    assert bench.rows("usage_events") == []
    assert bench.store.journal_length() == 1


def test_a_store_made_anew_gets_a_watermark_of_its_own_and_a_warning(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench.exchange("c1/0")
    bench.drain()
    again = SQLiteStore(tmp_path / "anew.db", clock=bench.clock)
    anew = Bench(bench.clock, again, bench.ledger)
    anew.exchange("c2/0")

    anew.drain()

    assert len(bench.rows("usage_events")) == 2
    assert len(bench.rows("drain_watermarks")) == 2
    assert [json.loads(line)["event"] for line in caplog.messages] == ["ledger_new_epoch"]
    again.close()


def test_text_that_postgres_would_not_take_is_replaced(bench: Bench) -> None:
    bench.exchange(user="al\0ice", tags={"te\0am": "\0"})

    bench.drain()

    (row,) = bench.rows("usage_events")
    assert row["user"] == "al\ufffdice"
    assert row["tags"] == {"te\ufffdam": "\ufffd"}


def test_an_entry_that_cannot_be_a_row_is_put_aside_with_what_it_moved(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.exchange("c1/0")
    bench.exchange("c2/0", input_tokens=2**70, cost_nanos=500)
    bench.exchange("c3/0")

    assert bench.drain() == 3

    assert [row["call_id"] for row in bench.rows("usage_events")] == ["c1", "c3"]
    (dead,) = bench.rows("dead_entries")
    assert dead["id"] == "c2/0/settle"
    assert "input_tokens" in dead["error"]
    totals = {row["balance"]: row["spent"] for row in bench.rows("window_totals")}
    assert totals[DAY_BUDGET] == 700 + 500 + 700
    (line,) = [json.loads(line) for line in caplog.messages]
    assert (line["event"], line["entry"]) == ("journal_entry_put_aside", "c2/0/settle")


def test_a_payload_that_cannot_be_read_is_put_aside(bench: Bench, tmp_path: Path) -> None:
    bench.exchange("c1/0")
    bench.exchange("c2/0")
    with sqlite3.connect(tmp_path / "guard.db") as damage:
        damage.execute("UPDATE journal SET payload = ? WHERE id = 'c1/0/settle'", (b"\xff{",))
    damage.close()

    assert bench.drain() == 2

    assert [row["call_id"] for row in bench.rows("usage_events")] == ["c2"]
    (dead,) = bench.rows("dead_entries")
    assert (dead["id"], dead["kind"]) == ("c1/0/settle", "settle")
    assert {row["balance"]: row["spent"] for row in bench.rows("window_totals")}[DAY_BUDGET] == 1400


def test_a_row_that_the_database_refuses_takes_only_itself_down(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    # What `row_of` should have found and did not: the database has the last word.
    monkeypatch.setattr("llm_guard_mw.ledger.rows._whole", lambda name, value, biggest: value)
    for exchange in ("c1/0", "c1/1", "c2/0"):
        bench.exchange(exchange, **({"credits": 2**64} if exchange == "c1/1" else {}))

    bench.drain()

    assert [row["call_id"] for row in bench.rows("usage_events")] == ["c1", "c2"]
    assert [row["id"] for row in bench.rows("dead_entries")] == ["c1/1/settle"]
    (group,) = bench.rows("daily_usage")
    assert (group["calls"], group["exchanges"]) == (2, 2)


def test_a_day_is_that_of_the_configured_timezone(tmp_path: Path) -> None:
    clock = Clock()
    store = SQLiteStore(tmp_path / "guard.db", clock=clock)
    bench = Bench(clock, store, Ledger(f"sqlite:///{tmp_path}/guard.db", timezone="Pacific/Auckland"))
    bench.exchange(at=NOON * 1000)

    bench.drain()

    (row,) = bench.rows("usage_events")
    assert row["day"] == "2025-10-10"
    bench.close()


def test_pruning_drops_old_rows_and_keeps_what_they_added_up_to(bench: Bench) -> None:
    bench.exchange("old/0", at=(NOON - 10 * DAY) * 1000)
    bench.exchange("new/0", at=NOON * 1000)
    bench.drain()

    assert bench.ledger.prune(NOON, days=9) == 1

    assert [row["call_id"] for row in bench.rows("usage_events")] == ["new"]
    assert len(bench.rows("daily_usage")) == 2
    assert bench.ledger.prune(NOON, days=9) == 0
