"""A store and a ledger side by side, and short words for what a guarded app would do to them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from sqlalchemy import Table, select

from llm_guard_mw.ledger import Ledger
from llm_guard_mw.ledger.tables import METADATA
from llm_guard_mw.model import Demand, EntryKind, UsageEvent
from llm_guard_mw.stores.journal import encode_event
from llm_guard_mw.stores.protocol import Granted, Moved, Settlement, Store
from llm_guard_mw.stores.sqlite import SQLiteStore
from tests.model.world import NOON, Clock, concurrent, days, dollars, offer, released, requests_a_day, tokens, wish

DAY_BUDGET = "user=alice|calendar:usd:day:0:UTC:all"
DAY_REQUESTS = "user=alice|calendar:requests:day:0:UTC:all"
MINUTE_TOKENS = "user=alice|bucket:tokens:60000:0::all"
AT_ONCE = "user=alice|concurrent:concurrent::0::all"


def demands(at: int, cost: int = 1000) -> tuple[Demand, ...]:
    """What each exchange of the bench claims: one balance of every kind, wide enough to say yes."""
    return (
        dollars(DAY_BUDGET, 2**53 - 1, cost, windows=days(at)),
        requests_a_day(DAY_REQUESTS, 10**9, windows=days(at)),
        tokens(MINUTE_TOKENS, 10**9, 50),
        concurrent(AT_ONCE, 10**9),
    )


@dataclass
class Bench:
    """`store` decides by `clock`; `ledger` may be in the same file."""

    clock: Clock
    store: Store
    ledger: Ledger
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    def hold(self, exchange: str | None = None, cost: int = 1000) -> tuple[str, Granted]:
        exchange = exchange or f"call{next(self.numbers):04}/0"
        granted = self.store.reserve(wish(exchange, offer(*demands(self.clock(), cost))))
        assert isinstance(granted, Granted)
        return exchange, granted

    def settle(self, exchange: str, granted: Granted, event: UsageEvent) -> None:
        actual = event.cost_nanos or 0
        moved = tuple(Moved(line, actual if line.balance == DAY_BUDGET else line.amount) for line in granted.lines)
        call = exchange.split("/")[0]
        payload = encode_event(event, held_nanos=1000)
        self.store.settle(Settlement(exchange, call, EntryKind.SETTLE, granted.lease_end, moved, payload))
        self.store.close_call(call)

    def exchange(self, exchange: str | None = None, **facts: Any) -> str:
        """One exchange from reserve to settle; `facts` are fields of its event."""
        exchange, granted = self.hold(exchange)
        self.settle(exchange, granted, event(exchange, **facts))
        return exchange

    def refuse(self, entry_id: str, **facts: Any) -> None:
        refused = event(f"{entry_id}/0", kind=EntryKind.REFUSED, cost_nanos=None, input_tokens=None, **facts)
        self.store.append(f"{entry_id}/0/refused", encode_event(replace(refused, output_tokens=None)))

    def drain(self, most: int = 500) -> int:
        total = 0
        while drained := self.ledger.drain(self.store, most):
            total += drained
        assert drained == 0
        return total

    def drain_once(self) -> None:
        assert self.ledger.drain(self.store)

    def rows(self, table: str) -> list[dict[str, Any]]:
        return rows(self.ledger, METADATA.tables[table])

    def close(self) -> None:
        self.ledger.close()
        self.store.close()


def released_one(bench: Bench, exchange: str) -> None:
    """An exchange whose bytes never left."""
    exchange, granted = bench.hold(exchange)
    bench.store.settle(released(exchange, granted))


def new_bench(path: Path, ledger_url: str, timezone: str = "UTC") -> Bench:
    clock = Clock()
    return Bench(clock, SQLiteStore(path, clock=clock), Ledger(ledger_url, timezone=timezone))


def event(exchange: str, **facts: Any) -> UsageEvent:
    call, _, attempt = exchange.partition("/")
    standard: dict[str, Any] = {
        "kind": EntryKind.SETTLE,
        "at": NOON * 1000,
        "user": "alice",
        "tenant": "acme",
        "feature": "chat",
        "model": "gpt-4o",
        "input_tokens": 10,
        "output_tokens": 5,
        "cost_nanos": 700,
        "price_version": "prices-1",
    }
    return UsageEvent(call, int(attempt), **(standard | facts))


def rows(ledger: Ledger, table: Table, order: Sequence[str] = ()) -> list[dict[str, Any]]:
    """All rows of a table, without the numbers that only say in which order they came."""
    with ledger.database.reading() as connection:
        found = [dict(row) for row in connection.execute(select(table)).mappings()]
    for row in found:
        row.pop("number", None)
    return sorted(found, key=lambda row: [str(row[column.name]) for column in table.columns if column.name in row])
