"""A process that guards alone is killed; the next one books what it had done and what it was doing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llm_guard_mw import process
from llm_guard_mw.ledger import verify
from tests.doors.harness import until
from tests.model import servers

SCRIPT = """
import json, sys
from llm_guard_mw import process
from llm_guard_mw.guard import Guard
from llm_guard_mw.model import Asked

process.install(json.loads(sys.argv[1]))
asked = Asked(api="openai.chat", provider="openai", model="gpt-4o-mini", input_tokens=100, cap=100)
with process.Guard().as_user(user="ada", tenant="acme", feature="digest") as call:
    guard = Guard(process.install().desk)
    done = guard.begin(asked)
    guard.finish(done, None, status=500, ending="complete")
    guard.begin(asked)
    print("in the middle of it", flush=True)
    sys.stdin.read()
"""
HELD = 100 * 150 + 100 * 600


@pytest.fixture
def redis() -> servers.Server:
    """A server that is not there yet."""
    if reason := servers.missing("valkey"):
        pytest.skip(reason)
    return servers.Server("valkey")


def test_kill_9_loses_nothing_of_what_was_guarded_alone(redis: servers.Server, tmp_path: Path) -> None:
    config = {
        "store": redis.url,
        "ledger": f"sqlite:///{tmp_path / 'books.db'}",
        "limits": ["$1/day per user", "9 requests/day per user"],
        "on_store_failure": "allow",
    }
    killed = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(config)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert killed.stdout is not None
    assert killed.stdout.readline().strip() == b"in the middle of it"
    killed.kill()
    killed.communicate()
    folder = tmp_path / "llm_guard.spool"
    assert [path.suffix for path in folder.iterdir()] == [".spool"]

    redis.start()
    try:
        installed = process.install(config)
        installed.keeper.start()
        until(lambda: not any(folder.iterdir()), "the next process has settled it")
        store, ledger = installed.desk.store, installed.keeper.ledger
        found = verify(store, ledger)
        rows = sorted(ledger.events(), key=lambda row: row["attempt"])
        spent = {state.balance.partition(":")[2].partition(":")[0]: state.spent for state in store.balances("", 9)}
    finally:
        process.uninstall()
        redis.stop()

    assert (found.ok, found.drift_nanos, found.open_holds) == (True, 0, 0)
    assert all((row["user"], row["tenant"], row["feature"]) == ("ada", "acme", "digest") for row in rows)
    assert [(row["basis"], row["cost_nanos"]) for row in rows] == [("exact", 0), ("abandoned", HELD)]
    assert spent == {"usd": HELD, "requests": 1}
