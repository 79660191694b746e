"""`verify` proves the account, finds what does not add up, and is not fooled by what moves."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest

from llm_guard_mw.errors import LedgerUnavailable
from llm_guard_mw.ledger import Ledger, Verification, verify
from llm_guard_mw.ledger.drain import lease
from llm_guard_mw.model import EntryKind
from llm_guard_mw.stores.journal import encode_event
from llm_guard_mw.stores.protocol import LEFT_ALONE_MS, HoldState, Moved, Settlement
from llm_guard_mw.stores.sqlite import SQLiteStore
from tests.ledger.bench import DAY_BUDGET, DAY_REQUESTS, MINUTE_TOKENS, Bench, event, released_one
from tests.model.world import DAY, LEASE, NOON


def look(bench: Bench) -> Verification:
    return verify(bench.store, bench.ledger)


def damage(path: Path, statement: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
    connection.close()


def books(bench: Bench, statement: str) -> None:
    with bench.ledger.database.writing() as connection:
        connection.exec_driver_sql(statement)


def test_a_life_of_all_kinds_of_endings_adds_up(bench: Bench) -> None:
    bench.exchange("a/0")
    released_one(bench, "b/0")
    bench.refuse("r")
    late = bench.hold("c/0")
    bench.clock.forward(LEASE + 1)
    bench.store.expire()
    bench.drain()
    bench.settle(*late, event("c/0"))
    orphan = Moved(late[1].lines[0], 42)
    payload = encode_event(event("d/0", cost_nanos=42))
    bench.store.settle(Settlement("d/0", "d", EntryKind.SETTLE, bench.clock() + LEASE, (orphan,), payload))
    bench.hold("e/0")
    bench.hold("f/0")

    found = look(bench)

    assert found == Verification(ok=True, drift_nanos=0, open_holds=2, findings=())


def test_an_empty_store_and_empty_books_add_up(bench: Bench) -> None:
    assert look(bench) == Verification(ok=True, drift_nanos=0, open_holds=0, findings=())


def test_what_was_spent_at_reserve_is_known_from_the_open_holds(bench: Bench) -> None:
    bench.hold("a/0")

    assert look(bench).ok


def test_the_books_add_up_over_the_roll_of_a_window(bench: Bench) -> None:
    bench.exchange("a/0")
    crossing = bench.hold("b/0")
    bench.clock.forward(DAY)
    bench.settle(*crossing, event("b/0"))
    assert look(bench).ok

    from tests.model.world import days, dollars, offer, wish

    bench.store.reserve(wish("c/0", offer(dollars(DAY_BUDGET, 10**9, 7, windows=days(bench.clock())))))

    assert look(bench).ok


def test_verify_books_what_is_abandoned(bench: Bench) -> None:
    bench.hold("a/0")
    bench.clock.forward(LEASE + 1)

    found = look(bench)

    assert (found.ok, found.open_holds) == (True, 0)
    assert [row["kind"] for row in bench.rows("usage_events")] == ["abandoned"]


def test_money_that_the_store_invented_is_drift(bench: Bench, tmp_path: Path) -> None:
    bench.exchange("a/0", cost_nanos=700)
    damage(tmp_path / "guard.db", f"UPDATE balances SET spent = spent + 11 WHERE name = '{DAY_BUDGET}'")

    found = look(bench)

    assert (found.ok, found.drift_nanos) == (False, 11)
    (finding,) = found.findings
    assert {name: finding[name] for name in ("kind", "balance", "expected", "actual")} == {
        "kind": "spent",
        "balance": DAY_BUDGET,
        "expected": 700,
        "actual": 711,
    }
    assert DAY_BUDGET in finding["message"]


def test_units_that_are_no_money_are_a_finding_without_drift(bench: Bench, tmp_path: Path) -> None:
    bench.exchange("a/0")
    damage(tmp_path / "guard.db", f"UPDATE balances SET spent = 5 WHERE name = '{DAY_REQUESTS}'")

    found = look(bench)

    assert (found.ok, found.drift_nanos) == (False, 0)
    assert [finding["balance"] for finding in found.findings] == [DAY_REQUESTS]


def test_a_lost_hold_shows_in_what_is_held(bench: Bench, tmp_path: Path) -> None:
    bench.hold("a/0")
    bench.hold("b/0")
    damage(tmp_path / "guard.db", "DELETE FROM holds WHERE exchange = 'a/0'")

    found = look(bench)

    kinds = {(finding["kind"], finding["balance"]): finding["actual"] for finding in found.findings}
    assert kinds == {
        ("held", DAY_BUDGET): 2000,
        ("held", MINUTE_TOKENS): 100,
        ("spent", DAY_REQUESTS): 2,
    }
    assert found.open_holds == 1


def test_a_balance_below_zero_is_a_finding(bench: Bench, tmp_path: Path) -> None:
    bench.exchange("a/0")
    damage(tmp_path / "guard.db", f"UPDATE balances SET spent = -1 WHERE name = '{MINUTE_TOKENS}'")

    assert [(finding["kind"], finding["balance"]) for finding in look(bench).findings] == [("bounds", MINUTE_TOKENS)]


def test_a_balance_that_the_store_lost_is_a_finding(bench: Bench, tmp_path: Path) -> None:
    bench.exchange("a/0", cost_nanos=700)
    damage(tmp_path / "guard.db", f"DELETE FROM balances WHERE name = '{DAY_BUDGET}'")

    found = look(bench)

    assert (found.drift_nanos, [finding["kind"] for finding in found.findings]) == (700, ["spent"])


def test_a_hold_that_no_sweep_books_is_a_finding(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.hold("a/0")
    bench.clock.forward(LEASE + 1001)
    monkeypatch.setattr(bench.store, "expire", lambda most=1000: 0)

    (finding,) = look(bench).findings

    assert finding["kind"] == "overdue_hold"
    assert "a/0" in finding["message"]


def test_a_total_that_is_not_its_rows_is_a_finding(bench: Bench) -> None:
    bench.exchange("a/0", cost_nanos=700)
    bench.drain()
    books(bench, f"UPDATE window_totals SET spent = spent - 100 WHERE balance = '{DAY_BUDGET}'")

    found = look(bench)

    assert [(finding["kind"], finding["expected"], finding["actual"]) for finding in found.findings] == [
        ("spent", 600, 700),
        ("window_total", 700, 600),
    ]
    assert found.drift_nanos == 200


def test_a_lost_row_is_a_finding(bench: Bench) -> None:
    bench.exchange("a/0")
    bench.exchange("b/0")
    bench.drain()
    books(bench, "DELETE FROM usage_events WHERE call_id = 'a'")

    kinds = sorted({finding["kind"] for finding in look(bench).findings})

    assert kinds == ["rollup", "window_total"]


def test_a_rollup_that_is_not_its_rows_or_is_gone_is_a_finding(bench: Bench) -> None:
    bench.exchange("a/0", feature="one", cost_nanos=700)
    bench.exchange("b/0", feature="two", cost_nanos=300)
    bench.drain()
    books(bench, "UPDATE daily_usage SET cost_nanos = 5 WHERE feature = 'one'")
    books(bench, "DELETE FROM daily_usage WHERE feature = 'two'")

    found = {(finding["kind"], finding["expected"], finding["actual"]) for finding in look(bench).findings}

    assert found == {("rollup", 700, 5), ("rollup", 300, None)}


def test_an_exchange_closed_twice_is_a_finding(bench: Bench) -> None:
    bench.exchange("a/0", cost_nanos=700)
    bench.drain()
    books(bench, "UPDATE usage_events SET call_id = 'a', attempt = 0")
    released_one(bench, "b/0")
    bench.drain()
    books(bench, "UPDATE usage_events SET call_id = 'a'")

    assert [finding["kind"] for finding in look(bench).findings] == ["closed_twice"]


def test_an_entry_put_aside_is_a_finding_and_no_drift(bench: Bench) -> None:
    bench.exchange("a/0", input_tokens=2**70)

    found = look(bench)

    assert (found.ok, found.drift_nanos, [finding["kind"] for finding in found.findings]) == (False, 0, ["dead_entry"])


def test_what_was_pruned_is_not_missed(bench: Bench) -> None:
    bench.exchange("a/0", at=(NOON - 20 * DAY) * 1000)
    bench.clock.forward(20 * DAY)
    bench.drain()
    bench.ledger.prune(bench.clock(), days=7)

    assert bench.rows("usage_events") == []
    assert look(bench).ok


def test_an_entry_put_aside_is_pruned_with_the_rows_of_its_day(bench: Bench) -> None:
    bench.exchange("a/0", input_tokens=2**70)
    bench.drain()
    bench.clock.forward(20 * DAY)

    bench.ledger.prune(bench.clock(), days=7)

    assert look(bench).ok


def test_an_entry_that_waits_in_the_journal_after_its_commit_is_not_counted_twice(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.exchange("a/0")
    monkeypatch.setattr(bench.store, "drop_journal", lambda positions: None)
    bench.drain_once()

    monkeypatch.setattr("llm_guard_mw.ledger.audit.drain_all", lambda *_: 0)

    assert look(bench).ok


def test_entries_that_come_in_after_the_drain_are_counted_from_the_journal(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_guard_mw.ledger.audit.drain_all", lambda *_: 0)
    bench.exchange("a/0")

    assert look(bench).ok
    assert bench.store.journal_length() == 1


def test_a_balance_that_moves_while_it_is_looked_at_is_no_finding(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_holds = bench.store.holds

    def while_work_goes_on(after: str, count: int) -> Sequence[HoldState]:
        holds = read_holds(after, count)
        bench.hold()
        return holds

    bench.hold()
    monkeypatch.setattr(bench.store, "holds", while_work_goes_on)

    assert look(bench).ok


def test_the_books_stand_still_while_verify_reads(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Ledger(bench.ledger.url)
    drained: list[int | None] = []
    read_holds = bench.store.holds

    def while_another_drains(after: str, count: int) -> Sequence[HoldState]:
        bench.exchange()
        drained.append(other.drain(bench.store))
        return read_holds(after, count)

    monkeypatch.setattr(bench.store, "holds", while_another_drains)

    assert look(bench).ok
    assert set(drained) == {None}
    assert other.drain(bench.store) == len(drained)
    other.close()


def test_verify_waits_for_another_verify(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_guard_mw.ledger.audit._PATIENCE_SECONDS", 0.1)

    with (
        lease(bench.ledger.database, bench.store.epoch()),
        pytest.raises(LedgerUnavailable, match="another process has been verifying it for too long"),
    ):
        look(bench)


def test_verify_waits_for_what_others_have_in_hand(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.exchange()
    bench.store.take_journal("at work", 1)
    monkeypatch.setattr("llm_guard_mw.ledger.audit._PATIENCE_SECONDS", 0.1)

    with pytest.raises(LedgerUnavailable, match="another process has been at its journal for too long"):
        look(bench)

    bench.clock.forward(LEFT_ALONE_MS)
    assert look(bench).ok


def test_a_store_made_anew_is_told_apart_from_the_books(bench: Bench, tmp_path: Path) -> None:
    bench.exchange("a/0", cost_nanos=700)
    bench.drain()
    anew = SQLiteStore(tmp_path / "anew.db", clock=bench.clock)

    found = verify(anew, bench.ledger)

    assert (found.ok, found.drift_nanos) == (False, 700)
    anew.close()
