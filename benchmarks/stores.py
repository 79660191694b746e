"""Reserve + settle pairs of one process, at 1 and 64 concurrent callers, with 1, 3 and 10 limits: each store.

"bare" is the same number of round trips with the same bytes through the same link, to a script that does nothing.
"in the server" is what Redis itself says that a script took. Server and client have a core each, where there are two.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.servers import pin, redis
from llm_guard_mw.arithmetic import next_window, window_at
from llm_guard_mw.model import Demand, EntryKind, Kind, Offer, Unit, UsageEvent, Window
from llm_guard_mw.stores.journal import Estimate, encode_draft, encode_event
from llm_guard_mw.stores.protocol import AsyncStore, Granted, Moved, Reserve, Settlement
from llm_guard_mw.stores.redis import RedisStore
from llm_guard_mw.stores.redis_scripts import RESERVE, SCRIPTS, SETTLE, Script
from llm_guard_mw.stores.sqlite import SQLiteStore, wall_clock_ms
from tests.model import servers

CALLERS = (1, 64)
LIMITS = (1, 3, 10)
ROUNDS = 3
SECONDS = 1.5

NOTHING = Script("nothing", "return 1", "e0e1f9fabfc9d4800c877a703b823ac0578ff8db")


def main() -> None:
    pin(1)
    SCRIPTS[NOTHING.sha] = NOTHING
    print(f"{'store':>10} {'limits':>7} {'callers':>8} {'pairs/s':>9} {'CPU us':>8} {'of bare':>8}")
    for leg in servers.LEGS:
        if reason := servers.missing(leg):
            print(f"  ({reason})")
            continue
        with redis(leg, core=0) as server:
            for limits in LIMITS:
                for callers in CALLERS:
                    _redis(leg, server, limits, callers)
            for limits in LIMITS:
                reserve, settle = _in_the_server(server, limits)
                print(f"{leg:>10} {limits:>7}   in the server: reserve {reserve:.1f} us, settle {settle:.1f} us")
    for limits in LIMITS:
        for callers in CALLERS:
            with tempfile.TemporaryDirectory() as folder:
                store = SQLiteStore(Path(folder) / "store.db")
                rate, cpu = _median(asyncio.run(_pairs(store.async_face(), limits, callers)) for _ in range(ROUNDS))
                print(f"{'sqlite':>10} {limits:>7} {callers:>8} {rate:>9.0f} {cpu:>8.1f}")
                store.close()


def _redis(leg: str, server: servers.Server, limits: int, callers: int) -> None:
    """Both sides interleaved, round by round."""
    store = RedisStore(server.url + "?timeout=5")
    guarded: list[tuple[float, float]] = []
    bare: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        with server.client() as client:
            client.flushdb()
        bare.append(asyncio.run(_round_trips(store, limits, callers)))
        guarded.append(asyncio.run(_pairs(store.async_face(), limits, callers)))
    store.close()
    rate, cpu = _median(guarded)
    print(f"{leg:>10} {limits:>7} {callers:>8} {rate:>9.0f} {cpu:>8.1f} {rate / _median(bare)[0]:>8.2f}")


def _median(rounds: Iterator[tuple[float, float]] | list[tuple[float, float]]) -> tuple[float, float]:
    rates, costs = zip(*rounds, strict=True)
    return statistics.median(rates), statistics.median(costs)


# ---------------------------------------------------------------- the work


@dataclass(frozen=True)
class _Caller:
    """One user who keeps asking; what does not change from call to call is made once."""

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


async def _pairs(face: AsyncStore, limits: int, callers: int) -> tuple[float, float]:
    async def pair(caller: _Caller, number: int) -> None:
        wish = caller.wish(number)
        granted = await face.reserve(wish)
        assert isinstance(granted, Granted)
        await face.settle(caller.settlement(wish, granted))

    return await _measured(pair, limits, callers)


async def _round_trips(store: RedisStore, limits: int, callers: int) -> tuple[float, float]:
    """Two scripts that do nothing, of the same size."""
    made = [_caller(f"u{n}", limits) for n in range(callers)]
    said = {}
    for caller in made:
        wish = caller.wish(0)
        reserve = store.steps._reserve(wish, ())
        granted = Granted(0, 1024, (), (), 0, 0)
        settle = store.steps._settle(caller.settlement(wish, granted), (), False)
        said[caller.name] = [(command[0], NOTHING.sha, *command[2:]) for command in (reserve, settle)]

    async def pair(caller: _Caller, number: int) -> None:
        for command in said[caller.name]:
            await store.engine._aexchange([command])

    return await _measured(pair, limits, callers)


async def _measured(pair: object, limits: int, callers: int) -> tuple[float, float]:
    assert callable(pair)
    made = [_caller(f"u{n}", limits) for n in range(callers)]
    count = 0
    stamp = time.monotonic_ns()

    async def keep_asking(caller: _Caller, until: float) -> None:
        nonlocal count
        number = stamp
        while time.perf_counter() < until:
            number += 1
            await pair(caller, number)
            count += 1

    await asyncio.gather(*(keep_asking(caller, time.perf_counter() + 0.2) for caller in made))
    count, stamp = 0, time.monotonic_ns()
    gc.collect()
    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(keep_asking(caller, began + SECONDS) for caller in made))
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
