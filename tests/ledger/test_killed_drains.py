"""A process that drains is killed at the two moments that matter, and another one takes over: nothing lost or twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llm_guard_mw.ledger import Ledger, verify
from llm_guard_mw.stores import open_store
from llm_guard_mw.stores.protocol import ProcessStore
from llm_guard_mw.stores.sqlite import wall_clock_ms
from tests.ledger.bench import DAY_BUDGET, Bench
from tests.model import servers
from tests.model.world import Clock

ENTRIES, IN_HAND = 30, 20

#: It drains until the moment that is named, says so, and waits there for its end.
DOOMED = """
import sys, time
from llm_guard_mw.ledger import Ledger
from llm_guard_mw.stores import open_store

moment, store_url, ledger_url, most = sys.argv[1:]

class Pausing:
    def __init__(self, store):
        self.store = store

    def __getattr__(self, name):
        return getattr(self.store, name)

    def take_journal(self, consumer, count):
        entries = self.store.take_journal(consumer, count)
        if moment == "before the commit":
            self.pause(len(entries))
        return entries

    def drop_journal(self, positions):
        if moment == "after the commit":
            self.pause(len(positions))

    def pause(self, entries):
        print(entries, flush=True)
        time.sleep(600)

Ledger(ledger_url).drain(Pausing(open_store(store_url)), int(most))
"""


@pytest.fixture(params=["sqlite", *servers.LEGS])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/guard.db"
    if reason := servers.missing(request.param):
        pytest.skip(reason)
    return servers.emptied(request.param).url


def kill_a_drain(moment: str, store_url: str, ledger_url: str) -> None:
    arguments = [sys.executable, "-c", DOOMED, moment, store_url, ledger_url, str(IN_HAND)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as doomed:
        assert doomed.stdout is not None
        assert doomed.stdout.readline() == f"{IN_HAND}\n"
        os.kill(doomed.pid, signal.SIGKILL)


def spend(store: ProcessStore, ledger: Ledger) -> Bench:
    bench = Bench(Clock(wall_clock_ms()), store, ledger)
    for _ in range(ENTRIES):
        bench.exchange(at=bench.clock() * 1000, cost_nanos=700)
    return bench


@pytest.mark.parametrize("moment", ["before the commit", "after the commit"])
def test_what_a_killed_drain_had_in_hand_is_in_the_books_once(moment: str, store_url: str, ledger_url: str) -> None:
    bench = spend(open_store(store_url), Ledger(ledger_url))

    kill_a_drain(moment, store_url, ledger_url)

    committed = len(bench.rows("usage_events"))
    assert committed == (IN_HAND if moment == "after the commit" else 0)
    assert bench.store.journal_length() == ENTRIES
    assert verify(bench.store, bench.ledger).findings == ()
    assert len(bench.rows("usage_events")) == ENTRIES
    (group,) = bench.rows("daily_usage")
    assert (group["calls"], group["exchanges"], group["cost_nanos"]) == (ENTRIES, ENTRIES, ENTRIES * 700)
    totals = {row["balance"]: row["spent"] for row in bench.rows("window_totals")}
    assert totals[DAY_BUDGET] == ENTRIES * 700
    assert bench.rows("dead_entries") == []
    assert bench.store.journal_length() == 0
    bench.close()
