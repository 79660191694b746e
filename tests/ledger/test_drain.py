"""The drain turns journal entries into rows, rollups and totals, once each."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llm_guard_mw.ledger import Ledger
from llm_guard_mw.ledger.drain import LEASE_MS, lease
from llm_guard_mw.ledger.rows import EVENT_FIELDS
from llm_guard_mw.model import Basis, UsageEvent
from llm_guard_mw.stores.protocol import Entries
from llm_guard_mw.stores.sqlite import SQLiteStore
from tests.ledger.bench import DAY_BUDGET, DAY_REQUESTS, Bench, event, new_bench, released_one
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


def test_a_drain_that_died_after_its_commit_changes_nothing_when_repeated(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        bench.exchange()

    def killed(self: SQLiteStore, positions: Sequence[str]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SQLiteStore, "drop_journal", killed)
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


def test_several_drain_side_by_side_each_its_own_entries(bench: Bench) -> None:
    for _ in range(4):
        bench.exchange()
    other = Ledger(bench.ledger.url)
    bench.store.take_journal("a third one", 1)

    assert bench.ledger.drain(bench.store, most=2) == 2
    assert other.drain(bench.store, most=2) == 1
    assert len(bench.rows("usage_events")) == 3
    other.close()


def test_entries_that_two_have_in_hand_are_counted_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        bench.exchange(cost_nanos=700)
    slow, take = Ledger(bench.ledger.url), bench.store.take_journal

    def slowly(consumer: str, count: int) -> Entries:
        entries = take(consumer, count)
        with monkeypatch.context() as patch:
            patch.setattr(bench.store, "take_journal", lambda consumer, count: take(consumer, count, 0))
            assert bench.ledger.drain(bench.store) == 3
        return entries

    monkeypatch.setattr(bench.store, "take_journal", slowly)

    assert slow.drain(bench.store) == 3
    (group,) = bench.rows("daily_usage")
    assert (len(bench.rows("usage_events")), group["exchanges"], group["cost_nanos"]) == (3, 3, 2100)
    assert {row["balance"]: row["spent"] for row in bench.rows("window_totals")}[DAY_BUDGET] == 2100
    assert bench.rows("dead_entries") == []
    slow.close()


def test_many_who_commit_the_same_entries_at_the_same_time_count_them_once(bench: Bench) -> None:
    for _ in range(40):
        bench.exchange(cost_nanos=100)
    entries = bench.store.read_journal("", 100)
    ledgers = [Ledger(bench.ledger.url) for _ in range(4)]

    class Handing:
        """Gives everybody all entries, as if each had found the others dead."""

        def __getattr__(self, name: str) -> object:
            return getattr(bench.store, name)

        def take_journal(self, consumer: str, count: int) -> Entries:
            return entries

    with ThreadPoolExecutor(4) as pool:
        drained = list(pool.map(lambda ledger: ledger.drain(Handing()), ledgers))  # type: ignore[arg-type]

    assert drained == [40] * 4
    (group,) = bench.rows("daily_usage")
    assert (len(bench.rows("usage_events")), group["exchanges"], group["cost_nanos"]) == (40, 40, 4000)
    assert {row["balance"]: row["spent"] for row in bench.rows("window_totals")}[DAY_BUDGET] == 4000
    assert bench.rows("dead_entries") == []
    for ledger in ledgers:
        ledger.close()


def test_nobody_drains_while_the_books_are_held_still(bench: Bench) -> None:
    bench.exchange()
    other = Ledger(bench.ledger.url)

    with lease(other.database, bench.store.epoch()) as held:
        assert held is not None
        assert bench.ledger.drain(bench.store) is None
        assert bench.rows("usage_events") == []
    assert bench.ledger.drain(bench.store) == 1
    assert len(bench.rows("usage_events")) == 1
    other.close()


def test_whoever_held_the_books_and_died_is_waited_for_no_longer_than_the_lease(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.exchange()
    dead = lease(bench.ledger.database, bench.store.epoch())
    held = dead.__enter__()
    assert held is not None
    import llm_guard_mw.ledger.drain as module

    later = module._now() + LEASE_MS
    monkeypatch.setattr(module, "_now", lambda: later)

    assert bench.ledger.drain(bench.store) == 1
    assert not held.renew(bench.ledger.database)
    dead.__exit__(None, None, None)


def test_the_watermark_is_the_furthest_position_and_never_moves_back(bench: Bench) -> None:
    for _ in range(3):
        bench.exchange()
    *_, last = bench.store.read_journal("", 3)
    bench.store.take_journal("another", 1)
    bench.drain_once()

    assert [row["position"] for row in bench.rows("drain_watermarks")] == [last.position]
    bench.store.take_journal(bench.ledger._my_hands().name, 9, 0)
    bench.drain_once()
    assert [row["position"] for row in bench.rows("drain_watermarks")] == [last.position]
    assert bench.store.journal_length() == 0


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
    damage(tmp_path / "guard.db", "c1/0/settle", payload=b"\xff{")

    assert bench.drain() == 2

    assert [row["call_id"] for row in bench.rows("usage_events")] == ["c2"]
    (dead,) = bench.rows("dead_entries")
    assert (dead["id"], dead["kind"]) == ("c1/0/settle", "settle")
    assert {row["balance"]: row["spent"] for row in bench.rows("window_totals")}[DAY_BUDGET] == 1400


def damage(path: Path, entry_id: str, **columns: object) -> None:
    """Write over parts of a journal entry, as a disk or a stranger might."""
    with sqlite3.connect(path) as db:
        assigned = ", ".join(f"{name} = ?" for name in columns)
        db.execute(f"UPDATE journal SET {assigned} WHERE id = ?", (*columns.values(), entry_id))
    db.close()


@pytest.mark.parametrize(
    "columns",
    [
        {"kind": "of another world"},
        {"lines": b"\xff"},
        {"lines": b"[[1, 2, 3, 4, 5, 6]]"},
        {"lines": b'[["x", "calendar", "usd", 0, 99999999999999999999999, false]]'},
        {"lines": b'[["x", "calendar", "usd", 0, 9223372036854775807, false]]'},
        {"lines": b'[["%s", "calendar", "usd", 0, 1, false]]' % (b"x" * 5000)},
        {"kind": "abandoned", "offer": 7},
        {"payload": b""},
        {"payload": b"\xff\x00\xff"},
        {"payload": b'{"event":{"call_id":"\\ud800","attempt":1,"kind":"settle","at":99999999999999999999}}'},
        {"payload": b'{"event":{"call_id":"%s","attempt":1,"kind":"settle","at":5}}' % (b"c" * 5000)},
        {"payload": b"{}", "id": "x" * 5000 + "\0"},
        {"payload": b"{}", "at": 2**63 - 1},
    ],
)
def test_whatever_a_stranger_writes_is_put_aside_and_the_others_go_on(
    bench: Bench, tmp_path: Path, columns: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    bench.exchange("c1/0")
    bench.exchange("c2/0")
    damage(tmp_path / "guard.db", "c1/0/settle", **columns)

    assert bench.drain() == 2

    assert [row["call_id"] for row in bench.rows("usage_events")] == ["c2"]
    assert len(bench.rows("dead_entries")) == 1
    assert bench.store.journal_length() == 0
    assert [json.loads(line)["event"] for line in caplog.messages] == ["journal_entry_put_aside"]


def test_lines_that_cannot_be_added_are_told_and_do_not_count(postgres_url: str, tmp_path: Path) -> None:
    bench = new_bench(tmp_path / "guard.db", postgres_url)
    bench.exchange("c1/0")
    bench.drain()
    with bench.ledger.database.writing() as connection:
        connection.exec_driver_sql(f"UPDATE window_totals SET spent = {2**63 - 1} WHERE balance = '{DAY_BUDGET}'")
    bench.exchange("c2/0")

    assert bench.drain() == 1

    (dead,) = bench.rows("dead_entries")
    assert (dead["id"], dead["lines"]) == ("c2/0/settle", [])
    assert DAY_BUDGET in dead["error"]
    bench.close()


def test_an_alarm_is_told_once_however_often_the_drain_dies(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench.exchange("c1/0", input_tokens=2**70)

    def killed(self: SQLiteStore, positions: Sequence[str]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SQLiteStore, "drop_journal", killed)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                bench.drain()
    bench.drain()

    assert [json.loads(line)["event"] for line in caplog.messages] == ["journal_entry_put_aside"]
    assert len(bench.rows("dead_entries")) == 1


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
