"""A Starlette route that answers 570 bytes without an upstream call: bare against guarded, three limits."""

from __future__ import annotations

import os
import statistics
import tempfile

from benchmarks import load
from benchmarks.servers import Server, serving

BODY = b'{"messages": [{"role": "user", "content": "' + b"hello " * 30 + b'"}], "max_tokens": 100}'
REQUEST = (
    b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nX-User-Id: user-1\r\nContent-Length: "
    + str(len(BODY)).encode()
    + b"\r\n\r\n"
    + BODY
)
CLIENTS = (1, 16, 64)
ROUNDS = 3
SECONDS = 2.0


def main() -> None:
    if hasattr(os, "sched_setaffinity") and (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(0, {1})
    with (
        tempfile.TemporaryDirectory() as folder,
        serving("benchmarks.apps:bare", core=0, cwd=folder) as bare,
        serving("benchmarks.apps:guarded", core=0, cwd=folder) as guarded,
    ):
        sides = {"bare": bare, "guarded": guarded}
        for server in sides.values():
            load.run(server.port, REQUEST, clients=8, seconds=1)
        print(f"{'clients':>8} {'side':>8} {'req/s':>9} {'CPU us':>8} {'p50 ms':>8} {'p99 ms':>8} {'of bare':>8}")
        for clients in CLIENTS:
            _compare(sides, clients)


def _compare(sides: dict[str, Server], clients: int) -> None:
    rates: dict[str, list[float]] = {name: [] for name in sides}
    costs: dict[str, list[float]] = {name: [] for name in sides}
    latencies: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, server in sides.items():
            cpu = server.cpu_seconds()
            result = load.run(server.port, REQUEST, clients=clients, seconds=SECONDS)
            assert set(result.statuses) == {200}, result.statuses
            rates[name].append(result.per_second)
            costs[name].append((server.cpu_seconds() - cpu) / result.answers * 1e6)
            latencies[name].extend(result.latencies)
    for name in sides:
        ordered = sorted(latencies[name])
        ratio = statistics.median(a / b for a, b in zip(rates[name], rates["bare"], strict=True))
        print(
            f"{clients:>8} {name:>8} {statistics.median(rates[name]):>9.0f} {statistics.median(costs[name]):>8.0f}"
            f" {ordered[len(ordered) // 2] * 1000:>8.2f} {ordered[len(ordered) * 99 // 100] * 1000:>8.2f}"
            f" {ratio:>8.2f}"
        )


if __name__ == "__main__":
    main()
