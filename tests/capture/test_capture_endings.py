"""However an answer ends (broken off, cancelled, dropped, lost, an error), its exchange is closed once."""

from __future__ import annotations

import asyncio
import socket
from importlib import import_module
from typing import Any

import httpx2
import openai
import pytest
from google import genai
from google.genai import types

from llm_guard_mw.capture import capture
from llm_guard_mw.cli.demo.standin import StandIn

pytestmark = pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning")

ASK: Any = [{"role": "user", "content": "Why is the sky blue? In 400 words please."}]
SLOWLY = {"x-standin": "gap-ms=2"}


def sync_client(url: str, **options: Any) -> openai.OpenAI:
    return capture(openai.OpenAI(api_key="x", base_url=f"{url}/v1", **options))


def async_client(url: str, **options: Any) -> openai.AsyncOpenAI:
    return capture(openai.AsyncOpenAI(api_key="x", base_url=f"{url}/v1", **options))


def google_client(url: str, **headers: str) -> genai.Client:
    return capture(genai.Client(api_key="x", http_options=types.HttpOptions(base_url=url, headers=headers)))


async def arrival(provider: StandIn) -> None:
    """Until the provider, which runs in another thread, has a request in its hands."""
    async with asyncio.timeout(10):
        while not provider.arrived:  # noqa: ASYNC110  an event of this loop could not be set over there
            await asyncio.sleep(0.005)


def test_a_stream_broken_off_early_is_counted_from_its_text(url: str, books: Any) -> None:
    with sync_client(url) as client:
        stream = client.chat.completions.create(
            model="gpt-4o-mini", messages=ASK, stream=True, max_tokens=500, extra_headers=SLOWLY
        )
        for number, _ in enumerate(stream):
            if number == 20:
                break
        stream.close()

    [event] = books.settled()
    assert event["basis"] == "counted"
    assert 20 <= event["output_tokens"] < 100
    assert books.add_up()


@pytest.mark.anyio
async def test_an_async_stream_broken_off_early_is_counted_from_its_text(url: str, books: Any) -> None:
    async with async_client(url) as client:
        stream = await client.chat.completions.create(
            model="gpt-4o-mini", messages=ASK, stream=True, max_tokens=500, extra_headers=SLOWLY
        )
        async with stream:
            async for _ in stream:
                break

    [event] = books.settled()
    assert event["basis"] == "counted"
    assert books.add_up()


def test_a_stream_that_is_never_closed_is_settled_once_it_is_dropped(url: str, books: Any) -> None:
    with sync_client(url) as client:
        stream = client.chat.completions.create(
            model="gpt-4o-mini", messages=ASK, stream=True, max_tokens=500, extra_headers=SLOWLY
        )
        next(iter(stream))
        del stream
        assert books.quiet()

    assert [event["basis"] for event in books.settled()] == ["counted"]


@pytest.mark.anyio
async def test_an_async_stream_that_is_never_closed_is_settled_once_it_is_dropped(url: str, books: Any) -> None:
    async with async_client(url) as client:
        stream = await client.chat.completions.create(
            model="gpt-4o-mini", messages=ASK, stream=True, max_tokens=500, extra_headers=SLOWLY
        )
        await anext(aiter(stream))
        del stream
        assert await books.aquiet()

    assert [event["basis"] for event in books.settled()] == ["counted"]


@pytest.mark.anyio
async def test_a_cancelled_stream_is_settled(url: str, books: Any) -> None:
    begun = asyncio.Event()

    async def read(client: openai.AsyncOpenAI) -> None:
        async for _ in await client.chat.completions.create(
            model="gpt-4o-mini", messages=ASK, stream=True, max_tokens=500, extra_headers={"x-standin": "gap-ms=50"}
        ):
            begun.set()

    async with async_client(url) as client:
        task = asyncio.create_task(read(client))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert [event["basis"] for event in books.settled()] == ["counted"]
    assert books.add_up()


@pytest.mark.anyio
async def test_a_call_cancelled_before_its_answer_books_the_hold(url: str, books: Any, provider: StandIn) -> None:
    async with async_client(url) as client:
        task = asyncio.create_task(
            client.chat.completions.create(
                model="gpt-4o-mini", messages=ASK, max_tokens=500, extra_headers={"x-standin": "first-byte-ms=60000"}
            )
        )
        await arrival(provider)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    [event] = books.settled()
    assert event["basis"] == "held"
    assert event["cost_nanos"] > 0


def test_a_lost_connection_books_the_hold(url: str, books: Any) -> None:
    with sync_client(url, max_retries=0) as client:
        stream = client.chat.completions.create(
            model="gpt-4o-mini", messages=ASK, stream=True, max_tokens=500, extra_headers={"x-standin": "cut=9"}
        )
        with pytest.raises((httpx2.RemoteProtocolError, openai.APIConnectionError)):
            list(stream)

    [event] = books.settled()
    assert (event["basis"], event["error_type"]) == ("held", "connection_lost")


