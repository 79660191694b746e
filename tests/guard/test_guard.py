"""The guard without a door: cancellation, forks, the end of the process, and what a capture leaves behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_guard_mw import LimitExceeded, process
from llm_guard_mw.errors import StoreUnavailable
from llm_guard_mw.guard import AsyncGuard, Guard
from llm_guard_mw.ledger import Ledger, verify
from llm_guard_mw.model import Asked, Refusal
from llm_guard_mw.stores import open_store, sqlite

Install = Callable[..., process.Installation]
ASKED = Asked(api="openai.chat", provider="openai", model="gpt-4o-mini", input_tokens=100, cap=100)
ROOT = Path(__file__).parents[2]


def held(installed: process.Installation) -> int:
    return sum(balance.held for balance in installed.desk.store.balances("", 10))


def members(path: Path) -> int:
    db = sqlite3.connect(path)
    (count,) = db.execute("SELECT count(*) FROM members").fetchone()
    db.close()
    return int(count)


@pytest.mark.anyio
async def test_a_reserve_that_is_cancelled_on_its_way_gives_everything_back(guarded: Install, tmp_path: Path) -> None:
    installed = guarded(limits=["$1/day global", "1 concurrent global"])
    installed.desk.store.now()
    other = sqlite3.connect(tmp_path / "guard.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")  # the reserve waits for this lock
    task = asyncio.create_task(AsyncGuard(installed.desk).begin(ASKED))
    await asyncio.sleep(0.1)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    other.execute("ROLLBACK")
    other.close()

    installed.desk.store.now()  # what was handed in before has been done
    assert held(installed) == 0
    assert members(tmp_path / "guard.db") == 0
    assert installed.desk.calls == {}
    assert verify(installed.desk.store, installed.keeper.ledger).ok


@pytest.mark.anyio
async def test_a_take_over_that_is_cancelled_on_its_way_gives_everything_back(guarded: Install, tmp_path: Path) -> None:
    installed = guarded(limits=["$1/day global", "1 concurrent global"])
    async with process.AsyncGuard().as_user(user="ada"):
        other = sqlite3.connect(tmp_path / "guard.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        task = asyncio.create_task(AsyncGuard(installed.desk).begin(ASKED))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        other.execute("ROLLBACK")
        other.close()

    installed.desk.store.now()
    assert held(installed) == 0
    assert members(tmp_path / "guard.db") == 0
    assert (installed.desk.calls, installed.desk.open) == ({}, {})
    assert verify(installed.desk.store, installed.keeper.ledger).ok


def test_a_capture_that_finds_no_store_leaves_no_call_behind(
    guarded: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = guarded(limits=["$1/day global"])
    monkeypatch.setattr(sqlite, "LOCK_WAIT_SECONDS", 0.02)
    installed.desk.store.now()
    other = sqlite3.connect(tmp_path / "guard.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with pytest.raises(StoreUnavailable):
        Guard(installed.desk).begin(ASKED)

    other.close()
    assert (installed.desk.calls, installed.desk.open) == ({}, {})


def test_a_capture_that_is_guarded_alone_leaves_no_call_behind(
    guarded: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = guarded(limits=["$1/day global"], on_store_failure="allow")
    monkeypatch.setattr(sqlite, "LOCK_WAIT_SECONDS", 0.02)
    installed.desk.store.now()
    other = sqlite3.connect(tmp_path / "guard.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    exchange: Any = Guard(installed.desk).begin(ASKED)
    Guard(installed.desk).finish(exchange, None, status=500, ending="complete")

    other.close()
    assert exchange.alone
    assert (installed.desk.calls, installed.desk.open) == ({}, {})


def test_a_refused_capture_leaves_no_call_behind(guarded: Install) -> None:
    installed = guarded(limits=["$0.000001/day global"])

    assert isinstance(Guard(installed.desk).begin(ASKED), Refusal)

    assert (installed.desk.calls, installed.desk.open) == ({}, {})


def test_an_exchange_that_is_finished_twice_is_booked_once(guarded: Install) -> None:
    installed = guarded(limits=["$1/day global"])
    exchange: Any = Guard(installed.desk).begin(ASKED)

    for _ in range(2):
        Guard(installed.desk).finish(exchange, None, status=500, ending="complete")

    installed.keeper.ledger.drain_all(installed.desk.store)
    assert [event["kind"] for event in installed.keeper.ledger.events()] == ["settle"]


def test_bytes_that_never_left_give_the_hold_back(guarded: Install) -> None:
    installed = guarded(limits=["$1/day global"])
    exchange: Any = Guard(installed.desk).begin(ASKED)

    Guard(installed.desk).finish(exchange, None, status=None, ending="not_sent")

    [balance] = installed.desk.store.balances("", 10)
    assert (balance.spent, balance.held) == (0, 0)


def test_a_connection_that_was_lost_books_the_hold(guarded: Install) -> None:
    installed = guarded(limits=["$1/day global"])
    exchange: Any = Guard(installed.desk).begin(ASKED)

    Guard(installed.desk).finish(exchange, None, status=None, ending="error")

    [balance] = installed.desk.store.balances("", 10)
    assert (balance.spent, balance.held) == (100 * 150 + 100 * 600, 0)


def test_a_block_is_refused_on_entry_and_leaves_nothing(guarded: Install) -> None:
    installed = guarded(limits=["1 requests/day per user"])
    with process.Guard().as_user(user="ada"):
        pass

    with pytest.raises(LimitExceeded, match="1 requests/day per user"), process.Guard().as_user(user="ada"):
        raise AssertionError("never entered")

    assert (installed.desk.calls, installed.desk.open) == ({}, {})


def test_blocks_of_two_users_have_budgets_of_their_own(guarded: Install) -> None:
    guarded(limits=["1 requests/day per user"])

    for user in ("ada", "bert"):
        with process.Guard().as_user(user=user) as call:
            assert call.principal.user == user


# ---------------------------------------------------------------- forks, and the end of the process


def run(script: str, tmp_path: Path) -> str:
    """Run a script of its own in a fresh process; gives what it printed."""
    head = f"""
        import os, sys
        from llm_guard_mw import process
        from llm_guard_mw.guard import Guard
        from llm_guard_mw.model import Asked
        where = "sqlite:///{tmp_path / "guard.db"}"
        config = {{"store": where, "ledger": where, "limits": ["$1/day global"], "lease_seconds": 60}}
        asked = Asked(api="openai.chat", provider="openai", model="gpt-4o-mini", input_tokens=100, cap=100)
    """
    text = textwrap.dedent(head) + textwrap.dedent(script)
    script_process = subprocess.Popen(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", text],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,  # its own group, so that a child that hangs ends with it
    )
    try:
        said, complained = script_process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(script_process.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
        script_process.communicate()
        raise
    assert (script_process.returncode, complained) == (0, "")
    return said


def test_a_forked_child_starts_with_nothing_open_and_works(tmp_path: Path) -> None:
    said = run(
        """
        guard = process.Guard(config)
        mine = guard.begin(asked)
        pid = os.fork()
        if pid == 0:
            desk = process.install().desk
            assert not desk.open and not desk.calls, "the parent's exchanges are the parent's"
            assert process.install().keeper._thread is None
            theirs = process.Guard().begin(asked)
            Guard(desk).finish(theirs, None, status=None, ending="error")
            process.uninstall()
            print("child", len(desk.open))
            sys.stdout.flush()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        guard.finish(mine, None, status=None, ending="error")
        print("parent", len(guard.desk.open))
        """,
        tmp_path,
    )

    assert said.split() == ["child", "0", "parent", "0"]
    store, ledger = open_store(f"sqlite:///{tmp_path / 'guard.db'}"), Ledger(f"sqlite:///{tmp_path / 'guard.db'}")
    found = verify(store, ledger)
    assert (found.ok, found.open_holds) == (True, 0), found.findings
    assert [event["kind"] for event in ledger.events()] == ["settle", "settle"]
    store.close()
    ledger.close()


def test_the_end_of_the_process_settles_and_drains(tmp_path: Path) -> None:
    run(
        """
        guard = process.Guard(config)
        guard.desk.settle_soon(guard.desk.finished(guard.begin(asked), None, status=None, ending="error"))
        """,
        tmp_path,
    )

    ledger = Ledger(f"sqlite:///{tmp_path / 'guard.db'}")
    assert [event["basis"] for event in ledger.events()] == ["held"]
    ledger.close()
