"""The stand-in speaks as the providers do: the real SDKs read every field, and its own books say the same."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import httpx2
import openai
import pytest
from google import genai
from google.genai import errors as genai_errors
from google.genai import types

from llm_guard_mw.cli.demo.standin import Knobs, StandIn, running

#: google-genai subclasses aiohttp's session, which aiohttp warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning")


@pytest.fixture
def app() -> StandIn:
    return StandIn()


@pytest.fixture
def url(app: StandIn) -> Iterator[str]:
    with running(app) as url:
        yield url


def openai_client(url: str) -> openai.OpenAI:
    return openai.OpenAI(api_key="sk-x", base_url=f"{url}/v1", max_retries=0)


def anthropic_client(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(api_key="sk-ant-x", base_url=url, max_retries=0)


def google_client(url: str) -> genai.Client:
    return genai.Client(api_key="x", http_options=types.HttpOptions(base_url=url))


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_chat_completion_reports_the_tokens_that_the_books_hold(app: StandIn, url: str) -> None:
    with openai_client(url) as client:
        answer = client.chat.completions.create(model="gpt-4o", messages=ask("Tell me 12 words"), n=2)

    [row] = app.rows
    assert [len(choice.message.content.split()) for choice in answer.choices] == [12, 12]
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (row.input_tokens, row.output_tokens)
    assert row.output_tokens == 24


def test_the_same_prompt_has_the_same_answer(url: str) -> None:
    with openai_client(url) as client:
        one, two = (client.chat.completions.create(model="gpt-4o", messages=ask("Why?")) for _ in range(2))

    assert one.choices[0].message.content == two.choices[0].message.content
    assert one.id != two.id


def test_a_cap_ends_the_text_with_its_finish_reason(url: str) -> None:
    with openai_client(url) as client, anthropic_client(url) as claude, google_client(url) as google:
        chat = client.chat.completions.create(model="gpt-4o", messages=ask("Go on"), max_tokens=5)
        response = client.responses.create(model="gpt-4o", input="Go on", max_output_tokens=5)
        message = claude.messages.create(model="claude-haiku-4-5", messages=ask("Go on"), max_tokens=5)
        config = types.GenerateContentConfig(max_output_tokens=5)
        content = google.models.generate_content(model="gemini-2.0-flash", contents="Go on", config=config)

    assert (chat.choices[0].finish_reason, chat.usage.completion_tokens) == ("length", 5)
    assert (response.incomplete_details.reason, response.usage.output_tokens) == ("max_output_tokens", 5)
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 5)
    assert content.candidates[0].finish_reason == types.FinishReason.MAX_TOKENS
    assert content.usage_metadata.candidates_token_count == 5


@pytest.mark.parametrize("asked", [True, False])
def test_a_chat_stream_carries_usage_only_if_asked(app: StandIn, url: str, asked: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if asked else {}
    with openai_client(url) as client:
        chunks = list(client.chat.completions.create(model="gpt-4o", messages=ask("Hi"), stream=True, **options))

    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    usages = [chunk.usage for chunk in chunks if chunk.usage]
    assert len(text.split()) == app.rows[0].output_tokens
    assert [usage.completion_tokens for usage in usages] == ([app.rows[0].output_tokens] if asked else [])
    assert app.rows[0].complete


def test_the_responses_api_streams_the_events_that_the_sdk_assembles(app: StandIn, url: str) -> None:
    with (
        openai_client(url) as client,
        client.responses.stream(model="gpt-5-mini", input="Hi") as stream,
    ):
        kinds = [event.type for event in stream]
        response = stream.get_final_response()

    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert response.usage.output_tokens == app.rows[0].output_tokens
    assert response.usage.output_tokens_details.reasoning_tokens == app.rows[0].reasoning_tokens > 0
    assert len(response.output_text.split()) == app.rows[0].output_tokens - app.rows[0].reasoning_tokens


def test_completions_and_embeddings_are_served(app: StandIn, url: str) -> None:
    with openai_client(url) as client:
        completion = client.completions.create(model="babbage-002", prompt="Once upon", max_tokens=4)
        pieces = list(client.completions.create(model="babbage-002", prompt="Once upon", max_tokens=4, stream=True))
        vectors = client.embeddings.create(model="text-embedding-3-small", input=["a b", "c"], dimensions=8)

    assert completion.usage.completion_tokens == 4
    assert "".join(piece.choices[0].text for piece in pieces) == completion.choices[0].text
    assert [len(item.embedding) for item in vectors.data] == [8, 8]
    assert vectors.usage.prompt_tokens == 3
    assert [row.api for row in app.rows] == ["openai.completions", "openai.completions", "openai.embeddings"]


def test_azure_paths_name_the_deployment(app: StandIn, url: str) -> None:
    with openai.AzureOpenAI(api_key="x", azure_endpoint=url, api_version="2025-04-01-preview") as client:
        answer = client.chat.completions.create(model="gpt-4o-mini", messages=ask("Hi"))

    assert answer.model == app.rows[0].model == "gpt-4o-mini"


def test_an_anthropic_stream_is_assembled_with_the_right_usage(app: StandIn, url: str) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    with (
        anthropic_client(url) as client,
        client.messages.stream(
            model="claude-sonnet-4-6", messages=ask("Hi"), max_tokens=2000, thinking=thinking
        ) as stream,
    ):
        text = "".join(stream.text_stream)
        message = stream.get_final_message()

    [row] = app.rows
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[1].text == text
    assert (message.usage.input_tokens, message.usage.output_tokens) == (row.input_tokens, row.output_tokens)


def test_a_marked_prefix_is_written_to_the_cache_and_then_read_from_it(url: str) -> None:
    block = {"type": "text", "text": "word " * 1500, "cache_control": {"type": "ephemeral"}}
    messages = [{"role": "user", "content": [block]}]
    with anthropic_client(url) as client:
        first, second = (
            client.messages.create(model="claude-haiku-4-5", messages=messages, max_tokens=5) for _ in range(2)
        )

    written, read = first.usage.cache_creation_input_tokens, second.usage.cache_read_input_tokens
    assert written == read == 1408
    assert first.usage.input_tokens == second.usage.input_tokens == 1506 - 1408


def test_a_long_prefix_is_cached_by_openai_without_being_asked(url: str) -> None:
    with openai_client(url) as client:
        first, second = (
            client.chat.completions.create(model="gpt-4o", messages=ask("word " * 1500), max_tokens=5) for _ in range(2)
        )

    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens == 1408


def test_gemini_is_served_whole_streamed_and_counted(app: StandIn, url: str) -> None:
    with google_client(url) as client:
        whole = client.models.generate_content(model="gemini-2.5-flash", contents="Hi there")
        chunks = list(client.models.generate_content_stream(model="gemini-2.5-flash", contents="Hi there"))
        counted = client.models.count_tokens(model="gemini-2.5-flash", contents="Hi there")

    last = chunks[-1].usage_metadata
    assert "".join(chunk.text or "" for chunk in chunks) == whole.text
    for usage in (whole.usage_metadata, last):
        assert usage.prompt_token_count == counted.total_tokens == app.rows[0].input_tokens
        assert usage.candidates_token_count + usage.thoughts_token_count == app.rows[0].output_tokens
    assert len(app.rows) == 2


def test_a_gemini_stream_without_sse_is_one_json_array(url: str) -> None:
    answer = httpx2.post(
        f"{url}/v1beta/models/gemini-2.0-flash:streamGenerateContent",
        json={"contents": [{"parts": [{"text": "in 5 words"}]}]},
        headers={"x-goog-api-key": "x"},
    )

    chunks = answer.json()
    assert len(chunks) == 6
    assert chunks[-1]["usageMetadata"]["candidatesTokenCount"] == 5


async def serve_all_three(url: str) -> None:
    async with openai.AsyncOpenAI(api_key="x", base_url=f"{url}/v1") as client:
        await client.chat.completions.create(model="gpt-4o", messages=ask("Hi"))
    async with anthropic.AsyncAnthropic(api_key="x", base_url=url) as claude:
        await claude.messages.create(model="claude-haiku-4-5", messages=ask("Hi"), max_tokens=50)
    async with google_client(url).aio as google:
        await google.models.generate_content(model="gemini-2.0-flash", contents="Hi")


@pytest.mark.anyio
async def test_the_async_clients_are_served(app: StandIn, url: str) -> None:
    await serve_all_three(url)

    assert [row.api for row in app.rows] == ["openai.chat", "anthropic.messages", "gemini.generate"]


def test_an_openai_error_has_its_own_shape(url: str) -> None:
    headers = {"x-standin": "status=429, retry-after=7"}
    with openai_client(url) as client, pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=ask("Hi"), extra_headers=headers)

    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.response.headers["retry-after"] == "7"


def test_an_anthropic_error_has_its_own_shape(url: str) -> None:
    headers = {"x-standin": "status=500"}
    with anthropic_client(url) as client, pytest.raises(anthropic.InternalServerError) as caught:
        client.messages.create(model="claude-haiku-4-5", messages=ask("Hi"), max_tokens=5, extra_headers=headers)

    assert caught.value.body["error"]["type"] == "api_error"


def test_a_gemini_error_has_its_own_shape(url: str) -> None:
    config = types.GenerateContentConfig(http_options=types.HttpOptions(headers={"x-standin": "status=400"}))
    with google_client(url) as client, pytest.raises(genai_errors.ClientError) as caught:
        client.models.generate_content(model="gemini-2.0-flash", contents="Hi", config=config)

    assert caught.value.status == "INVALID_ARGUMENT"


def test_an_error_may_pass_after_some_times(app: StandIn, url: str) -> None:
    client = openai.OpenAI(api_key="x", base_url=f"{url}/v1", max_retries=2)
    headers = {"x-standin": "status=500, times=1, id=a", "retry-after-ms": "1"}
    with client:
        client.chat.completions.create(model="gpt-4o", messages=ask("Hi"), extra_headers=headers)

    assert [row.status for row in app.rows] == [500, 200]


def test_a_request_without_a_key_is_refused(url: str) -> None:
    answer = httpx2.post(f"{url}/v1/chat/completions", json={"model": "gpt-4o", "messages": []})

    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_a_cut_stream_breaks_the_connection_and_books_what_was_sent(app: StandIn, url: str) -> None:
    headers = {"x-standin": "cut=4"}
    with openai_client(url) as client:
        stream = client.chat.completions.create(model="gpt-4o", messages=ask("Hi"), stream=True, extra_headers=headers)
        with pytest.raises((httpx2.RemoteProtocolError, openai.APIConnectionError)):
            list(stream)

    assert (app.rows[0].output_tokens, app.rows[0].complete) == (3, False)


def test_a_stopped_stream_ends_without_its_end_marks(app: StandIn, url: str) -> None:
    answer = httpx2.post(
        f"{url}/v1/messages",
        json={"model": "claude-haiku-4-5", "messages": ask("Hi"), "max_tokens": 50, "stream": True},
        headers={"x-api-key": "x", "x-standin": "stop=6"},
    )

    assert "message_stop" not in answer.text
    assert (app.rows[0].output_tokens, app.rows[0].complete) == (3, False)


def test_a_compressed_stream_arrives_piece_by_piece(url: str) -> None:
    headers = {"x-standin": "gzip=1, words=10"}
    with (
        openai_client(url) as client,
        client.chat.completions.with_streaming_response.create(
            model="gpt-4o", messages=ask("Hi"), stream=True, extra_headers=headers
        ) as raw,
    ):
        text = b"".join(raw.iter_bytes()).decode()

    assert raw.headers["content-encoding"] == "gzip"
    assert text.count('"content":') == 11


def test_a_client_that_hangs_up_stops_the_work(app: StandIn, url: str) -> None:
    headers = {"x-standin": "gap-ms=5, words=2000"}
    with openai_client(url) as client:
        stream = client.chat.completions.create(model="gpt-4o", messages=ask("Hi"), stream=True, extra_headers=headers)
        for _ in range(5):
            next(stream)
        stream.close()
        client.models.list()

    assert 4 <= app.rows[0].output_tokens < 2000
    assert not app.rows[0].complete


@pytest.mark.anyio
async def test_it_runs_in_process_without_a_socket(app: StandIn) -> None:
    transport = httpx2.ASGITransport(app=app)
    async with openai.AsyncOpenAI(
        api_key="x", base_url="http://stand-in/v1", http_client=httpx2.AsyncClient(transport=transport)
    ) as client:
        await client.chat.completions.create(model="gpt-4o", messages=ask("Hi"))
        models = await client.models.list()
        served = await client._client.get("http://stand-in/_served")

    assert served.json()["total"]["requests"] == 1
    assert "gpt-4o" in [model.id for model in models.data]


def test_the_books_can_be_read_and_cleared(url: str) -> None:
    with openai_client(url) as client:
        client.chat.completions.create(model="gpt-4o", messages=ask("Hi"))
    before = httpx2.get(f"{url}/_served").json()
    httpx2.delete(f"{url}/_served")
    after = httpx2.get(f"{url}/_served").json()

    assert before["models"]["gpt-4o"]["requests"] == 1
    assert before["models"]["gpt-4o"]["output_tokens"] == before["rows"][0]["output_tokens"]
    assert after["rows"] == []


def test_knobs_of_the_process_hold_for_every_request() -> None:
    app = StandIn(Knobs(words=3))
    with running(app) as url, openai_client(url) as client:
        answer = client.chat.completions.create(model="gpt-4o", messages=ask("Hi"))

    assert answer.usage.completion_tokens == 3
