"""What a process does in the background: renew, sweep, try again, drain, and rest while the ledger is away."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_guard_mw import process
from llm_guard_mw.duties import Duty
from llm_guard_mw.errors import StoreUnavailable
from llm_guard_mw.guard import Guard
from llm_guard_mw.ledger import Ledger, verify
from llm_guard_mw.model import Asked, EntryKind
from llm_guard_mw.stores import open_store, sqlite
from llm_guard_mw.stores.journal import encode_event
from tests.model.world import event_of

Install = Callable[..., process.Installation]
ASKED = Asked(api="openai.chat", provider="openai", model="gpt-4o-mini", input_tokens=100, cap=100)
HELD = 100 * 150 + 100 * 600


def until(claim: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + 15
    while not (found := claim()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)
    return found


def events(installed: process.Installation) -> list[dict[str, Any]]:
    installed.keeper.ledger.drain_all(installed.desk.store)
    return list(installed.keeper.ledger.events())


def begin(installed: process.Installation) -> Any:
    """An exchange of a call of its own, as a capture outside of any call opens it."""
    exchange = Guard(installed.desk).begin(ASKED)
    assert not isinstance(exchange, type(None))
    return exchange


def test_an_open_exchange_outlives_its_first_lease(guarded: Install) -> None:
    installed = guarded(lease_seconds=1, limits=["$1/day global", "5 concurrent global"])
    installed.keeper.start()
    exchange = begin(installed)
    first_lease = exchange.lease_end

    until(lambda: installed.desk.store.now() > first_lease + 600, "the first lease is over")

    assert exchange.lease_end > first_lease
    assert [hold.exchange for hold in installed.desk.store.holds("", 10)] == [exchange.id]
    Guard(installed.desk).finish(exchange, None, status=500, ending="complete")
    [event] = until(lambda: events(installed), "it is settled")
    assert event["kind"] == "settle"


def test_what_a_dead_process_held_is_booked_by_another_one_and_stays_attributed(
    guarded: Install, tmp_path: Path
) -> None:
    installed = guarded(lease_seconds=1)
    with process.Guard().as_user(user="ada", tenant="acme", feature="digest") as call:
        exchange = begin(installed)
        assert exchange.call is call
        installed.desk.open.clear()  # as if this process were gone: nothing renews
        installed.desk.calls.clear()

        other = Ledger(installed.config.ledger)
        store = open_store(installed.config.store)
        until(lambda: store.expire(), "the lease is over")
        other.drain_all(store)
        [event] = [row for row in other.events() if row["kind"] == "abandoned"]
        other.close()
        store.close()

    assert (event["user"], event["tenant"], event["feature"]) == ("ada", "acme", "digest")
    assert (event["basis"], event["cost_nanos"]) == ("abandoned", HELD)


def test_a_settle_after_its_lease_is_a_correction(guarded: Install) -> None:
    installed = guarded(lease_seconds=1, limits=["$1/day global"])
    exchange = begin(installed)
    until(lambda: installed.desk.store.expire(), "the lease is over")

    Guard(installed.desk).finish(exchange, None, status=500, ending="complete")

    assert sorted(event["kind"] for event in events(installed)) == ["abandoned", "correction"]
    [balance] = installed.desk.store.balances("", 10)
    assert (balance.spent, balance.held) == (0, 0)
    assert verify(installed.desk.store, installed.keeper.ledger).ok


def test_the_keeper_sweeps_what_others_left(guarded: Install) -> None:
    installed = guarded(lease_seconds=1, limits=["$1/day global"])
    begin(installed)
    installed.desk.open.clear()

    installed.keeper.start()

    until(lambda: [event for event in events(installed) if event["kind"] == "abandoned"], "it is swept")


def test_a_settlement_that_found_the_store_locked_is_tried_again(
    guarded: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = guarded(limits=["$1/day global"])
    installed.keeper.ledger.migrate()  # its first use locks the same file for longer than we are patient
    exchange = begin(installed)
    other = sqlite3.connect(tmp_path / "guard.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with monkeypatch.context() as impatience:
        impatience.setattr(sqlite, "LOCK_WAIT_SECONDS", 0.02)
        Guard(installed.desk).finish(exchange, None, status=500, ending="complete")
        assert len(installed.desk.outbox) == 1
        with pytest.raises(StoreUnavailable):
            begin(installed)
    other.execute("ROLLBACK")
    other.close()
    installed.keeper.start()

    until(lambda: not installed.desk.store.holds("", 10), "it is settled")
    assert [event["kind"] for event in events(installed) if event["call_id"] == exchange.call.id] == ["settle"]
    assert installed.desk.calls == {}


def test_the_ledger_has_an_entry_within_a_second(guarded: Install) -> None:
    installed = guarded(limits=["$1/day global"])
    installed.keeper.ledger.migrate()  # what takes a second is its first use
    installed.keeper.start()
    exchange = begin(installed)
    began = time.monotonic()

    Guard(installed.desk).finish(exchange, None, status=500, ending="complete")
    until(lambda: list(installed.keeper.ledger.events()), "it is in the ledger")

    assert time.monotonic() - began < 2


def drain_of(installed: process.Installation) -> Duty:
    [drain] = [duty for duty in installed.keeper.duties if duty.name == "drain"]
    return drain


def test_the_journal_is_left_to_a_worker_as_long_as_one_is_at_it(guarded: Install) -> None:
    installed = guarded(limits=["$1/day global"])
    store = installed.desk.store
    Guard(installed.desk).finish(begin(installed), None, status=500, ending="complete")

    store.attend(60_000)
    installed.keeper._do(drain_of(installed))
    assert store.journal_length() == 1

    store.attend(0)
    installed.keeper._do(drain_of(installed))
    assert store.journal_length() == 0


def test_a_worker_that_falls_behind_is_helped(guarded: Install) -> None:
    installed = guarded(limits=["$1/day global"], journal_max=1000)
    store = installed.desk.store
    for number in range(501):
        store.append(f"r{number}/0/refused", encode_event(event_of(f"r{number}/0")))
    store.attend(60_000)

    installed.keeper._do(drain_of(installed))

    assert store.journal_length() < 500


def test_a_ledger_that_is_away_is_left_alone_for_longer_and_longer(
    guarded: Install, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    installed = guarded(ledger=f"sqlite:///{tmp_path / 'nowhere' / 'file' / 'ledger.db'}", limits=["$1/day global"])
    (tmp_path / "nowhere").write_text("a file where a folder would have to be")
    Guard(installed.desk).finish(begin(installed), None, status=500, ending="complete")

    drain = drain_of(installed)
    rests = []
    for _ in range(7):
        installed.keeper._do(drain)
        rests.append(round(drain.due - time.monotonic()))

    assert rests == [1, 2, 4, 8, 16, 30, 30]
    assert installed.desk.store.journal_length() == 1
    (tmp_path / "nowhere").unlink()


def test_a_duty_that_fails_keeps_no_other_from_being_done(
    guarded: Install, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    installed = guarded(lease_seconds=1, limits=["$1/day global"])
    [sweep] = [duty for duty in installed.keeper.duties if duty.name == "sweep"]
    monkeypatch.setattr(sweep, "work", lambda: 1 / 0)
    Guard(installed.desk).finish(begin(installed), None, status=500, ending="complete")
    installed.keeper.start()

    until(lambda: "keeper_failed" in caplog.text, "the sweep has failed")
    until(lambda: list(installed.keeper.ledger.events()), "the drain goes on")


def test_stopping_writes_what_waits(guarded: Install) -> None:
    installed = guarded(limits=["$1/day global"])
    installed.keeper.start()
    Guard(installed.desk).finish(begin(installed), None, status=500, ending="complete")

    process.uninstall()

    ledger = Ledger(installed.config.ledger)
    assert [event["kind"] for event in ledger.events()] == [EntryKind.SETTLE]
    ledger.close()
