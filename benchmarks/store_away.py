"""What a request costs while Redis is away: `python -m benchmarks.store_away`.

Two ways to be away: the port is closed, or somebody takes connections and never answers (a black hole). One exchange
is opened and closed by the guard, sync and async, one after the other: under "deny" it is refused (503), under
"allow" the process guards alone and writes its spool. The first one finds out and waits; then come many.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from llm_guard_mw import process
from llm_guard_mw.call import Exchange
from llm_guard_mw.errors import StoreUnavailable
from llm_guard_mw.guard import AsyncGuard, Guard
from llm_guard_mw.model import Asked
from tests.model import servers

EXCHANGES = 3000
ASKED = Asked(api="openai.chat", provider="openai", model="gpt-4o-mini", input_tokens=100, cap=100)
LIMITS = ["$1000/day global", "2000k tokens/minute global", "1_000_000 requests/day global"]


def main() -> None:
    logging.getLogger("llm_guard").setLevel(logging.CRITICAL)
    print(f"{'Redis':>11} {'rule':>6} {'face':>6} {'first ms':>9} {'median us':>10} {'p99 us':>8} {'max us':>8}")
    for away in (closed_port, black_hole):
        for rule in ("deny", "allow"):
            for face in ("sync", "async"):
                with away() as port, tempfile.TemporaryDirectory() as folder:
                    process.install(
                        {
                            "store": f"redis://127.0.0.1:{port}/0",
                            "ledger": f"sqlite:///{folder}/books.db",
                            "limits": LIMITS,
                            "on_store_failure": rule,
                        }
                    )
                    took = sync() if face == "sync" else asyncio.run(asynchronous())
                    process.uninstall()
                first, rest = took[0], sorted(took[1:])
                print(
                    f"{away.__name__.replace('_', ' '):>11} {rule:>6} {face:>6} {first * 1e3:>9.1f}"
                    f" {statistics.median(rest) * 1e6:>10.0f} {rest[len(rest) * 99 // 100] * 1e6:>8.0f}"
                    f" {rest[-1] * 1e6:>8.0f}"
                )


@contextmanager
def closed_port() -> Iterator[int]:
    yield servers.free_port()


@contextmanager
def black_hole() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listener:
        yield listener.getsockname()[1]


def sync() -> list[float]:
    guard = Guard(process.install().desk)
    took = []
    for _ in range(EXCHANGES):
        with suppress(StoreUnavailable), timed(took.append):
            exchange = guard.begin(ASKED)
            if isinstance(exchange, Exchange):
                guard.finish(exchange, None, status=500, ending="complete")
    return took


async def asynchronous() -> list[float]:
    guard = AsyncGuard(process.install().desk)
    took = []
    for _ in range(EXCHANGES):
        with suppress(StoreUnavailable), timed(took.append):
            exchange = await guard.begin(ASKED)
            if isinstance(exchange, Exchange):
                await guard.finish(exchange, None, status=500, ending="complete")
    return took


@contextmanager
def timed(note: Callable[[float], None]) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        note(time.perf_counter() - began)


if __name__ == "__main__":
    main()
