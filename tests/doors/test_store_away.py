"""A Redis that dies and comes back behind every door: who is let pass, what it costs, and that it is all booked."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llm_guard_mw import process
from llm_guard_mw.desk import Desk
from llm_guard_mw.errors import StoreUnavailable
from llm_guard_mw.stores import sqlite
from tests.doors.harness import (
    API_KEY,
    CANARY,
    PROMPT,
    Ask,
    AtOnce,
    Charge,
    Door,
    Meet,
    Raise,
    Record,
    Say,
    Sent,
    Wait,
    until,
)
from tests.model import servers
from tests.stores.faulty_proxy import FaultyProxy

Open = Callable[..., Door]

#: What two events have in common whose exchanges were alike.
ALIKE = (
    "tenant", "user", "tier", "feature", "route", "tags", "provider", "api", "requested_model", "model",
    "input_tokens", "output_tokens", "estimated_input_tokens", "estimated_output_tokens", "cost_nanos",
    "price_version", "basis", "exact", "status", "success", "error_type", "decision", "degraded",
)  # fmt: skip
RECORD = Record({"input_tokens": 10, "output_tokens": 20, "model": "gpt-4o-mini"})
WHO = {"headers": {"x-tenant-id": "acme", "x-metering-tags": '{"team":"search"}'}}


@pytest.fixture
def redis() -> Iterator[servers.Server]:
    """A server of the test's own, whose log is read again after a kill."""
    if reason := servers.missing("valkey"):
        pytest.skip(reason)
    # "everysec" puts the write off as well, while the disk is busy: then a kill would lose what was acknowledged.
    server = servers.Server("valkey", ("--appendonly", "yes", "--appendfsync", "always")).start()
    yield server
    server.stop()


@pytest.fixture
def opened(redis: servers.Server, door: Open) -> Open:
    """A door whose store is that server, and which lets calls pass while it is away."""

    def open_door(*steps: Any, **rest: Any) -> Door:
        handlers = {"/api/chat": list(steps) or [Ask()]}
        return door(handlers, **{"store": redis.url, "on_store_failure": "allow", "lease_seconds": 30, **rest})

    return open_door


def spool_of(door: Door) -> list[Path]:
    folder = door.installed.desk.spool.folder
    return sorted(folder.iterdir()) if folder.exists() else []


def replayed(door: Door) -> None:
    until(lambda: door.installed.desk.spool.is_empty, "the spool is settled")
    answering(door)


def answering(door: Door) -> None:
    def answers() -> bool:
        try:
            return door.installed.desk.store.now() > 0
        except StoreUnavailable:
            return False

    until(answers, "the store answers")


def spent(desk: Desk, what: str) -> int:
    return sum(state.spent for state in desk.store.balances("", 100) if what in state.balance)


# ---------------------------------------------------------------- the cap holds, the books are whole


def test_what_passes_while_redis_is_away_is_booked_as_if_it_had_been_there(opened: Open, redis: servers.Server) -> None:
    door = opened(limits=["$1/day per user", "40k tokens/minute per user", "100 requests/day per tenant"])
    door.request(**WHO)
    redis.kill()

    during = [door.request(**WHO) for _ in range(3)]
    redis.start()
    replayed(door)
    after = door.request(**WHO)

    assert [reply.status for reply in (*during, after)] == [200] * 4
    before, *others = door.settled()
    assert len(others) == 4
    assert {reply.call_id for reply in during} <= {row["call_id"] for row in others}
    for row in others:
        assert {name: row[name] for name in ALIKE} == {name: before[name] for name in ALIKE}
    assert spent(door.installed.desk, ":usd:") == 5 * before["cost_nanos"]
    assert spent(door.installed.desk, ":requests:") == 5
    assert spool_of(door) == []


@pytest.mark.parametrize(
    ("limit", "passed", "code"),
    [
        ("3 requests/day per user", 3, "rate_limited"),
        ("3 requests/hour per user", 3, "rate_limited"),
        ("$0.0001/day per user", 4, "budget_spent"),
        ("600 tokens/day per user", 4, "budget_spent"),
    ],
)
def test_past_its_amount_a_limit_refuses_as_ever_though_nobody_can_be_asked(
    opened: Open, redis: servers.Server, limit: str, passed: int, code: str
) -> None:
    door = opened(limits=[limit])
    redis.kill()

    replies = [door.request() for _ in range(12)]
    other = door.request(user="bob")
    redis.start()
    replayed(door)

    granted = [reply for reply in replies if reply.status == 200]
    refused = replies[-1]
    assert 1 <= len(granted) < 12
    if "requests" in limit:
        assert len(granted) == passed
    assert refused.status == 429
    assert refused.json()["code"] == code
    assert refused.json()["limit"] == limit
    assert refused.json()["reset_at"] is not None
    assert int(refused.headers["retry-after"]) >= 1
    assert "ratelimit-policy" in refused.headers
    assert other.status == 200
    door.installed.desk.flush_refusals()
    assert sum(row["count"] for row in door.events("refused")) == len(replies) - len(granted)


