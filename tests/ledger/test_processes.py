"""Several processes live on one store and one ledger, and one of them is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from llm_guard_mw.ledger import Ledger, verify
from llm_guard_mw.stores.sqlite import SQLiteStore, wall_clock_ms
from tests.ledger.bench import Bench
from tests.model.world import LEASE, Clock

WORKER = """
import itertools, sys
from pathlib import Path
from llm_guard_mw.stores.sqlite import wall_clock_ms
from tests.ledger.bench import new_bench

name, path, ledger, most = sys.argv[1:]
bench = new_bench(Path(path), ledger)
for number in itertools.count() if most == "endless" else range(int(most)):
    bench.clock.now = wall_clock_ms()
    exchange, granted = bench.hold(f"{name}-{number:05}/0")
    if number == 20:
        print("under way", flush=True)
    if number % 10 != 9:
        from tests.ledger.bench import event
        bench.settle(exchange, granted, event(exchange, at=bench.clock.now * 1000))
    bench.ledger.drain(bench.store, 7)
bench.close()
"""


def test_a_killed_process_leaves_books_that_add_up(ledger_url: str, tmp_path: Path) -> None:
    path = tmp_path / "guard.db"

    def start(name: str, most: str) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", WORKER, name, str(path), ledger_url, most]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])

    workers = [start("a", "60"), start("b", "60")]
    doomed = start("c", "endless")
    with doomed:
        assert doomed.stdout is not None
        assert doomed.stdout.readline() == "under way\n"
        os.kill(doomed.pid, signal.SIGKILL)
    assert doomed.returncode == -signal.SIGKILL
    for worker in workers:
        with worker:
            worker.communicate(timeout=120)
        assert worker.returncode == 0
    later = Clock(wall_clock_ms() + LEASE + 2000)
    bench = Bench(later, SQLiteStore(path, clock=later), Ledger(ledger_url))

    found = verify(bench.store, bench.ledger)

    assert found.findings == ()
    assert found.open_holds == 0
    kinds = [(row["call_id"][0], row["kind"]) for row in bench.rows("usage_events")]
    assert [kinds.count((name, "settle")) for name in "ab"] == [54, 54]
    assert [kinds.count((name, "abandoned")) for name in "ab"] == [6, 6]
    assert kinds.count(("c", "settle")) >= 18
    bench.close()