def test_a_stream_without_its_end_marks_is_not_taken_for_exact(url: str, books: Any) -> None:
    with sync_client(url) as client:
        list(
            client.chat.completions.create(
                model="gpt-4o-mini", messages=ASK, stream=True, max_tokens=500, extra_headers={"x-standin": "stop=9"}
            )
        )

    [event] = books.settled()
    assert event["exact"] is False


def test_what_was_never_sent_costs_nothing(books: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    client = sync_client(f"http://127.0.0.1:{port}", max_retries=0)
    with client, pytest.raises(openai.APIConnectionError):
        client.chat.completions.create(model="gpt-4o-mini", messages=ASK, max_tokens=500)

    assert [event["kind"] for event in books.events()] == ["release"]
    assert books.add_up()


def test_each_retry_of_the_sdk_is_an_exchange_of_its_own(url: str, books: Any) -> None:
    headers = {"x-standin": "status=500, times=2, id=a"}
    with sync_client(url, max_retries=3) as client:
        client.chat.completions.create(model="gpt-4o-mini", messages=ASK, extra_headers=headers)

    events = sorted(books.settled(), key=lambda event: event["at"])
    assert [event["status"] for event in events] == [500, 500, 200]
    assert [event["cost_nanos"] for event in events[:2]] == [0, 0]


def test_a_providers_own_429_reaches_the_app_and_costs_nothing(url: str, books: Any) -> None:
    headers = {"x-standin": "status=429, retry-after=7"}
    with sync_client(url, max_retries=0) as client, pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="gpt-4o-mini", messages=ASK, extra_headers=headers)

    assert caught.value.response.headers["retry-after"] == "7"
    assert [(event["status"], event["cost_nanos"]) for event in books.settled()] == [(429, 0)]


@pytest.mark.parametrize("streamed", [True, False])
def test_a_compressed_answer_is_metered(streamed: bool, url: str, books: Any, served: Any) -> None:
    headers = {"x-standin": "gzip=1"}
    options: Any = {"stream": True, "stream_options": {"include_usage": True}} if streamed else {}
    with sync_client(url) as client:
        answer = client.chat.completions.create(model="gpt-4o-mini", messages=ASK, extra_headers=headers, **options)
        if streamed:
            list(answer)

    assert books.tokens() == served() != []


@pytest.mark.anyio
async def test_an_aiohttp_stream_broken_off_early_is_settled(url: str, books: Any) -> None:
    client = google_client(url, **SLOWLY).aio
    async with client:
        stream = await client.models.generate_content_stream(model="gemini-2.0-flash", contents="In 400 words")
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        assert await books.aquiet()

    [event] = books.settled()
    assert 0 < event["output_tokens"] < 400
    assert books.add_up()


@pytest.mark.anyio
async def test_an_aiohttp_stream_that_is_never_closed_is_settled_once_it_is_dropped(url: str, books: Any) -> None:
    client = google_client(url, **SLOWLY).aio
    async with client:
        stream = await client.models.generate_content_stream(model="gemini-2.0-flash", contents="In 400 words")
        await anext(aiter(stream))
        del stream
        assert await books.aquiet()

    assert len(books.settled()) == 1


@pytest.mark.anyio
async def test_an_aiohttp_request_that_is_cancelled_books_the_hold(url: str, books: Any, provider: StandIn) -> None:
    client = google_client(url, **{"x-standin": "first-byte-ms=60000"}).aio
    async with client:
        task = asyncio.create_task(client.models.generate_content(model="gemini-2.0-flash", contents="Why?"))
        await arrival(provider)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert [event["basis"] for event in books.settled()] == ["held"]


@pytest.mark.anyio
async def test_an_aiohttp_error_answer_costs_nothing(url: str, books: Any) -> None:
    client = google_client(url, **{"x-standin": "status=400"}).aio
    async with client:
        with pytest.raises(genai.errors.ClientError):
            await client.models.generate_content(model="gemini-2.0-flash", contents="Why?")
        assert await books.aquiet()

    assert [(event["status"], event["cost_nanos"]) for event in books.settled()] == [(400, 0)]


def test_what_cannot_be_rewritten_does_not_leave_without_its_cap(
    url: str, provider: StandIn, books: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a bug of ours")

    # By its module: the package's own name for `capture` is the function.
    monkeypatch.setattr(import_module("llm_guard_mw.capture.exchange"), "rewrite", fails)

    with sync_client(url, max_retries=0) as client, pytest.raises(openai.InternalServerError) as refused:
        client.chat.completions.create(model="gpt-4o-mini", messages=ASK)  # no cap: one would have been written

    assert refused.value.status_code == 503
    assert not provider.rows
    assert [event["kind"] for event in books.events()] == ["release"]
    assert books.add_up()