def test_a_call_past_the_concurrency_of_its_process_is_refused(opened: Open, redis: servers.Server) -> None:
    door = opened(Meet(), Wait(), limits=["1 concurrent per user"])
    redis.kill()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(door.request)
        assert door.met.wait(10)

        second = door.request()
        door.gate.set()
        first = waiting.result(20)
    third = door.request()
    redis.start()
    replayed(door)

    assert (first.status, third.status) == (200, 200)
    assert (second.status, second.json()["code"]) == (429, "concurrency")


@pytest.mark.parametrize(
    ("steps", "ended"),
    [
        ([Ask()], ["settle exact"]),
        ([Ask(stream=True)], ["settle exact"]),
        ([AtOnce([Ask(), Ask()])], ["settle exact", "settle exact"]),
        ([RECORD], ["settle exact"]),
        ([Charge(5)], ["settle counted", "settle exact"]),
        ([Say(status=404)], ["release exact"]),
        ([Raise()], ["settle held"]),
    ],
)
def test_each_way_to_end_is_booked_as_it_would_have_been(
    opened: Open, redis: servers.Server, steps: list[Any], ended: list[str]
) -> None:
    door = opened(*steps, limits=["$1/day per user", "50 credits/day per user"])
    door.request()
    usual = [(row["kind"], row["basis"], row["cost_nanos"], row["credits"]) for row in door.events()]
    redis.kill()

    door.request()
    redis.start()
    replayed(door)

    rows = [(row["kind"], row["basis"], row["cost_nanos"], row["credits"]) for row in door.events()]
    assert sorted(f"{row[0]} {row[1]}" for row in usual) == ended
    assert sorted(map(str, rows)) == sorted(map(str, usual + usual))


def test_an_exchange_that_redis_had_granted_is_settled_when_it_is_back(opened: Open, redis: servers.Server) -> None:
    door = opened(Ask(), Meet(), Wait(), Ask(), limits=["$1/day per user"])
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(door.request)
        assert door.met.wait(10)
        redis.kill()
        door.gate.set()
        reply = waiting.result(20)
    redis.start()
    replayed(door)

    assert reply.status == 200
    rows = door.settled()
    assert [row["basis"] for row in rows] == ["exact", "exact"]
    assert spent(door.installed.desk, ":usd:") == sum(row["cost_nanos"] for row in rows)


def test_redis_is_used_again_within_about_a_second(opened: Open, redis: servers.Server) -> None:
    door = opened(limits=["$1/day per user"])
    redis.kill()
    door.request()
    redis.start()
    back = time.monotonic()

    while door.installed.desk.store.engine.breaker.error is not None:  # type: ignore[attr-defined] # of a RedisStore
        assert time.monotonic() - back < 5, "it is never used again"
        time.sleep(0.01)

    assert time.monotonic() - back < 2.5
    assert door.request().status == 200
    replayed(door)


# ---------------------------------------------------------------- what may have been done, and was not heard of


