"""Where a guarded request's CPU goes, without sockets of HTTP: the ASGI app is called with scope, receive and send.

    python -m benchmarks.profile_request --at-once 64 --top 40 [--sort cumulative] [--store sqlite] [--out x.pstats]

First the CPU time a request, bare and guarded in turn and without a profile: of the thread that runs the event loop,
and of all threads together (the keeper's drain is the difference). Then the same guarded requests once more under
cProfile, which counts waits as well and makes small functions look dearer than they are: read ranks from it, not
sums. The store is real.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import gc
import itertools
import os
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from benchmarks import apps
from benchmarks.middleware import BODY
from benchmarks.servers import pin, redis
from llm_guard_mw.process import uninstall

HEADERS = [
    (b"host", b"x"),
    (b"content-type", b"application/json"),
    (b"x-user-id", b"user-1"),
    (b"content-length", str(len(BODY)).encode()),
]
WARM_UP = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000, help="in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=64, help="requests in flight")
    parser.add_argument("--store", choices=("redis", "sqlite"), default="redis")
    parser.add_argument("--sort", choices=("tottime", "cumulative", "ncalls"), default="tottime")
    parser.add_argument("--top", type=int, default=40, help="functions to show")
    parser.add_argument("--out", help="write the profile there as well, for pstats or a viewer")
    chosen = parser.parse_args()
    out = os.path.abspath(chosen.out) if chosen.out else None
    with ExitStack() as stack:
        stack.enter_context(contextlib.chdir(stack.enter_context(tempfile.TemporaryDirectory())))
        if chosen.store == "redis":
            os.environ["BENCH_STORE"] = stack.enter_context(redis(core=1)).url
        stack.callback(uninstall)  # before its store goes
        pin(0)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            profile = runner.run(_measure(chosen.requests, chosen.rounds, chosen.at_once))
        if out:
            profile.dump_stats(out)
        pstats.Stats(profile).strip_dirs().sort_stats(chosen.sort).print_stats(chosen.top)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvicorn's choice."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _measure(requests: int, rounds: int, at_once: int) -> cProfile.Profile:
    sides: dict[str, Any] = {"bare": apps.bare(), "guarded": apps.guarded()}
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for app in sides.values():
        await _ask(app, WARM_UP, at_once)
    for _ in range(rounds):
        for name, app in sides.items():
            gc.collect()
            loop, everything = time.thread_time(), time.process_time()
            await _ask(app, requests, at_once)
            took[name].append(
                ((time.thread_time() - loop) / requests * 1e6, (time.process_time() - everything) / requests * 1e6)
            )
    print(f"{at_once} at once, {rounds} rounds of {requests}: CPU us a request, medians")
    print(f"{'side':>8} {'loop':>8} {'all threads':>12}")
    for name, rows in took.items():
        loop, everything = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name:>8} {loop:>8.1f} {everything:>12.1f}")
    profile = cProfile.Profile()
    profile.enable()
    await _ask(sides["guarded"], requests, at_once)
    profile.disable()
    return profile


async def _ask(app: Any, requests: int, at_once: int) -> None:
    left = itertools.repeat(None, requests)

    async def keep_asking() -> None:
        for _ in left:
            await _one(app)

    await asyncio.gather(*(keep_asking() for _ in range(at_once)))


async def _one(app: Any) -> None:
    status = None

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/api/chat",
        "raw_path": b"/api/chat",
        "query_string": b"",
        "root_path": "",
        "headers": list(HEADERS),
        "client": ("127.0.0.1", 40_000),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    await app(scope, receive, send)
    assert status == 200, status


if __name__ == "__main__":
    main()
