"""The storm again, on a Redis that is killed in the middle and comes back with what its log kept."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator

import httpx2
import pytest

from llm_guard_mw.cli.demo.standin import StandIn
from tests.acceptance.conftest import Served, until
from tests.acceptance.test_acceptance import ASK, BUDGET, WHO, worth
from tests.model import servers

CALLS, BEFORE = 300, 1


@pytest.fixture
def server() -> Iterator[servers.Server]:
    if reason := servers.missing("valkey"):
        pytest.skip(reason)
    server = servers.Server("valkey", ("--appendonly", "yes")).start()
    yield server
    server.stop()


@pytest.fixture
def store_url(server: servers.Server) -> str:
    return server.url


def test_a_redis_that_is_killed_in_the_storm_and_reads_its_log_loses_no_money(
    serve: Callable[..., Served], provider: StandIn, server: servers.Server, figures: Callable[..., None]
) -> None:
    served = serve(3, limits='["$0.0015/day per tenant"]', lease_seconds="4")

    async def storm() -> list[int]:
        limits = httpx2.Limits(max_connections=CALLS, max_keepalive_connections=0)
        answered: list[int] = []
        some = asyncio.Event()
        async with httpx2.AsyncClient(base_url=served.url, headers=WHO, limits=limits, timeout=60) as client:

            async def call() -> None:
                answer = await client.post("/api/chat", json={"q": ASK, "standin": "first-byte-ms=30"})
                answered.append(answer.status_code)
                if len(answered) >= BEFORE:
                    some.set()

            calls = asyncio.gather(*[call() for _ in range(CALLS)])
            await some.wait()
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            await calls
        return answered

    answers = Counter(asyncio.run(storm()))
    verified = until(lambda: (found := served.verify()).open_holds == 0 and found, "nothing is held")
    with httpx2.Client(base_url=served.url, headers=WHO, timeout=60) as client:
        for _ in range(CALLS):
            if client.post("/api/chat", json={"q": ASK}).status_code == 429:
                break
    spent = worth(provider)
    finally_verified = until(lambda: (found := served.verify()).open_holds == 0 and found, "nothing is held")

    assert set(answers) <= {200, 429, 503}
    assert verified.ok, verified.findings
    assert finally_verified.ok, finally_verified.findings
    assert BUDGET * 9 // 10 <= spent <= BUDGET
    figures(
        "a Redis killed in the storm",
        granted=answers[200],
        refused=answers[429],
        turned_away=answers[503],
        sold=f"{spent / BUDGET:.1%}",
        booked_less_billed=served.spent("tenant=acme") - spent,
        drift=finally_verified.drift_nanos,
    )