@pytest.fixture
def proxy(redis: servers.Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(redis.port) as proxy:
        yield proxy


def test_a_grant_whose_reply_was_lost_is_given_back_and_counted_once(proxy: FaultyProxy, opened: Open) -> None:
    door = opened(store=proxy.url, limits=["$1/day per user"])
    door.request()
    proxy.faults.lose_every = 1

    reply = door.request()
    proxy.faults.lose_every = 0
    replayed(door)
    rows = door.settled()

    assert reply.status == 200
    assert [row["basis"] for row in rows] == ["exact", "exact"]


def test_under_deny_a_grant_whose_reply_was_lost_is_given_back_as_well(proxy: FaultyProxy, opened: Open) -> None:
    door = opened(store=proxy.url, limits=["$1/day per user"], on_store_failure="deny")
    door.request()
    proxy.faults.lose_every = 1

    reply = door.request()
    proxy.faults.lose_every = 0
    answering(door)
    rows = door.settled()

    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    assert len(rows) == 1


@pytest.mark.parametrize("every", [2, 3])
def test_over_a_link_that_goes_on_losing_replies_each_call_is_booked_once(
    proxy: FaultyProxy, opened: Open, every: int
) -> None:
    door = opened(store=proxy.url, limits=["$1/day per user", "40k tokens/minute per user"])
    door.request()
    proxy.faults.lose_every = every

    replies = [reply for _ in range(5) for reply in door.together(*[Sent() for _ in range(6)])]
    proxy.faults.lose_every = 0
    replayed(door)
    rows = door.settled()

    assert proxy.lost > 0
    assert [reply.status for reply in replies] == [200] * 30
    assert sorted((row["input_tokens"], row["output_tokens"]) for row in rows) == sorted(door.served())
    assert spent(door.installed.desk, ":usd:") == sum(row["cost_nanos"] for row in rows)


# ---------------------------------------------------------------- the end of a process


@pytest.mark.parametrize("rule", ["allow", "deny"])
def test_what_redis_did_not_take_before_the_process_ended_is_settled_by_the_next(
    opened: Open, redis: servers.Server, rule: str
) -> None:
    door = opened(Meet(), Wait(), RECORD, limits=["$1/day per user"], on_store_failure=rule)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(door.request)
        assert door.met.wait(10)
        redis.kill()
        door.gate.set()
        waiting.result(20)
    if rule == "allow":
        door.request()
    config = door.installed.config
    process.uninstall()
    left = spool_of(door)
    modes = [path.stat().st_mode & 0o777 for path in (*left, left[0].parent)]
    redis.start()

    door.installed = process.install(config)
    door.installed.keeper.start()
    until(lambda: not spool_of(door), "the next process has settled it")

    assert modes == [0o600, 0o700]
    secrets = [secret.encode() for secret in (CANARY, API_KEY, PROMPT)]
    assert not any(secret in b"".join(path.read_bytes() for path in left if path.exists()) for secret in secrets)
    assert [row["basis"] for row in door.settled()] == ["exact"] * (2 if rule == "allow" else 1)


# ---------------------------------------------------------------- when it could not be booked


def test_without_room_in_the_spool_a_call_is_refused_as_under_deny(opened: Open, redis: servers.Server) -> None:
    door = opened(limits=["$1/day per user"])
    redis.kill()
    assert door.request().status == 200
    door.installed.desk.spool.bytes_max = 1000

    full = door.request()
    redis.start()
    replayed(door)

    assert (full.status, full.headers["retry-after"]) == (503, "1")
    assert door.request().status == 200


def test_a_folder_that_cannot_be_written_refuses_as_under_deny(opened: Open, redis: servers.Server) -> None:
    door = opened(limits=["$1/day per user"])
    redis.kill()
    door.installed.desk.spool.folder.write_text("a file is in its place")

    reply = door.request()
    door.installed.desk.spool.folder.unlink()
    redis.start()
    answering(door)

    assert (reply.status, reply.headers["retry-after"]) == (503, "1")


def test_while_observing_a_call_passes_even_if_it_cannot_be_booked(opened: Open, redis: servers.Server) -> None:
    door = opened(limits=["1 requests/day per user"], mode="observe", on_store_failure="deny")
    redis.kill()

    counted = [door.request().status for _ in range(2)]
    door.installed.desk.spool.bytes_max = 1000
    uncounted = door.request().status
    redis.start()
    replayed(door)

    assert [*counted, uncounted] == [200, 200, 200]
    assert len(door.settled()) == 2


def test_under_deny_each_call_is_a_503(opened: Open, redis: servers.Server) -> None:
    door = opened(limits=["$1/day per user"], on_store_failure="deny")
    redis.kill()

    replies = [door.request() for _ in range(3)]
    redis.start()
    answering(door)

    assert [(reply.status, reply.headers["retry-after"]) for reply in replies] == [(503, "1")] * 3
    assert spool_of(door) == []


# ---------------------------------------------------------------- SQLite


@pytest.fixture
def on_sqlite(door: Open, tmp_path: Path) -> Open:
    """A door on a SQLite store of its own, with the books beside it."""

    def open_door(**rest: Any) -> Door:
        where = f"sqlite:///{tmp_path / 'store.db'}"
        return door({"/api/chat": [Ask()]}, store=where, on_store_failure="allow", **rest)

    return open_door


def test_a_locked_file_lets_calls_pass_and_books_them_later(
    on_sqlite: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = on_sqlite(limits=["$1/day per user", "2 requests/day per user"])
    door.installed.desk.store.now()
    other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with monkeypatch.context() as impatience:
        impatience.setattr(sqlite, "LOCK_WAIT_SECONDS", 0.05)

        replies = [door.request() for _ in range(3)]
    other.execute("ROLLBACK")
    other.close()
    replayed(door)

    assert [reply.status for reply in replies] == [200, 200, 429]
    assert len(door.settled()) == 2
    assert spent(door.installed.desk, ":requests:") == 2


def test_a_full_disk_lets_calls_pass_as_long_as_the_spool_lies_on_another(on_sqlite: Open) -> None:
    door = on_sqlite(limits=["$1/day per user"])
    door.request()
    engine = door.installed.desk.store.engine  # type: ignore[attr-defined] # of a SQLiteStore

    def limit(pages: int) -> Callable[..., Any]:
        return lambda db, _now: db.execute(f"PRAGMA max_page_count = {pages}").fetchone()

    engine.run(limit(1))  # no page more than there are
    replies = [door.request() for _ in range(30)]
    alone = [reply for reply in replies if reply.status == 200]
    waiting = spool_of(door)
    engine.run(limit(0x3FFFFFFF))
    replayed(door)

    assert len(alone) == 30
    assert waiting, "the disk was never full"
    assert len(door.settled()) == 31
