"""What the whole promises, with real processes: no overrun, nothing lost in a crash, the provider's numbers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from google import genai
from google.genai import types

from llm_guard_mw import capture, process
from llm_guard_mw.cli.demo.standin import StandIn
from llm_guard_mw.ledger import verify
from tests.acceptance.conftest import Served, until

#: google-genai subclasses aiohttp's session, which aiohttp warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning")

ASK = "Why is the sky blue? In 40 words please."
WHO = {"x-user-id": "ada", "x-tenant-id": "acme"}
BUDGET = 1_500_000


def worth(provider: StandIn) -> int:
    """What the provider would bill by its own list, in nano-dollars (gpt-4o-mini: $0.15 and $0.60 a million)."""
    return sum(row.input_tokens * 150 + row.output_tokens * 600 for row in provider.rows if row.status == 200)


@pytest.mark.parametrize(("server", "workers"), [("uvicorn", 3), ("gunicorn-sync", 4), ("gunicorn-gthread", 4)])
def test_300_concurrent_calls_never_overrun_a_tenants_budget_and_the_rest_is_sold(
    server: str, workers: int, serve: Callable[..., Served], provider: StandIn, figures: Callable[..., None]
) -> None:
    served = serve(workers, server=server, limits='["$0.0015/day per tenant"]')

    async def storm() -> list[int]:
        limits = httpx2.Limits(max_connections=300, max_keepalive_connections=0)
        async with httpx2.AsyncClient(base_url=served.url, headers=WHO, limits=limits, timeout=60) as client:

            async def call() -> int:
                answer = await client.post("/api/chat", json={"q": ASK, "standin": "first-byte-ms=30"})
                return answer.status_code

            return list(await asyncio.gather(*[call() for _ in range(300)]))

    began = time.monotonic()
    stormy = Counter(asyncio.run(storm()))
    lasted = time.monotonic() - began
    after_storm = worth(provider)
    sold_singly = 0
    with httpx2.Client(base_url=served.url, headers=WHO, timeout=60) as client:
        while (answer := client.post("/api/chat", json={"q": ASK})).status_code == 200:
            sold_singly += 1
            assert worth(provider) <= BUDGET

    spent = worth(provider)
    assert set(stormy) == {200, 429}
    assert 0 < after_storm <= spent <= BUDGET
    assert answer.status_code == 429
    assert answer.json()["code"] == "budget_spent"
    assert spent >= BUDGET * 9 // 10
    verified = until(lambda: (found := served.verify()).open_holds == 0 and found, "nothing is held")
    assert verified.ok, verified.findings
    assert served.spent("tenant=acme") == spent
    events = [event for event in served.events() if event["kind"] == "settle"]
    assert len(events) == len([row for row in provider.rows if row.status == 200])
    figures(
        f"300 concurrent calls, {server}, {workers} workers, {served.store.partition(':')[0]}",
        seconds=f"{lasted:.1f}",
        granted=stormy[200],
        refused=stormy[429],
        sold_in_the_storm=f"{after_storm / BUDGET:.1%}",
        sold_after=f"{spent / BUDGET:.1%}",
        sequential_calls=sold_singly,
        overrun=max(0, spent - BUDGET),
    )


@pytest.mark.parametrize(
    ("server", "workers", "clients"), [("uvicorn", 2, 12), ("gunicorn-sync", 4, 4), ("gunicorn-gthread", 2, 12)]
)
def test_a_worker_killed_in_mid_stream_loses_nothing(
    server: str,
    workers: int,
    clients: int,
    serve: Callable[..., Served],
    provider: StandIn,
    figures: Callable[..., None],
) -> None:
    limits = '["$1/day per tenant", "50 concurrent per tenant"]'
    served = serve(workers, server=server, lease_seconds="2", limits=limits)

    streams = asyncio.run(_streams_until_a_worker_dies(served, clients))
    died = time.monotonic()
    lost = [stream for stream in streams if not stream.whole]
    with httpx2.Client(base_url=served.url, headers=WHO, timeout=60) as client:
        # Its successor and its sibling go on, and one of them books what it left.
        until(lambda: _status(client) == 200, "the app answers again")
        until(lambda: len(_left_behind(served)) == len(lost), "the holds are booked")
    booked_after = time.monotonic() - died

    assert lost
    for event in _left_behind(served):
        assert (event["user"], event["tenant"], event["feature"]) == ("ada", "acme", "stream")
        assert (event["basis"], event["exact"], event["model"]) == ("abandoned", False, "gpt-4o-mini")
        assert event["cost_nanos"] > 400 * 600
    verified = until(lambda: (found := served.verify()).open_holds == 0 and found, "nothing is held")
    assert verified.ok, verified.findings
    events = _of_kind(served, "settle", "abandoned")
    assert len(events) == len(provider.rows)  # none missing
    assert len({(event["call_id"], event["attempt"]) for event in events}) == len(events)  # none twice
    figures(
        f"kill -9 in mid-stream, {server}, {served.store.partition(':')[0]}, lease 2 s",
        streams=len(streams),
        killed=len(lost),
        booked_after=f"{booked_after:.1f} s",
        exchanges=len(events),
        provider_says=len(provider.rows),
        drift=verified.drift_nanos,
    )


def _of_kind(served: Served, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in served.events() if event["kind"] in kinds]


def _left_behind(served: Served) -> list[dict[str, Any]]:
    """The holds that nobody closed. A worker that lives, but had no time to renew, corrects what was booked for it."""
    corrected = {(event["call_id"], event["attempt"]) for event in _of_kind(served, "correction")}
    return [x for x in _of_kind(served, "abandoned") if (x["call_id"], x["attempt"]) not in corrected]


@dataclass
class Streaming:
    """One client that reads a stream."""

    worker: int | None = None
    whole: bool = False


async def _streams_until_a_worker_dies(served: Served, count: int) -> list[Streaming]:
    """Read some streams side by side; when all have begun, the worker of the first is killed."""
    streams = [Streaming() for _ in range(count)]
    all_begun = asyncio.Event()
    slow = {"q": "Tell me all, in 60 words!", "standin": "gap-ms=40"}

    async def read(stream: Streaming) -> None:
        with contextlib.suppress(httpx2.TransportError):
            async with client.stream("POST", "/api/stream", json=slow) as answer:
                async for _ in answer.aiter_raw():
                    stream.worker = int(answer.headers["x-pid"])
                    if all(each.worker for each in streams):
                        all_begun.set()
                stream.whole = True

    async with httpx2.AsyncClient(base_url=served.url, headers=WHO, timeout=60) as client:
        reading = [asyncio.create_task(read(stream)) for stream in streams]
        await asyncio.wait_for(all_begun.wait(), 20)
        assert streams[0].worker is not None
        os.kill(streams[0].worker, signal.SIGKILL)
        await asyncio.gather(*reading)
    return streams


def _status(client: httpx2.Client) -> int:
    try:
        return client.post("/api/chat", json={"q": ASK}).status_code
    except httpx2.TransportError:
        return 0


# ---------------------------------------------------------------- the three SDKs


def openai_plain(url: str) -> None:
    with capture(openai.OpenAI(api_key="x", base_url=f"{url}/v1")) as client:
        client.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": ASK}])


def openai_stream(url: str) -> None:
    with capture(openai.OpenAI(api_key="x", base_url=f"{url}/v1")) as client:
        messages: Any = [{"role": "user", "content": ASK}]
        list(client.chat.completions.create(model="gpt-4o-mini", messages=messages, stream=True))


def anthropic_plain(url: str) -> None:
    with capture(anthropic.Anthropic(api_key="x", base_url=url)) as client:
        client.messages.create(model="claude-haiku-4-5", messages=[{"role": "user", "content": ASK}], max_tokens=60)


def anthropic_stream(url: str) -> None:
    messages: Any = [{"role": "user", "content": ASK}]
    with (
        capture(anthropic.Anthropic(api_key="x", base_url=url)) as client,
        client.messages.stream(model="claude-haiku-4-5", messages=messages, max_tokens=60) as stream,
    ):
        stream.until_done()


def google_plain(url: str) -> None:
    with capture(genai.Client(api_key="x", http_options=types.HttpOptions(base_url=url))) as client:
        client.models.generate_content(model="gemini-2.5-flash", contents=ASK)


def google_stream(url: str) -> None:
    with capture(genai.Client(api_key="x", http_options=types.HttpOptions(base_url=url))) as client:
        list(client.models.generate_content_stream(model="gemini-2.5-flash", contents=ASK))


CALLS = [openai_plain, openai_stream, anthropic_plain, anthropic_stream, google_plain, google_stream]


def test_the_three_sdks_plain_and_streamed_are_metered_as_they_were_served(
    provider: StandIn, provider_url: str, tmp_path: Path, figures: Callable[..., None]
) -> None:
    database = f"sqlite:///{tmp_path / 'guard.db'}"
    installed = process.install({"store": database, "ledger": database, "limits": ["$1000/day global"]})
    try:
        compared = {}
        for call in CALLS:
            before = len(provider.rows)
            call(provider_url)
            desk, ledger = installed.desk, installed.keeper.ledger
            until(lambda: not desk.open, "it is settled")  # noqa: B023 - called at once
            ledger.drain_all(desk.store)
            row = provider.rows[before]
            event = max(ledger.events(), key=lambda event: event["at"])
            compared[call.__name__] = (
                (event["input_tokens"], event["output_tokens"], event["exact"]),
                (row.input_tokens, row.output_tokens, True),
            )

        assert [metered for metered, _ in compared.values()] == [sent for _, sent in compared.values()]
        assert verify(installed.desk.store, installed.keeper.ledger).ok
        figures("tokens in/out, metered = served", **{name: f"{x[0]}/{x[1]}" for name, (x, _) in compared.items()})
    finally:
        process.uninstall()
