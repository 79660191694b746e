"""Reserve + settle pairs of one process, with 1, 3 and 10 limits: each store, from tasks of a loop and from threads.

1,024 users take turns, each with a day's window, two buckets and (with 10 limits) balances of seven tags; every pair
writes its journal entry, and nobody drains it: a round begins with an empty store. Redis keeps nothing on disk.
The servers take turns, round by round, with "bare": as many round trips with the same bytes over the same link, to a
script that does nothing. "in the server" is what Redis itself says that a script took, and "CPU us" what a pair took
of this process, with the loop, the threads and the benchmark itself. Server and client have a core each, where there
are two.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextlib import closing as shutting
from dataclasses import dataclass
from itertools import cycle, islice
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.servers import pin, redis
from llm_guard_mw.arithmetic import next_window, window_at
from llm_guard_mw.model import Demand, EntryKind, Kind, Line, Offer, Unit, UsageEvent, Window
from llm_guard_mw.stores.journal import Estimate, encode_draft, encode_event
from llm_guard_mw.stores.protocol import AsyncStore, Granted, Moved, Reserve, Settlement
from llm_guard_mw.stores.redis import RedisStore
from llm_guard_mw.stores.redis_scripts import RESERVE, SCRIPTS, SETTLE, Script
from llm_guard_mw.stores.redis_steps import Spoken
from llm_guard_mw.stores.sqlite import SQLiteStore, wall_clock_ms
from tests.model import servers

LEGS = ("valkey", "redis7")
LIMITS = (1, 3, 10)
TASKS = (1, 64)
THREADS = (1, 16)
USERS = 1024
ROUNDS = 3
SECONDS = 0.8

NOTHING = Script("nothing", "return 1", "e0e1f9fabfc9d4800c877a703b823ac0578ff8db")


def main() -> None:
    pin(1)
    SCRIPTS[NOTHING.sha] = NOTHING
    with ExitStack() as closing:
        legs = {}
        for leg in LEGS:
            if reason := servers.missing(leg):
                print(f"  ({reason})")
            else:
                legs[leg] = closing.enter_context(redis(leg, core=0))
        print(f"{'store':>10} {'limits':>7} {'callers':>11} {'pairs/s':>9} {'CPU us':>8} {'of bare':>8}")
        for limits in LIMITS:
            for callers in TASKS:
                _tasks(legs, limits, callers)
            for callers in THREADS:
                _threads(legs, limits, callers)
        for limits in LIMITS:
            for leg, server in legs.items():
                reserve, settle = _in_the_server(server, limits)
                print(f"{leg:>10} {limits:>7}   in the server: reserve {reserve:.1f} us, settle {settle:.1f} us")
    for limits in LIMITS:
        for callers in TASKS:
            rounds = []
            for _ in range(ROUNDS):
                with TemporaryDirectory() as folder, shutting(SQLiteStore(Path(folder) / "store.db")) as store:
                    rounds.append(asyncio.run(_pairs(store.async_face(), limits, callers)))
            _print("sqlite", limits, f"{callers} tasks", rounds)


@contextmanager
def _emptied(server: servers.Server) -> Iterator[RedisStore]:
    with server.client() as client, shutting(RedisStore(server.url + "?timeout=5")) as store:
        client.flushdb()
        yield store


def _tasks(legs: Mapping[str, servers.Server], limits: int, callers: int) -> None:
    guarded: dict[str, list[tuple[float, float]]] = {leg: [] for leg in legs}
    bare: dict[str, list[tuple[float, float]]] = {leg: [] for leg in legs}
    for _ in range(ROUNDS):
        for leg, server in legs.items():
            with _emptied(server) as store:
                bare[leg].append(asyncio.run(_round_trips(store, limits, callers)))
                guarded[leg].append(asyncio.run(_pairs(store.async_face(), limits, callers)))
    for leg in legs:
        _print(leg, limits, f"{callers} tasks", guarded[leg], bare[leg])


def _threads(legs: Mapping[str, servers.Server], limits: int, callers: int) -> None:
    rounds: dict[str, list[tuple[float, float]]] = {leg: [] for leg in legs}
    for _ in range(ROUNDS):
        for leg, server in legs.items():
            with _emptied(server) as store:
                rounds[leg].append(_pairs_of_threads(store, limits, callers))
    for leg in legs:
        _print(leg, limits, f"{callers} threads", rounds[leg])


def _print(
    store: str,
    limits: int,
    callers: str,
    rounds: list[tuple[float, float]],
    bare: list[tuple[float, float]] | None = None,
) -> None:
    rate, cpu = (statistics.median(each) for each in zip(*rounds, strict=True))
    share = f"{rate / statistics.median(each for each, _ in bare):>8.2f}" if bare else ""
    print(f"{store:>10} {limits:>7} {callers:>11} {rate:>9.0f} {cpu:>8.1f} {share}")


# ---------------------------------------------------------------- the work


@dataclass(frozen=True)
class _Caller:
    """A user; what does not change from call to call is made once."""

    name: str
    offer: Offer
    draft: bytes
    payload: bytes

    def wish(self, number: int) -> Reserve:
        call = f"{self.name}-{number}"
        return Reserve(f"{call}/1", call, (self.offer,), 120_000, self.draft)

    def settlement(self, wish: Reserve, granted: Granted) -> Settlement:
        moved = tuple([Moved(line, line.amount) for line in granted.lines])
        return Settlement(wish.exchange, wish.call, EntryKind.SETTLE, granted.lease_end, moved, self.payload)


def _caller(name: str, limits: int) -> _Caller:
    offer = Offer("allow", "gpt-4o", _demands(name, limits), 1024, 256)
    event = UsageEvent(
        "0" * 32, 1, EntryKind.SETTLE, 0, tenant="acme", user=name, feature="chat", provider="openai", model="gpt-4o"
    )
    draft = encode_draft(event, [Estimate("allow", "gpt-4o", 570, 1_425_000, 10_000, "2026-11")])
    return _Caller(name, offer, draft, encode_event(event, held_nanos=11_665_000))


def _demands(user: str, limits: int) -> tuple[Demand, ...]:
    today = window_at("day", 1, "UTC", wall_clock_ms())
    days: tuple[Window, ...] = (today, next_window("day", 1, "UTC", today))
    own, plenty = f"tenant=acme&user={user}", 10**15
    demands = [
        Demand(f"{own}|calendar:usd:day:0:UTC:all", Kind.CALENDAR, Unit.USD, plenty, 1_425_000, 10_000, windows=days),
        Demand(
            f"{own}|bucket:tokens:60000:0::route%20chat",
            Kind.BUCKET,
            Unit.TOKENS,
            plenty,
            570,
            1,
            rate=40_000,
            period=60_000,
        ),
        Demand(
            f"{own}|bucket:requests:60000:0::route%20chat",
            Kind.BUCKET,
            Unit.REQUESTS,
            plenty,
            1,
            rate=20,
            period=60_000,
        ),
    ]
    for number in range(7):
        name = f"tenant=acme&tag:t{number}=x|calendar:usd:day:0:UTC:all"
        demands.append(Demand(name, Kind.CALENDAR, Unit.USD, plenty, 1_425_000, 10_000, windows=days))
    return tuple(demands[:limits])


def _callers(count: int, limits: int) -> list[Iterator[_Caller]]:
    """For each caller its users, over and over."""
    users = [_caller(f"u{number}", limits) for number in range(USERS)]
    return [cycle(users[number::count]) for number in range(count)]


async def _pairs(face: AsyncStore, limits: int, callers: int) -> tuple[float, float]:
    async def pair(caller: _Caller, number: int) -> None:
        wish = caller.wish(number)
        granted = await face.reserve(wish)
        assert isinstance(granted, Granted)
        await face.settle(caller.settlement(wish, granted))

    return await _measured(pair, limits, callers)


async def _round_trips(store: RedisStore, limits: int, callers: int) -> tuple[float, float]:
    """Two scripts that do nothing, of the same size."""
    said: dict[str, list[Spoken]] = {}

    async def pair(caller: _Caller, number: int) -> None:
        if caller.name not in said:
            wish = caller.wish(number)
            lines = tuple(Line(each.balance, each.kind, each.unit, 0, 1) for each in caller.offer.demands)
            settlement = caller.settlement(wish, Granted(0, 1024, lines, (), 0, 0))
            both = store.steps._reserve(wish, ()), store.steps._settle(settlement, settlement.moved, False)
            said[caller.name] = [
                Spoken(each.words.replace(each.sha.encode(), NOTHING.sha.encode()), NOTHING.sha) for each in both
            ]
        for words in said[caller.name]:
            await store.engine._aexchange([words])

    return await _measured(pair, limits, callers)


async def _measured(pair: Callable[[_Caller, int], Awaitable[None]], limits: int, callers: int) -> tuple[float, float]:
    """Pairs a second, and the CPU time (us) of each. All users are known before the clock runs."""
    count, number = 0, itertools.count(time.monotonic_ns())

    async def keep_asking(users: Iterable[_Caller], until: float) -> None:
        nonlocal count
        for user in users:
            if time.perf_counter() > until:
                return
            await pair(user, next(number))
            count += 1

    everybody = _callers(callers, limits)
    await asyncio.gather(*(keep_asking(islice(users, USERS // callers), inf) for users in everybody))
    count = 0
    gc.collect()
    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(keep_asking(users, began + SECONDS) for users in everybody))
    return count / (time.perf_counter() - began), (time.process_time() - cpu) / count * 1e6


def _pairs_of_threads(store: RedisStore, limits: int, callers: int) -> tuple[float, float]:
    number = itertools.count(time.monotonic_ns())

    def keep_asking(users: Iterable[_Caller], until: float) -> int:
        count = 0
        for user in users:
            if time.perf_counter() > until:
                break
            wish = user.wish(next(number))
            granted = store.reserve(wish)
            assert isinstance(granted, Granted)
            store.settle(user.settlement(wish, granted))
            count += 1
        return count

    everybody = _callers(callers, limits)
    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(lambda users: keep_asking(islice(users, USERS // callers), inf), everybody))
        gc.collect()
        began, cpu = time.perf_counter(), time.process_time()
        count = sum(pool.map(lambda users: keep_asking(users, began + SECONDS), everybody))
        return count / (time.perf_counter() - began), (time.process_time() - cpu) / count * 1e6


def _in_the_server(server: servers.Server, limits: int) -> tuple[float, float]:
    """Script times, while the client waits."""
    store = RedisStore(server.url + "?timeout=30")
    caller = _caller("alone", limits)
    took: dict[str, list[float]] = {RESERVE.name: [], SETTLE.name: []}
    for turn in range(5):
        wishes = [caller.wish(time.monotonic_ns() + n) for n in range(1000)]
        granted = _timed(server, store, [store.steps.reserve(wish) for wish in wishes], took[RESERVE.name], turn)
        endings = [caller.settlement(wish, each) for wish, each in zip(wishes, granted, strict=True)]
        _timed(server, store, [store.steps.settle(each) for each in endings], took[SETTLE.name], turn)
    store.close()
    return min(took[RESERVE.name]), min(took[SETTLE.name])


def _timed(server: servers.Server, store: RedisStore, talks: list, took: list[float], turn: int) -> list:  # type: ignore[type-arg]
    with server.client() as client:
        client.config_resetstat()
        results = store.engine._converse(talks)
        assert all(error is None for _, error in results), results[0]
        if turn:  # the first one loads the scripts
            took.append(client.info("commandstats")["cmdstat_evalsha"]["usec_per_call"])
    return [result for result, _ in results]


if __name__ == "__main__":
    print(__doc__)
    main()
