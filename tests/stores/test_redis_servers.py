"""What becomes of the account when the server itself goes: a restart from its log, a failover, and the way of the
journal into the ledger."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llm_guard_mw.errors import StoreUnavailable
from llm_guard_mw.ledger import Ledger, verify
from llm_guard_mw.stores.protocol import Granted, Store
from llm_guard_mw.stores.redis import RedisStore
from llm_guard_mw.stores.redis_steps import Talk
from tests.ledger.bench import DAY_BUDGET, Bench, released_one
from tests.model import servers
from tests.model.world import LEASE, Clock, offer, prepaid, settled, wish


def patiently(attempt: Callable[[], object], seconds: float = 20) -> object:
    """What the keeper does: ask again, since every verb may be said twice, until the store is back."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return attempt()
        except StoreUnavailable:
            assert time.monotonic() < deadline
            time.sleep(0.02)


# ---------------------------------------------------------------- a restart


@pytest.mark.parametrize("leg", servers.LEGS)
def test_a_server_that_was_killed_and_read_its_log_again_has_lost_nothing(leg: str, tmp_path: Path) -> None:
    if reason := servers.missing(leg):
        pytest.skip(reason)
    server = servers.Server(leg, ("--appendonly", "yes", "--appendfsync", "always")).start()
    store = RedisStore(server.url)
    held = [store.reserve(wish(f"c{number}/1", offer(prepaid("pot", 10**6, 7)))) for number in range(50)]
    for number in range(30):
        outcome = held[number]
        assert isinstance(outcome, Granted)
        store.settle(settled(f"c{number}/1", outcome))
    before = _contents(store)

    server.kill()
    with pytest.raises(StoreUnavailable):
        store.journal_length()
    server.start()

    assert patiently(lambda: _contents(store)) == before
    assert before[0][0].spent == 210
    store.close()
    server.stop()


def _contents(store: Store) -> tuple[object, ...]:
    return store.balances("", 100), store.holds("", 100), store.read_journal("", 100), store.epoch()


# ---------------------------------------------------------------- a failover


@pytest.fixture
def sentinel() -> Iterator[tuple[str, servers.Server, servers.Server]]:
    """The URL of a watched pair, the master and its replica."""
    if reason := servers.missing("valkey"):
        pytest.skip(reason)
    master = servers.Server("valkey").start()
    replica = servers.Server("valkey", ("--replicaof", "127.0.0.1", str(master.port))).start()
    watcher = servers.Server("valkey")
    config = watcher.folder / "sentinel.conf"
    config.write_text(
        f"sentinel monitor guarded 127.0.0.1 {master.port} 1\n"
        "sentinel down-after-milliseconds guarded 300\n"
        "sentinel failover-timeout guarded 3000\n"
    )
    watcher.start(str(config), "--sentinel")
    _until(lambda: _replicas(watcher) == 1 and _in_step(replica))
    yield f"redis+sentinel://127.0.0.1:{servers.free_port()},127.0.0.1:{watcher.port}/guarded", master, replica
    for each in (watcher, replica, master):
        each.stop()


def _replicas(watcher: servers.Server) -> int:
    with watcher.client() as client:
        return int(client.sentinel_master("guarded")["num-slaves"])


def _in_step(replica: servers.Server) -> bool:
    with replica.client() as client:
        return bool(client.info("replication")["master_link_status"] == "up")


def _until(true: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_after_a_failover_both_faces_go_on_at_the_new_master(
    sentinel: tuple[str, servers.Server, servers.Server],
) -> None:
    url, master, replica = sentinel
    store = RedisStore(url)
    held = store.reserve(wish("c/1", offer(prepaid("pot", 100, 7))))
    assert isinstance(held, Granted)

    async def across(face_after: Callable[[], object]) -> object:
        face = store.async_face()
        assert isinstance(await face.reserve(wish("d/1", offer(prepaid("pot", 100, 7)))), Granted)
        await asyncio.to_thread(face_after)
        deadline = time.monotonic() + 20
        while True:
            try:
                return await face.settle(settled("c/1", held))
            except StoreUnavailable:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)

    def replicated_then_killed() -> None:
        with master.client() as client:
            client.wait(1, 5000)
        master.kill()

    asyncio.run(across(replicated_then_killed))

    patiently(lambda: store.settle(settled("d/1", held)))
    (state,) = store.peek(["pot"])
    assert (state.spent, state.held) == (14, 0)
    with replica.client() as client:
        assert client.role()[0] == b"master"
    store.close()


# ---------------------------------------------------------------- the books


@pytest.fixture(params=servers.LEGS)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    if reason := servers.missing(request.param):
        pytest.skip(reason)
    clock = Clock()
    store = RedisStore(servers.emptied(request.param).url, clock=clock)
    bench = Bench(clock, store, Ledger(f"sqlite:///{tmp_path}/books.db", timezone="UTC"))
    yield bench
    bench.close()


def test_the_journal_of_a_redis_is_drained_into_books_that_add_up(bench: Bench) -> None:
    for number in range(40):
        bench.exchange(cost_nanos=number)
    bench.refuse("refused")
    released_one(bench, "released/1")
    bench.hold("abandoned/1")
    bench.clock.forward(LEASE)

    found = verify(bench.store, bench.ledger)

    assert found.findings == ()
    assert bench.store.journal_length() == 0, "trimmed to what was committed"
    kinds = [row["kind"] for row in bench.rows("usage_events")]
    assert (kinds.count("settle"), kinds.count("abandoned"), kinds.count("release")) == (40, 1, 1)
    (state,) = bench.store.peek([DAY_BUDGET])
    assert state.spent == sum(range(40)) + 1000


def test_an_entry_that_cannot_be_read_is_put_aside_and_the_others_go_on(bench: Bench) -> None:
    bench.exchange()
    assert isinstance(bench.store, RedisStore)
    bench.store.append("foreign/1/refused", b"{not an event")
    bench.exchange()

    bench.drain()

    assert [row["id"] for row in bench.rows("dead_entries")] == ["foreign/1/refused"]
    assert len(bench.rows("usage_events")) == 2
    assert bench.store.journal_length() == 0


def test_money_that_is_held_for_nobody_is_found(bench: Bench) -> None:
    assert isinstance(bench.store, RedisStore)
    exchange, _ = bench.hold()
    bench.store.engine.run(_erase(bench.store, exchange))

    found = verify(bench.store, bench.ledger)

    assert {(finding["kind"], finding["balance"]) for finding in found.findings} >= {("held", DAY_BUDGET)}


def _erase(store: RedisStore, exchange: str) -> Talk[None]:
    """What no script would do: a hold goes, and its money stays."""
    yield [("DEL", store.steps.keys.exchange(exchange)), ("ZREM", store.steps.keys.due, exchange)]


def test_two_drainers_of_one_redis_write_each_row_once(bench: Bench, tmp_path: Path) -> None:
    for _ in range(120):
        bench.exchange()
    others = [Ledger(f"sqlite:///{tmp_path}/books.db", timezone="UTC") for _ in range(3)]

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda ledger: ledger.drain_all(bench.store), others))

    assert len(bench.rows("usage_events")) == 120
    assert bench.store.journal_length() == 0
    for each in others:
        each.close()
