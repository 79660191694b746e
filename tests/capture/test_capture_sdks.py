"""The three SDKs through `capture`: what is metered is what the provider served, plain and streamed, sync and async."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import anthropic
import httpx
import httpx2
import openai
import pytest
from google import genai
from google.genai import _api_client as google_internals
from google.genai import errors as google_errors
from google.genai import types

from llm_guard_mw import process
from llm_guard_mw.capture import capture
from llm_guard_mw.cli.demo.standin import StandIn

#: google-genai subclasses aiohttp's session, which aiohttp warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning")

Served = Callable[[], list[tuple[int, int]]]
ASK: Any = [{"role": "user", "content": "Why is the sky blue? In 30 words please."}]


def openai_client(url: str, **options: Any) -> openai.OpenAI:
    return capture(openai.OpenAI(api_key="x", base_url=f"{url}/v1", **options))


def async_openai(url: str, **options: Any) -> openai.AsyncOpenAI:
    return capture(openai.AsyncOpenAI(api_key="x", base_url=f"{url}/v1", **options))


def anthropic_client(url: str, **options: Any) -> anthropic.Anthropic:
    return capture(anthropic.Anthropic(api_key="x", base_url=url, **options))


def async_anthropic(url: str, **options: Any) -> anthropic.AsyncAnthropic:
    return capture(anthropic.AsyncAnthropic(api_key="x", base_url=url, **options))


def google_client(url: str, **options: Any) -> genai.Client:
    return capture(genai.Client(api_key="x", http_options=types.HttpOptions(base_url=url, **options)))


# ---------------------------------------------------------------- every kind of call, sync


def chat(url: str) -> None:
    with openai_client(url) as client:
        client.chat.completions.create(model="gpt-4o-mini", messages=ASK)


def chat_of_a_reasoning_model(url: str) -> None:
    with openai_client(url) as client:
        client.chat.completions.create(model="gpt-5-mini", messages=ASK)


def chat_stream(url: str) -> None:
    with openai_client(url) as client:
        list(client.chat.completions.create(model="gpt-4o-mini", messages=ASK, stream=True))


def chat_stream_that_asks_for_usage(url: str) -> None:
    options: Any = {"include_usage": True}
    with openai_client(url) as client:
        *_, last = client.chat.completions.create(
            model="gpt-4o-mini", messages=ASK, stream=True, stream_options=options
        )
    assert last.usage is not None


def responses(url: str) -> None:
    with openai_client(url) as client:
        client.responses.create(model="gpt-4o-mini", input="Why?")


def responses_stream(url: str) -> None:
    with openai_client(url) as client, client.responses.stream(model="gpt-4o-mini", input="Why?") as stream:
        stream.until_done()


def completions(url: str) -> None:
    with openai_client(url) as client:
        client.completions.create(model="gpt-3.5-turbo-instruct", prompt="Why?", max_tokens=20)


def completions_stream(url: str) -> None:
    with openai_client(url) as client:
        list(client.completions.create(model="gpt-3.5-turbo-instruct", prompt="Why?", max_tokens=20, stream=True))


def embeddings(url: str) -> None:
    with openai_client(url) as client:
        client.embeddings.create(model="text-embedding-3-small", input=["one two", "three"])


def azure(url: str) -> None:
    with capture(openai.AzureOpenAI(api_key="x", azure_endpoint=url, api_version="2025-04-01-preview")) as client:
        client.chat.completions.create(model="gpt-4o-mini", messages=ASK)


def messages(url: str) -> None:
    with anthropic_client(url) as client:
        client.messages.create(model="claude-haiku-4-5", messages=ASK, max_tokens=60)


def messages_stream(url: str) -> None:
    with (
        anthropic_client(url) as client,
        client.messages.stream(model="claude-haiku-4-5", messages=ASK, max_tokens=60) as stream,
    ):
        stream.until_done()


def gemini(url: str) -> None:
    with google_client(url) as client:
        client.models.generate_content(model="gemini-2.5-flash", contents="Why?")


def gemini_stream(url: str) -> None:
    with google_client(url) as client:
        list(client.models.generate_content_stream(model="gemini-2.5-flash", contents="Why?"))


SYNC = [
    chat,
    chat_of_a_reasoning_model,
    chat_stream,
    chat_stream_that_asks_for_usage,
    responses,
    responses_stream,
    completions,
    completions_stream,
    embeddings,
    azure,
    messages,
    messages_stream,
    gemini,
    gemini_stream,
]


@pytest.mark.parametrize("call", SYNC)
def test_a_sync_call_is_metered_as_it_was_served(
    call: Callable[[str], None], url: str, books: Any, served: Served
) -> None:
    call(url)

    assert books.tokens() == served()
    assert [(event["basis"], event["exact"]) for event in books.settled()] == [("exact", True)]


# ---------------------------------------------------------------- every kind of call, async


async def achat(url: str) -> None:
    async with async_openai(url) as client:
        await client.chat.completions.create(model="gpt-4o-mini", messages=ASK)


async def achat_stream(url: str) -> None:
    async with async_openai(url) as client:
        async for _ in await client.chat.completions.create(model="gpt-4o-mini", messages=ASK, stream=True):
            pass


async def aresponses_stream(url: str) -> None:
    async with async_openai(url) as client, client.responses.stream(model="gpt-4o-mini", input="Why?") as stream:
        await stream.until_done()


async def amessages(url: str) -> None:
    async with async_anthropic(url) as client:
        await client.messages.create(model="claude-haiku-4-5", messages=ASK, max_tokens=60)


async def amessages_stream(url: str) -> None:
    async with (
        async_anthropic(url) as client,
        client.messages.stream(model="claude-haiku-4-5", messages=ASK, max_tokens=60) as stream,
    ):
        await stream.until_done()


async def agemini(url: str) -> None:
    async with google_client(url).aio as client:
        await client.models.generate_content(model="gemini-2.5-flash", contents="Why?")


async def agemini_stream(url: str) -> None:
    async with google_client(url).aio as client:
        async for _ in await client.models.generate_content_stream(model="gemini-2.5-flash", contents="Why?"):
            pass


@pytest.fixture
def without_aiohttp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(google_internals, "has_aiohttp", False)


ASYNC = [achat, achat_stream, aresponses_stream, amessages, amessages_stream, agemini, agemini_stream]


@pytest.mark.anyio
@pytest.mark.parametrize("call", ASYNC)
async def test_an_async_call_is_metered_as_it_was_served(
    call: Callable[[str], Awaitable[None]], url: str, books: Any, served: Served
) -> None:
    await call(url)

    assert books.tokens() == served()
    assert [(event["basis"], event["exact"]) for event in books.settled()] == [("exact", True)]


@pytest.mark.anyio
@pytest.mark.usefixtures("without_aiohttp")
@pytest.mark.parametrize("call", [agemini, agemini_stream])
async def test_async_gemini_is_metered_without_aiohttp_too(
    call: Callable[[str], Awaitable[None]], url: str, books: Any, served: Served
) -> None:
    await call(url)

    assert len(served()) == 1
    assert books.tokens() == served()


@pytest.mark.parametrize("aiohttp_is_there", [True, False])
def test_a_gemini_client_is_guarded_on_every_event_loop(
    aiohttp_is_there: bool, url: str, books: Any, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(google_internals, "has_aiohttp", aiohttp_is_there)
    client = google_client(url)

    async def ask() -> None:
        await client.aio.models.generate_content(model="gemini-2.5-flash", contents="Why?")
        await client.aio.aclose()
        # The sockets close in the loop's next turn.
        await asyncio.sleep(0)

    asyncio.run(ask())
    if aiohttp_is_there:
        asyncio.run(ask())
    client.close()

    assert len(served()) == 1 + aiohttp_is_there
    assert books.tokens() == served()


# ---------------------------------------------------------------- what the app sees


def shown(stream: Any) -> list[tuple[Any, ...]]:
    """What an app can see of a chat stream, without what differs from answer to answer."""
    return [
        (
            chunk.object,
            chunk.usage,
            [(choice.index, choice.delta.content, choice.finish_reason) for choice in chunk.choices],
        )
        for chunk in stream
    ]


@pytest.mark.usefixtures("books")
def test_a_stream_looks_as_it_does_without_us(url: str) -> None:
    with openai.OpenAI(api_key="x", base_url=f"{url}/v1") as bare, openai_client(url) as client:
        expected = shown(bare.chat.completions.create(model="gpt-4o-mini", messages=ASK, stream=True))
        seen = shown(client.chat.completions.create(model="gpt-4o-mini", messages=ASK, stream=True))

    assert seen == expected
    assert all(choices for _, _, choices in seen)


@pytest.mark.usefixtures("books")
def test_capture_gives_the_very_client_back_and_wraps_it_once(url: str) -> None:
    bare = openai.OpenAI(api_key="x", base_url=f"{url}/v1")
    with capture(bare) as client:
        wrapped = client._client._transport
        capture(client)

        assert client is bare
        assert client._client._transport is wrapped


def test_capture_says_what_it_takes() -> None:
    with pytest.raises(TypeError, match="a client of openai, anthropic, google-genai"):
        capture(object())


def test_requests_that_cost_nothing_pass(url: str, books: Any) -> None:
    with openai_client(url) as client, anthropic_client(url) as claude:
        client.models.list()
        claude.messages.count_tokens(model="claude-haiku-4-5", messages=ASK)

    assert books.events() == []


def test_without_a_guard_the_error_says_what_to_do(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    client = capture(httpx2.Client())

    with client, pytest.raises(process.ConfigError, match="nothing guards this process"):
        client.post(f"{url}/v1/chat/completions", json={"model": "gpt-4o-mini", "messages": ASK})


# ---------------------------------------------------------------- one client, many ways to use it


def test_copies_of_a_client_are_guarded(url: str, books: Any, served: Served) -> None:
    with openai_client(url) as client:
        client.with_options(timeout=5).chat.completions.create(model="gpt-4o-mini", messages=ASK)
        client.copy(max_retries=0).chat.completions.create(model="gpt-4o-mini", messages=ASK)

    assert len(served()) == 2
    assert books.tokens() == served()


def test_mounted_transports_are_guarded(url: str, books: Any, served: Served) -> None:
    inner = httpx2.HTTPTransport()
    http_client = httpx2.Client(mounts={"http://": inner, "https://": None})
    with openai_client(url, http_client=http_client) as client:
        client.chat.completions.create(model="gpt-4o-mini", messages=ASK)

    assert books.tokens() == served() != []


def test_bare_clients_are_guarded(url: str, books: Any, served: Served) -> None:
    body = {"model": "gpt-4o-mini", "messages": ASK}
    headers = {"authorization": "Bearer x"}
    with capture(httpx2.Client()) as client, capture(httpx.Client()) as legacy:
        client.post(f"{url}/v1/chat/completions", json=body, headers=headers)
        legacy.post(f"{url}/v1/chat/completions", json=body, headers=headers)
        client.post(
            f"{url}/v1/chat/completions",
            content=iter([b'{"model": "gpt-4o-mini", ', b'"messages": []}']),
            headers=headers,
        )

    assert len(served()) == 3
    assert books.tokens() == served()


def test_a_legacy_httpx_client_is_guarded_under_openai(url: str, books: Any, served: Served) -> None:
    with openai_client(url, http_client=httpx.Client()) as client:
        client.chat.completions.create(model="gpt-4o-mini", messages=ASK)
        list(client.chat.completions.create(model="gpt-4o-mini", messages=ASK, stream=True))

    assert len(served()) == 2
    assert books.tokens() == served()


@pytest.mark.anyio
async def test_an_async_legacy_httpx_client_is_guarded_under_openai(url: str, books: Any, served: Served) -> None:
    async with async_openai(url, http_client=httpx.AsyncClient()) as client:
        await client.chat.completions.create(model="gpt-4o-mini", messages=ASK)
        async for _ in await client.chat.completions.create(model="gpt-4o-mini", messages=ASK, stream=True):
            pass

    assert len(served()) == 2
    assert books.tokens() == served()


@pytest.mark.anyio
async def test_an_in_process_transport_is_guarded(provider: StandIn, books: Any, served: Served) -> None:
    http_client = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=provider))
    async with async_openai("http://stand-in", http_client=http_client) as client:
        await client.chat.completions.create(model="gpt-4o-mini", messages=ASK)

    assert books.tokens() == served() != []


@pytest.mark.anyio
async def test_parallel_calls_are_exchanges_of_their_own(url: str, books: Any, served: Served) -> None:
    async with async_openai(url) as client, process.AsyncGuard().as_user(user="ada"):
        await asyncio.gather(
            *(
                client.chat.completions.create(
                    model="gpt-4o-mini", messages=[{"role": "user", "content": f"{n} words"}]
                )
                for n in range(1, 21)
            )
        )

    events = books.settled()
    assert books.tokens() == served()
    assert {event["user"] for event in events} == {"ada"}
    assert len({event["call_id"] for event in events}) == 1
    assert len({event["attempt"] for event in events}) == 20


def test_an_agent_loop_is_many_exchanges_of_one_call(url: str, books: Any, served: Served) -> None:
    conversation = list(ASK)
    with openai_client(url) as client, process.Guard().as_user(user="ada", feature="agent"):
        for _ in range(4):
            answer = client.chat.completions.create(model="gpt-4o-mini", messages=conversation)
            conversation.append({"role": "assistant", "content": answer.choices[0].message.content})
            conversation.append({"role": "user", "content": "Go on"})

    events = books.settled()
    assert books.tokens() == served()
    assert [event["attempt"] for event in events] == [1, 2, 3, 4]
    assert {event["feature"] for event in events} == {"agent"}


def test_a_thread_that_carries_the_context_belongs_to_the_call(url: str, books: Any) -> None:
    def ask(client: openai.OpenAI) -> None:
        client.chat.completions.create(model="gpt-4o-mini", messages=ASK)

    with openai_client(url) as client, process.Guard().as_user(user="ada"):
        carried = contextvars.copy_context()
        threads = [
            threading.Thread(target=carried.run, args=(ask, client)),
            threading.Thread(target=contextvars.Context().run, args=(ask, client)),
        ]
        for thread in threads:
            thread.start()
            thread.join()

    assert sorted(str(event["user"]) for event in books.settled()) == ["None", "ada"]


# ---------------------------------------------------------------- refusals


def spent(guarded: Any) -> Any:
    """A budget that cannot pay a single answer."""
    return guarded(limits=["$0.0000001/day global"])


def test_a_refused_openai_call_raises_its_own_error_after_one_attempt(
    url: str, guarded: Any, provider: StandIn
) -> None:
    books = spent(guarded)
    with openai_client(url) as client, pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="gpt-4o-mini", messages=ASK)

    assert caught.value.code in ("budget_spent", "never_fits")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert not provider.rows
    assert [event["kind"] for event in books.events()] == ["refused"]


@pytest.mark.anyio
async def test_a_refused_anthropic_call_raises_its_own_error_after_one_attempt(
    url: str, guarded: Any, provider: StandIn
) -> None:
    books = spent(guarded)
    client = async_anthropic(url)
    async with client:
        with pytest.raises(anthropic.RateLimitError) as caught:
            await client.messages.create(model="claude-haiku-4-5", messages=ASK, max_tokens=60)

    assert caught.value.body["error"]["type"] == "rate_limit_error"  # type: ignore[index]
    assert not provider.rows
    assert [event["kind"] for event in books.events()] == ["refused"]


def test_a_refused_gemini_call_raises_its_own_error(url: str, guarded: Any, provider: StandIn) -> None:
    books = spent(guarded)
    with google_client(url) as client, pytest.raises(google_errors.ClientError) as caught:
        client.models.generate_content(model="gemini-2.5-flash", contents="Why?")

    assert (caught.value.code, caught.value.status) == (429, "RESOURCE_EXHAUSTED")
    assert not provider.rows
    assert [event["kind"] for event in books.events()] == ["refused"]


@pytest.mark.anyio
@pytest.mark.parametrize("aiohttp_is_there", [True, False])
@pytest.mark.parametrize("streamed", [True, False])
async def test_a_refused_async_gemini_call_raises_its_own_error(
    aiohttp_is_there: bool,
    streamed: bool,
    url: str,
    guarded: Any,
    provider: StandIn,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(google_internals, "has_aiohttp", aiohttp_is_there)
    spent(guarded)
    client = google_client(url).aio
    ask = client.models.generate_content_stream if streamed else client.models.generate_content
    async with client:
        with pytest.raises(google_errors.ClientError) as caught:
            async for _ in await ask(model="gemini-2.5-flash", contents="Why?"):  # type: ignore[union-attr]
                pass

    assert (caught.value.code, caught.value.status) == (429, "RESOURCE_EXHAUSTED")
    assert not provider.rows


def test_true_spend_stays_below_the_budget(url: str, guarded: Any, provider: StandIn) -> None:
    books = guarded(limits=["2k output tokens/day global"])
    with openai_client(url) as client, contextlib.suppress(openai.RateLimitError):
        while True:
            client.chat.completions.create(model="gpt-4o-mini", messages=ASK, max_tokens=300)

    sold = sum(row.output_tokens for row in provider.rows)
    assert 1_700 <= sold <= 2_000
    assert books.add_up()
