"""Time to the first chunk of a stream through the real SDKs: a bare client against a captured one, in turn."""

from __future__ import annotations

import asyncio
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from typing import Any

STREAMS = 200
WARM_UP = 20
WORDS = "Answer in 20 words."


def main() -> None:
    command = [sys.executable, "-m", "llm_guard_mw.cli.demo.standin", "--port", str(_port())]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as provider,
    ):
        try:
            assert provider.stdout is not None
            found = re.search(r"http://\S+", provider.stdout.readline())
            assert found is not None
            _guard(folder)
            _await_until_up(found[0])
            asyncio.run(_measure(found[0]))
        finally:
            provider.terminate()


def _port() -> int:
    from benchmarks.servers import free_port

    return free_port()


def _guard(folder: str) -> None:
    from llm_guard_mw import Guard

    where = f"sqlite:///{os.path.join(folder, 'guard.db')}"
    Guard(
        {
            "store": where,
            "ledger": where,
            "limits": ["$1000/day global", "1M tokens/minute global", "$500/month global"],
        }
    )


def _await_until_up(url: str) -> None:
    import socket

    host, _, port = url.removeprefix("http://").partition(":")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, int(port)), 0.2).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError("the stand-in did not come up")


async def _measure(url: str) -> None:
    import anthropic
    import openai

    from llm_guard_mw import capture

    sides: dict[str, tuple[Callable[[], Any], Callable[[Any], Awaitable[float]]]] = {
        "openai": (lambda: openai.AsyncOpenAI(api_key="x", base_url=url + "/v1"), _openai),
        "anthropic": (lambda: anthropic.AsyncAnthropic(api_key="x", base_url=url), _anthropic),
    }
    print(f"{'SDK':>10} {'bare ms':>8} {'captured ms':>12} {'difference ms':>14} {'p90 of it':>10}")
    for name, (client, first_chunk) in sides.items():
        bare, captured = client(), capture(client())
        for _ in range(WARM_UP):
            await first_chunk(bare)
            await first_chunk(captured)
        times: list[tuple[float, float]] = []
        for _ in range(STREAMS):
            times.append((await first_chunk(bare), await first_chunk(captured)))
        a, b = (statistics.median(side) for side in zip(*times, strict=True))
        differences = sorted(second - first for first, second in times)
        ninety = differences[len(differences) * 9 // 10]
        print(f"{name:>10} {a * 1e3:>8.2f} {b * 1e3:>12.2f} {(b - a) * 1e3:>14.2f} {ninety * 1e3:>10.2f}")


async def _openai(client: Any) -> float:
    begun = time.perf_counter()
    messages = [{"role": "user", "content": WORDS}]
    stream = await client.chat.completions.create(model="gpt-4o-mini", messages=messages, max_tokens=50, stream=True)
    return await _first(stream, begun)


async def _anthropic(client: Any) -> float:
    begun = time.perf_counter()
    messages = [{"role": "user", "content": WORDS}]
    stream = await client.messages.create(model="claude-haiku-4-5", messages=messages, max_tokens=50, stream=True)
    return await _first(stream, begun)


async def _first(stream: Any, begun: float) -> float:
    first = 0.0
    async for _ in stream:
        first = first or time.perf_counter() - begun
    return first


if __name__ == "__main__":
    main()
