"""Law 4 for the drain: whatever the batches, the deaths and the replays, the books are the same."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_guard_mw.ledger import Ledger, verify
from llm_guard_mw.ledger import drain as drain_module
from llm_guard_mw.ledger.tables import METADATA
from llm_guard_mw.stores.protocol import Entries
from tests.ledger.bench import Bench, event, released_one, rows
from tests.model.reference import ReferenceStore
from tests.model.world import DAY, LEASE, NOON, Clock

DEEP = os.environ.get("LLM_GUARD_HYPOTHESIS") == "deep"

BOOKS = ("usage_events", "daily_usage", "window_totals", "dead_entries")


class Died(BaseException):
    """The process ended here."""


class MortalStore:
    """A store whose drain dies where the test says: with entries in its hands, or between commit and drop."""

    def __init__(self, store: ReferenceStore) -> None:
        self.store = store
        self.dies_at: str | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self.store, name)

    def drop_journal(self, positions: Sequence[str]) -> None:
        if self.dies_at == "drop":
            raise Died
        self.store.drop_journal(positions)

    def take_journal(self, consumer: str, count: int, idle_ms: int = 0) -> Entries:
        entries = self.store.take_journal(consumer, count, idle_ms)
        if self.dies_at == "take":
            raise Died
        return entries


endings = st.sampled_from(["settle", "settle", "release", "abandon", "abandon and correct", "refuse", "poison"])
exchanges = st.lists(
    st.tuples(
        endings,
        st.integers(0, 3),  # which call
        st.sampled_from(["chat", "search", None]),
        st.integers(0, 2),  # days ago
        st.one_of(st.none(), st.integers(0, 10**7)),
    ),
    max_size=12,
)
steps = st.lists(
    st.tuples(st.integers(1, 5), st.sampled_from([None, None, "take", "commit", "drop"])), min_size=1, max_size=8
)


def live(bench: Bench, history: list[tuple[str, int, str | None, int, int | None]]) -> None:
    attempts = [0] * 4
    for ending, call, feature, days_ago, cost in history:
        exchange = f"c{call}/{attempts[call]}"
        attempts[call] += 1
        at = (NOON - days_ago * DAY) * 1000
        facts = event(exchange, at=at, feature=feature, cost_nanos=cost, tags={"n": str(call)})
        if ending == "refuse":
            bench.refuse(f"r{exchange.replace('/', '-')}", at=at, feature=feature)
        elif ending == "release":
            released_one(bench, exchange)
        elif ending == "poison":
            bench.exchange(exchange, at=at, credits=2**80)
        else:
            _, granted = bench.hold(exchange)
            if ending.startswith("abandon"):
                bench.clock.forward(LEASE + 1)
                bench.store.expire()
            if ending != "abandon":
                bench.settle(exchange, granted, facts)


@settings(max_examples=500 if DEEP else 20, deadline=None, suppress_health_check=list(HealthCheck))
@given(exchanges, steps)
def test_batches_deaths_and_replays_leave_the_same_books(
    history: list[tuple[str, int, str | None, int, int | None]], plan: list[tuple[int, str | None]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        books = []
        for name, deadly in (("plain", False), ("deadly", True)):
            clock = Clock()
            store = MortalStore(ReferenceStore(clock))
            ledger = Ledger(f"sqlite:///{Path(folder)}/{name}.db")
            bench = Bench(clock, store, ledger)  # type: ignore[arg-type]
            live(bench, history)
            if deadly:
                stumble(bench, store, plan)
            bench.drain()
            assert verify(bench.store, ledger).drift_nanos == 0
            books.append({table: rows(ledger, METADATA.tables[table]) for table in BOOKS})
            ledger.close()

    for table in books[1]["dead_entries"] + books[0]["dead_entries"]:
        table.pop("epoch")
    assert books[0] == books[1]


def stumble(bench: Bench, store: MortalStore, plan: list[tuple[int, str | None]]) -> None:
    """Drain as planned, each time by another process; one that dies leaves entries in its hands."""
    take_down = drain_module._take_down
    for most, dies_at in plan:
        store.dies_at = dies_at
        if dies_at == "commit":

            def dying(*arguments: object, careful: bool) -> None:
                take_down(*arguments, careful=careful)  # type: ignore[arg-type]
                raise Died

            drain_module._take_down = dying  # type: ignore[assignment]
        try:
            ledger = Ledger(bench.ledger.url)
            ledger.drain(bench.store, most)
        except Died:
            pass
        finally:
            drain_module._take_down = take_down
            store.dies_at = None
            ledger.close()
