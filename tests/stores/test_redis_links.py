"""What the network does to the Redis store, and what becomes of the account: nothing that was not meant."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvloop
from msgspec import structs

from llm_guard_mw.errors import StoreUnavailable
from llm_guard_mw.model import EntryKind
from llm_guard_mw.stores import redis_client, redis_steps
from llm_guard_mw.stores.protocol import Granted, Refused, Settled, Settlement
from llm_guard_mw.stores.redis import AsyncRedisStore, RedisStore
from llm_guard_mw.stores.redis_address import TIMEOUT_SECONDS
from tests.model import servers
from tests.model.world import MINUTE, dollars, offer, prepaid, requests, settled, settlement, wish
from tests.stores.faulty_proxy import FaultyProxy


@pytest.fixture
def store(proxy: FaultyProxy) -> Iterator[RedisStore]:
    """The store under test, behind the proxy."""
    store = RedisStore(proxy.url)
    yield store
    store.close()


@pytest.fixture
def direct(server: servers.Server) -> Iterator[RedisStore]:
    """The same contents without the proxy: to see what has become of them."""
    store = RedisStore(server.url)
    yield store
    store.close()


def granted(outcome: object) -> Granted:
    assert isinstance(outcome, Granted), outcome
    return outcome


def account(store: RedisStore, balance: str) -> tuple[int, int]:
    (state,) = store.peek([balance])
    return state.spent, state.held


def gone(store: RedisStore) -> bool:
    """Whether the store says that it is away."""
    try:
        store.journal_length()
    except StoreUnavailable:
        return True
    return False


# ---------------------------------------------------------------- lost replies


def test_when_every_third_reply_is_lost_the_sums_are_right_to_the_unit(
    store: RedisStore, direct: RedisStore, proxy: FaultyProxy
) -> None:
    proxy.faults.lose_every = 3

    for number in range(60):
        held = granted(store.reserve(wish(f"c{number}/1", offer(prepaid("pot", 10**6, 100), requests("rpm", 10**6)))))
        store.settle(settled(f"c{number}/1", held, {"pot": number}))

    assert proxy.lost >= 40
    assert account(direct, "pot") == (sum(range(60)), 0)
    assert len(direct.read_journal("", 1000)) == 60
    assert direct.holds("", 10) == ()


def test_tasks_whose_replies_are_lost_are_booked_once_too(
    store: RedisStore, direct: RedisStore, proxy: FaultyProxy
) -> None:
    proxy.faults.lose_every = 3

    async def one(face: AsyncRedisStore, number: int) -> None:
        held = granted(await face.reserve(wish(f"c{number}/1", offer(prepaid("pot", 10**6, 100)))))
        await face.settle(settled(f"c{number}/1", held, {"pot": number}))

    async def some() -> None:
        face = store.async_face()
        for start in range(0, 120, 4):
            await asyncio.gather(*(one(face, number) for number in range(start, start + 4)))

    asyncio.run(some())

    assert proxy.lost >= 10
    assert account(direct, "pot") == (sum(range(120)), 0)
    assert len(direct.read_journal("", 1000)) == 120


def test_a_lost_expiry_books_each_hold_once(store: RedisStore, direct: RedisStore, proxy: FaultyProxy) -> None:
    direct.reserve(wish("warm/1", offer(prepaid("pot", 1000, 7)), lease_ms=-1))
    assert direct.expire() == 1  # the server knows the script
    for number in range(5):
        direct.reserve(wish(f"c{number}/1", offer(prepaid("pot", 1000, 7)), lease_ms=-1))
    proxy.faults.lose_every = 1

    with pytest.raises(StoreUnavailable):
        store.expire()

    assert account(direct, "pot") == (42, 0)
    assert [entry.kind for entry in direct.read_journal("", 10)] == [EntryKind.ABANDONED] * 6


# ---------------------------------------------------------------- links that go away


def test_a_connection_that_was_cut_while_idle_is_no_matter(store: RedisStore, proxy: FaultyProxy) -> None:
    store.journal_length()
    proxy.reset()

    assert store.journal_length() == 0
    assert proxy.links == 2


def test_a_link_that_was_cut_while_idle_is_no_matter(store: RedisStore, proxy: FaultyProxy) -> None:
    async def two() -> None:
        face = store.async_face()
        await face.close_call("c")
        proxy.reset()
        await face.close_call("c")

    asyncio.run(two())

    assert proxy.links == 2


def test_killed_links_fail_nobody_who_is_under_way(
    store: RedisStore, direct: RedisStore, server: servers.Server
) -> None:
    async def one(face: AsyncRedisStore, number: int) -> None:
        for turn in range(20):
            name = f"c{number}-{turn}/1"
            held = granted(await face.reserve(wish(name, offer(prepaid("pot", 10**6, 3)))))
            await face.settle(settled(name, held))

    async def storm() -> None:
        face = store.async_face()
        callers = asyncio.gather(*(one(face, number) for number in range(20)))
        with server.client() as client:
            for _ in range(5):
                await asyncio.sleep(0.01)
                await asyncio.to_thread(client.client_kill_filter, _type="normal", skipme=True)
        await callers

    asyncio.run(storm())

    assert account(direct, "pot") == (20 * 20 * 3, 0)


def test_a_silent_server_costs_the_first_caller_the_timeout_and_the_next_ones_nothing(
    store: RedisStore, proxy: FaultyProxy
) -> None:
    store.journal_length()
    proxy.faults.silent = True

    began = time.monotonic()
    assert gone(store)
    first = time.monotonic() - began
    began = time.monotonic()
    for _ in range(200):
        assert gone(store)
    next_ones = (time.monotonic() - began) / 200

    assert first < 4 * TIMEOUT_SECONDS
    assert next_ones < 0.001


def test_a_server_that_is_not_there_costs_under_a_millisecond_after_the_first(
    server: servers.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RedisStore(f"redis://127.0.0.1:{servers.free_port()}")
    monkeypatch.setattr(redis_client, "REST_SECONDS", 60.0)

    async def many() -> float:
        face = store.async_face()
        with pytest.raises(StoreUnavailable, match="Connection"):
            await face.close_call("c")
        began = time.monotonic()
        for _ in range(200):
            with pytest.raises(StoreUnavailable):
                await face.close_call("c")
        return (time.monotonic() - began) / 200

    assert asyncio.run(many()) < 0.001
    store.close()


def test_a_server_that_came_back_is_used_again(store: RedisStore, proxy: FaultyProxy) -> None:
    proxy.faults.silent = True
    assert gone(store)
    proxy.faults.silent = False

    began = time.monotonic()
    while gone(store):
        assert time.monotonic() - began < 5

    assert time.monotonic() - began < 2
    assert not gone(store)


@pytest.mark.parametrize("fault", ["silent", "port closed"])
def test_while_redis_is_away_no_caller_is_the_one_who_looks_again(
    store: RedisStore, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(redis_client, "REST_SECONDS", 0.05)
    lookers: list[str] = []

    def look() -> None:
        lookers.append(threading.current_thread().name)
        store.engine.pool.look()

    store.engine.breaker._look = look
    store.journal_length()
    proxy.faults.silent = fault == "silent"
    if fault == "port closed":
        proxy.__exit__()
    assert gone(store)

    while len(lookers) < 4:
        assert gone(store)

    assert set(lookers) == {"llm-guard-breaker"}


def test_a_closed_store_looks_no_more(store: RedisStore, proxy: FaultyProxy) -> None:
    proxy.faults.silent = True
    assert gone(store)

    store.close()

    assert store.engine.breaker.error is None
    proxy.faults.silent = False
    assert not gone(store)


# ---------------------------------------------------------------- who waits


def test_tasks_of_one_turn_ride_in_one_write(store: RedisStore, proxy: FaultyProxy) -> None:
    async def many() -> int:
        face = store.async_face()
        await face.reserve(wish("first/1", offer(prepaid("pot", 10**6, 1))))
        before = proxy.writes
        wishes = (wish(f"c{number}/1", offer(prepaid("pot", 10**6, 1))) for number in range(50))
        await asyncio.gather(*(face.reserve(each) for each in wishes))
        return proxy.writes - before

    assert asyncio.run(many()) <= 3  # one, but for what TCP makes of it
    assert proxy.links == 1


def test_a_cancelled_waiter_does_not_shift_the_replies_of_others(store: RedisStore, proxy: FaultyProxy) -> None:
    async def many() -> list[Granted]:
        face = store.async_face()
        await face.close_call("warm")
        proxy.faults.delay = 0.02
        tasks = [
            asyncio.create_task(face.reserve(wish(f"c{n}/1", offer(prepaid(f"pot-{n}", 10**6, n + 1)))))
            for n in range(40)
        ]
        await asyncio.sleep(0.005)
        for task in tasks[::2]:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes[::2])
        return [granted(outcome) for outcome in outcomes[1::2]]

    outcomes = asyncio.run(many())

    assert [(each.lines[0].balance, each.lines[0].amount) for each in outcomes] == [
        (f"pot-{n}", n + 1) for n in range(1, 40, 2)
    ]


def test_what_a_cancelled_task_had_reserved_is_released_behind_it(
    store: RedisStore, direct: RedisStore, proxy: FaultyProxy
) -> None:
    async def give_up() -> None:
        face = store.async_face()
        await face.close_call("warm")
        proxy.faults.delay = 0.02
        task = asyncio.create_task(face.reserve(wish("c/1", offer(prepaid("pot", 100, 40)))))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        heard: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        store.settle_soon(settlement("c/1", (), store.clock() + MINUTE, kind=EntryKind.RELEASE), heard.set_result)
        assert await heard is None

    asyncio.run(give_up())

    assert account(direct, "pot") == (0, 0)
    assert direct.holds("", 10) == ()


def test_what_nobody_waits_for_is_said_again_when_its_reply_was_lost(
    store: RedisStore, direct: RedisStore, proxy: FaultyProxy
) -> None:
    async def many() -> list[tuple[Settlement, BaseException | None]]:
        face = store.async_face()
        wishes = [wish(f"c{number}/1", offer(prepaid("pot", 10**6, 100))) for number in range(30)]
        helds = [granted(await face.reserve(each)) for each in wishes]
        proxy.faults.lose_every = 3
        endings = []
        for number, (each, held) in enumerate(zip(wishes, helds, strict=True)):
            heard: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
            ending = settled(each.exchange, held, {"pot": number})
            store.settle_soon(ending, heard.set_result)
            endings.append((ending, await heard))
        return endings

    endings = asyncio.run(many())
    for ending, error in endings:
        if error is not None:  # the second reply was lost as well: its owner keeps it, and tries again
            assert direct.settle(ending) in (Settled.DONE, Settled.AGAIN)

    assert proxy.lost >= 5
    assert [error for _, error in endings].count(None) >= 20
    assert account(direct, "pot") == (sum(range(30)), 0)
    assert len(direct.read_journal("", 1000)) == 30


def test_what_nobody_waits_for_is_told_when_its_loop_ends_first(store: RedisStore, proxy: FaultyProxy) -> None:
    told: list[BaseException | None] = []

    async def leave() -> None:
        face = store.async_face()
        held = granted(await face.reserve(wish("c/1", offer(prepaid("pot", 100, 40)))))
        proxy.faults.silent = True
        store.settle_soon(settled("c/1", held), told.append)

    asyncio.run(leave())

    assert [type(error) for error in told] == [StoreUnavailable]
    assert "the event loop ended first" in str(told[0])


def test_what_cannot_be_said_is_told_to_its_owner_and_to_nobody_else(store: RedisStore) -> None:
    told: list[BaseException | None] = []

    async def say() -> int:
        face = store.async_face()
        held = granted(await face.reserve(wish("c/1", offer(prepaid("pot", 100, 40)))))
        store.settle_soon(structs.replace(settled("c/1", held), exchange="\ud800"), told.append)
        store.settle_soon(settled("c/1", held), told.append)
        return len(await asyncio.to_thread(store.read_journal, "", 10))

    entries = asyncio.run(say())

    assert [type(error) for error in told] == [UnicodeEncodeError, type(None)]
    assert entries == 1


def test_callers_beyond_the_pool_are_told_so(server: servers.Server, proxy: FaultyProxy) -> None:
    store = RedisStore(f"{proxy.url}?max_connections=1&timeout=0.5")
    store.journal_length()
    proxy.faults.delay = 0.4
    entered = threading.Barrier(4)

    def one() -> str:
        entered.wait()
        try:
            store.journal_length()
        except StoreUnavailable as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(lambda _: one(), range(4)))

    assert "" in told
    assert any("all 1 connections were busy" in each and "max_connections" in each for each in told)
    proxy.faults.delay = 0.0
    assert store.journal_length() == 0, "the pool is whole again, and no breaker opened"
    store.close()


def test_work_that_nobody_waits_for_is_done_and_told(store: RedisStore, direct: RedisStore) -> None:
    held = granted(store.reserve(wish("c/1", offer(prepaid("pot", 100, 40)))))
    told: list[BaseException | None] = []

    store.settle_soon(settled("c/1", held), told.append)
    store.append_soon("r/1/refused", b"{}", told.append)
    store.close_call_soon("c", told.append)
    store.close()

    assert told == [None, None, None]
    assert account(direct, "pot") == (40, 0)
    assert direct.journal_length() == 2


def test_work_that_nobody_waits_for_tells_when_it_failed(store: RedisStore, proxy: FaultyProxy) -> None:
    store.journal_length()
    proxy.faults.silent = True
    told: list[BaseException | None] = []

    store.append_soon("r/1/refused", b"{}", told.append)
    store.close()

    assert isinstance(told[0], StoreUnavailable)


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_a_loop_that_was_busy_does_not_blame_the_server(
    store: RedisStore, runner: Callable[[Coroutine[None, None, bool]], bool]
) -> None:
    async def busy() -> bool:
        face = store.async_face()
        await face.close_call("warm")
        call = asyncio.ensure_future(face.admit("parent", "tag:team", "red", 1, 5))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        time.sleep(2 * TIMEOUT_SECONDS)  # noqa: ASYNC251 - the app's own code blocks the loop
        return await call

    assert runner(busy())


# ---------------------------------------------------------------- scripts


def test_a_server_that_forgot_the_scripts_is_told_them_again(
    store: RedisStore, direct: RedisStore, server: servers.Server
) -> None:
    async def many() -> None:
        face = store.async_face()
        with server.client() as client:
            for start in range(0, 60, 20):
                client.script_flush()
                wishes = (wish(f"c{n}/1", offer(prepaid("pot", 10**6, 1))) for n in range(start, start + 20))
                await asyncio.gather(*(face.reserve(each) for each in wishes))

    asyncio.run(many())
    with server.client() as client:
        client.script_flush()

    assert store.settle(settlement("c1/1", (), store.clock(), kind=EntryKind.RELEASE)) is Settled.DONE
    assert account(direct, "pot") == (0, 59)


def test_more_principals_than_are_remembered_are_served_as_well(
    store: RedisStore, direct: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_steps, "_LAYOUTS_MAX", 8)

    for turn in range(2):
        for user in range(20):
            name = f"c{turn}-{user}/1"
            held = granted(store.reserve(wish(name, offer(prepaid(f"user={user}|pot", 100, 10)))))
            store.settle(settled(name, held, {f"user={user}|pot": user}))

    assert len(store.steps._layouts) == 8
    assert [account(direct, f"user={user}|pot") for user in range(20)] == [(2 * user, 0) for user in range(20)]


def test_holds_with_more_balances_than_lua_has_room_for_are_booked(store: RedisStore) -> None:
    for number in range(100):
        pots = (prepaid(f"user={number}|pot-{each}", 100, 1) for each in range(90))
        store.reserve(wish(f"c{number}/1", offer(*pots), lease_ms=-1))

    assert store.expire() == 100

    assert store.holds("", 10) == ()


def test_a_full_journal_refuses_reserves_and_takes_settlements(server: servers.Server) -> None:
    store = RedisStore(server.url, journal_max=10)
    held = granted(store.reserve(wish("c/1", offer(prepaid("pot", 100, 1)))))
    for number in range(9):
        store.append(f"r/{number}/refused", b"{}")

    with pytest.raises(StoreUnavailable, match="journal is nearly full"):
        store.reserve(wish("d/1", offer(prepaid("pot", 100, 1))))

    assert store.settle(settled("c/1", held)) is Settled.DONE
    assert isinstance(store.reserve(wish("c/2", offer(dollars("day", 0, 1)), not_after=0)), object)
    store.close()


# ---------------------------------------------------------------- threads, loops, forks


def test_one_budget_is_shared_by_threads_and_loops(server: servers.Server, direct: RedisStore) -> None:
    store = RedisStore(server.url)

    def in_a_thread(number: int) -> int:
        outcomes = [store.reserve(wish(f"t{number}-{n}/1", offer(prepaid("pot", 1000, 10)))) for n in range(20)]
        return sum(isinstance(outcome, Granted) for outcome in outcomes)

    def in_a_loop(number: int) -> int:
        async def many() -> int:
            face = store.async_face()
            wishes = (wish(f"l{number}-{n}/1", offer(prepaid("pot", 1000, 10))) for n in range(20))
            outcomes = await asyncio.gather(*(face.reserve(each) for each in wishes))
            assert all(isinstance(outcome, Granted | Refused) for outcome in outcomes)
            return sum(isinstance(outcome, Granted) for outcome in outcomes)

        return asyncio.run(many())

    with ThreadPoolExecutor(8) as pool:
        sold = sum(pool.map(lambda n: in_a_loop(n) if n % 2 else in_a_thread(n), range(12)))

    assert sold == 100
    assert account(direct, "pot") == (0, 1000)
    store.close()


def test_a_forked_child_opens_its_own_connections(store: RedisStore, proxy: FaultyProxy) -> None:
    store.append("r/0/refused", b"{}")

    child = os.fork()
    if child == 0:
        try:
            store.append("r/1/refused", b"{}")
            told: list[BaseException | None] = []
            store.append_soon("r/2/refused", b"{}", told.append)
            store.close()
            os._exit(0 if told == [None] else 1)
        except BaseException:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    store.append("r/3/refused", b"{}")

    assert os.waitstatus_to_exitcode(status) == 0
    assert store.journal_length() == 4
    assert proxy.links == 2
