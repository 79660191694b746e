"""What a request asks for, read off its bytes."""

from __future__ import annotations

import base64
import gzip
import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from llm_guard_mw.estimate import describe, image_tokens, upper_tokens
from llm_guard_mw.model import Asked

CHAT = "/v1/chat/completions"


def _chat(**fields: Any) -> Asked:
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]} | fields
    return describe("openai.chat", "openai", "POST", CHAT, json.dumps(body).encode())


def _asked(api: str | None, body: Any, *, path: str = "/v1/x", provider: str | None = None, **more: Any) -> Asked:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return describe(api, provider, "POST", path, data, **more)


# ---------------------------------------------------------------- the fields


def test_a_plain_chat_request() -> None:
    asked = _chat(max_completion_tokens=100, n=2, service_tier="flex")

    assert (asked.model, asked.cap, asked.choices, asked.stream) == ("gpt-4o", 100, 2, False)
    assert (asked.service_tier, asked.opaque, asked.unbounded, asked.kinds) == ("flex", (), None, ())
    assert 10 < asked.input_tokens < 120


@pytest.mark.parametrize(
    ("api", "body", "cap"),
    [
        ("openai.chat", {"max_tokens": 7}, 7),
        ("openai.responses", {"max_output_tokens": 8}, 8),
        ("openai.completions", {"prompt": "x", "max_tokens": 9}, 9),
        ("anthropic.messages", {"max_tokens": 10}, 10),
        ("gemini.generate", {"generationConfig": {"maxOutputTokens": 11}}, 11),
        ("gemini.generate", {"generation_config": {"max_output_tokens": 12}}, 12),
        ("bedrock.converse", {"inferenceConfig": {"maxTokens": 13}}, 13),
        ("bedrock.invoke", {"textGenerationConfig": {"maxTokenCount": 14}}, 14),
        ("ollama.chat", {"options": {"num_predict": 15}}, 15),
        (None, {"message": "hello", "max_tokens": 16}, 16),
        (None, {"max_tokens": 5, "max_completion_tokens": 17}, 17),
        ("openai.chat", {"max_tokens": "18"}, 18),
        ("openai.chat", {"max_tokens": 1.9e1}, 19),
        ("openai.chat", {"max_tokens": 0}, None),
        ("openai.chat", {"max_tokens": -1}, None),
        ("openai.chat", {"max_tokens": None}, None),
        ("openai.chat", {"max_tokens": True}, None),
        ("openai.chat", {"max_tokens": [1]}, None),
        ("openai.chat", {"max_tokens": 10**30}, 1_000_000_000),
        ("openai.chat", {"metadata": {"max_tokens": 5}}, None),
    ],
)
def test_the_callers_cap_is_found_in_every_shape(api: str | None, body: Any, cap: int | None) -> None:
    assert _asked(api, body).cap == cap


def test_one_field_of_an_odd_type_hides_no_other() -> None:
    asked = _chat(temperature="hot", stream_options="yes", n="3", tools={"a": 1}, thinking="deep", max_tokens=5)

    assert (asked.model, asked.choices, asked.cap) == ("gpt-4o", 3, 5)


@pytest.mark.parametrize(
    ("api", "body", "choices"),
    [
        ("openai.chat", {"n": 4}, 4),
        ("openai.completions", {"prompt": "x", "n": 2, "best_of": 5}, 5),
        ("openai.completions", {"prompt": ["a", "b", "c"], "n": 2}, 6),
        ("openai.completions", {"prompt": [1, 2, 3], "n": 2}, 2),
        ("openai.completions", {"prompt": [[1, 2], [3]]}, 2),
        ("gemini.generate", {"generationConfig": {"candidateCount": 3}}, 3),
        ("openai.chat", {"n": 0}, 1),
    ],
)
def test_choices_multiply_the_output(api: str, body: Any, choices: int) -> None:
    assert _asked(api, body).choices == choices


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/v1beta/models/gemini-2.5-pro:streamGenerateContent?alt=sse", "gemini-2.5-pro"),
        ("/v1/projects/p/locations/l/publishers/anthropic/models/claude-3-7@1:rawPredict", "claude-3-7@1"),
        ("/openai/deployments/my-gpt/chat/completions?api-version=2024-12-01-preview", "my-gpt"),
        ("/model/us.anthropic.claude-sonnet-4-20250514-v1%3A0/converse", "us.anthropic.claude-sonnet-4-20250514-v1:0"),
    ],
)
def test_the_model_in_the_url_is_the_one_that_runs(path: str, model: str) -> None:
    assert _asked("any.api", {"model": "gpt-4o-mini"}, path=path).model == model


@pytest.mark.parametrize(
    ("api", "provider", "body", "stream", "includes"),
    [
        ("openai.chat", "openai", {}, False, True),
        ("openai.chat", "openai", {"stream": True}, True, False),
        ("openai.chat", "openai", {"stream": True, "stream_options": {"include_usage": True}}, True, True),
        ("openai.chat", "mistral", {"stream": True}, True, True),
        ("openai.completions", "azure", {"stream": True}, True, False),
        ("openai.responses", "openai", {"stream": True}, True, True),
        ("anthropic.messages", "anthropic", {"stream": True}, True, True),
    ],
)
def test_streams_that_say_their_usage(api: str, provider: str, body: Any, stream: bool, includes: bool) -> None:
    asked = _asked(api, body, provider=provider)

    assert (asked.stream, asked.includes_usage) == (stream, includes)


def test_a_gemini_stream_is_known_by_its_path() -> None:
    assert _asked("gemini.generate", {}, path="/v1/models/gemini-2.5-pro:streamGenerateContent").stream
    assert not _asked("gemini.generate", {}, path="/v1/models/gemini-2.5-pro:generateContent").stream


# ---------------------------------------------------------------- what has no bound, or no cost


@pytest.mark.parametrize(
    ("api", "body", "opaque"),
    [
        ("openai.responses", {"input": "hi", "previous_response_id": "resp_1"}, "previous_response_id"),
        ("openai.responses", {"input": "hi", "conversation": "conv_1"}, "conversation"),
        ("openai.responses", {"prompt": {"id": "pmpt_1"}}, "prompt_id"),
        ("openai.responses", {"input": "hi", "tools": [{"type": "web_search"}]}, "web_search"),
        ("openai.responses", {"input": "hi", "tools": [{"type": "mcp", "server_url": "x"}]}, "mcp"),
        ("openai.responses", {"input": [{"content": [{"type": "input_file", "file_id": "f"}]}]}, "file_id"),
        ("openai.chat", {"web_search_options": {"search_context_size": "low"}}, "web_search"),
        (
            "openai.chat",
            {"messages": [{"content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}]},
            "image_url",
        ),
        ("anthropic.messages", {"mcp_servers": [{"url": "x"}]}, "mcp"),
        ("anthropic.messages", {"container": "c_1"}, "container"),
        ("anthropic.messages", {"tools": [{"type": "web_search_20250305", "name": "w"}]}, "web_search_20250305"),
        ("gemini.generate", {"tools": [{"googleSearch": {}}]}, "web_search"),
        ("gemini.generate", {"tools": [{"url_context": {}}]}, "url_context"),
        ("gemini.generate", {"cachedContent": "cachedContents/x"}, "cached_content"),
        ("gemini.generate", {"contents": [{"parts": [{"fileData": {"fileUri": "gs://x"}}]}]}, "file_uri"),
    ],
)
def test_input_that_a_body_only_refers_to_is_named(api: str, body: Any, opaque: str) -> None:
    assert opaque in _asked(api, body).opaque


def test_tools_that_the_caller_runs_and_citations_refer_to_nothing() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}, {"type": "bash_20250124", "name": "bash"}, {"name": "g"}]
    cited = [{"type": "url_citation", "url": "https://x", "title": "X"}]

    asked = _asked("openai.responses", {"tools": tools, "input": [{"content": [{"text": "t", "annotations": cited}]}]})

    assert asked.opaque == ()


@pytest.mark.parametrize(
    ("api", "path", "body", "kind"),
    [
        ("openai.batches", "/v1/batches", {}, "batch"),
        ("anthropic.batches", "/v1/messages/batches", {}, "batch"),
        ("openai.responses", "/v1/responses", {"background": True}, "background"),
        ("openai.fine_tuning", "/v1/fine_tuning/jobs", {}, "fine_tuning"),
        ("openai.videos", "/v1/videos", {}, "video"),
        (None, "/v1/models/veo-3:predictLongRunning", {}, "video"),
        ("openai.chat", CHAT, {}, None),
        ("gemini.embed", "/v1/models/e:batchEmbedContents", {}, None),
    ],
)
def test_endpoints_without_a_bound(api: str | None, path: str, body: Any, kind: str | None) -> None:
    assert _asked(api, body, path=path).unbounded == kind


@pytest.mark.parametrize(
    ("api", "method"),
    [
        ("openai.models", "GET"),
        ("anthropic.count_tokens", "POST"),
        ("openai.moderations", "POST"),
        ("openai.files", "POST"),
        ("openai.responses.retrieve", "GET"),
        ("openai.batches", "GET"),
        ("openai.chat", "GET"),
    ],
)
def test_endpoints_that_cost_nothing_are_not_counted(api: str, method: str) -> None:
    asked = describe(api, "openai", method, "/v1/x", b"")

    assert not asked.counted
    assert asked.input_tokens == 0


def test_a_realtime_session_is_counted_though_a_get_opens_it() -> None:
    asked = describe("openai.realtime", "openai", "GET", "/v1/realtime?model=x", b"")

    assert (asked.counted, asked.unbounded) == (True, "realtime")


@pytest.mark.parametrize("api", ["openai.embeddings", "gemini.embed", "cohere.embed", "cohere.rerank"])
def test_embeddings_have_no_output(api: str) -> None:
    assert not _asked(api, {"model": "text-embedding-3-small", "input": "hi"}).output


# ---------------------------------------------------------------- the input


def test_an_image_counts_by_rule_and_not_by_its_bytes() -> None:
    pixels = base64.b64encode(os.urandom(300_000)).decode()
    block = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{pixels}"}}

    asked = _chat(messages=[{"role": "user", "content": [block, {"type": "text", "text": "what is this?"}]}])

    assert image_tokens("gpt-4o") <= asked.input_tokens < image_tokens("gpt-4o") + 300
    assert asked.opaque == ()
    assert asked.kinds == ("image",)


@pytest.mark.parametrize(
    ("api", "part"),
    [
        ("anthropic.messages", {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "D"}}),
        ("gemini.generate", {"inlineData": {"mimeType": "image/png", "data": "D"}}),
        ("bedrock.converse", {"image": {"format": "png", "source": {"bytes": "D"}}}),
        ("openai.responses", {"type": "input_image", "image_url": "data:image/png;base64,D"}),
    ],
)
def test_every_providers_place_for_an_image_is_known(api: str, part: Any) -> None:
    pixels = base64.b64encode(os.urandom(90_000)).decode()
    text = json.dumps({"model": "gpt-4o", "input": [{"content": [part]}]}).replace('"D"', f'"{pixels}"')

    asked = _asked(api, text.replace("base64,D", f"base64,{pixels}").encode())

    assert asked.input_tokens < image_tokens("gpt-4o") + 1_000
    assert asked.kinds == ("image",)


def test_media_in_a_place_where_the_provider_reads_text_is_text() -> None:
    pixels = base64.b64encode(os.urandom(30_000)).decode()

    as_text = _chat(messages=[{"role": "user", "content": f"data:image/png;base64,{pixels}"}])
    as_argument = _chat(tools=[{"source": {"media_type": "image/png", "data": pixels}}])

    assert as_text.input_tokens > 20_000
    assert as_argument.input_tokens > 20_000


def test_text_that_only_pretends_to_be_an_image_is_text() -> None:
    block = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "not base64! " * 5_000}}

    assert _asked("anthropic.messages", {"messages": [{"content": [block]}]}).input_tokens > 10_000


def test_sound_is_billed_as_sound() -> None:
    block = {"type": "input_audio", "input_audio": {"data": base64.b64encode(bytes(40_000)).decode(), "format": "wav"}}

    asked = _chat(messages=[{"role": "user", "content": [block]}])

    assert asked.kinds == ("audio",)
    assert asked.input_tokens > 2_000


def test_cache_marks_say_which_writes_can_be_billed() -> None:
    def kinds(mark: Any) -> Any:
        return _asked("anthropic.messages", {"system": [{"type": "text", "text": "a", "cache_control": mark}]}).kinds

    assert kinds({"type": "ephemeral"}) == ("cache_write",)
    assert kinds({"type": "ephemeral", "ttl": "1h"}) == ("cache_write", "cache_write_1h")


def test_thinking_is_seen() -> None:
    assert _asked("anthropic.messages", {"thinking": {"type": "enabled", "budget_tokens": 9}}).thinks
    assert not _asked("anthropic.messages", {"thinking": {"type": "disabled"}}).thinks


def test_escaped_text_counts_like_the_text_it_is() -> None:
    chinese = "人人生而自由" * 200
    plain = json.dumps({"messages": [{"content": chinese}]}, ensure_ascii=False).encode()
    escaped = json.dumps({"messages": [{"content": chinese}]}).encode()

    assert abs(_asked("openai.chat", plain).input_tokens - _asked("openai.chat", escaped).input_tokens) < 5


def test_a_compressed_body_is_read_on_a_copy() -> None:
    body = json.dumps({"model": "gpt-4o", "max_tokens": 5, "messages": [{"content": "hello " * 500}]}).encode()
    plain = _asked("openai.chat", body)

    zipped = replace(plain, cappable=False)  # nothing is written into what is compressed
    assert _asked("openai.chat", gzip.compress(body), content_encoding="gzip") == zipped
    assert _asked("openai.chat", zlib.compress(body), content_encoding="deflate") == zipped


def test_a_bomb_is_inflated_only_so_far() -> None:
    bomb = gzip.compress(b'{"model": "gpt-4o", "messages": [' + b" " * 50_000_000 + b"]}")

    asked = _asked("openai.chat", bomb, content_encoding="gzip")

    assert asked.model == "gpt-4o"
    assert "body" in asked.opaque


def test_a_coding_that_nobody_knows_is_opaque() -> None:
    asked = _asked("openai.chat", b"x" * 1_000, content_encoding="br")

    assert asked.opaque == ("content_encoding",)
    assert asked.input_tokens >= 1_000


def test_the_rest_of_a_body_that_was_not_read_counts_by_its_bytes() -> None:
    start = (
        b'{"metadata": {"model": "cheap"}, "max_tokens": 1, "model": "gpt-4o", "messages": [{"content": "' + b"a" * 99
    )

    asked = _asked("openai.chat", start, body_complete=False, total_bytes=len(start) + 70_000)

    assert asked.input_tokens >= 70_000
    assert asked.model == "gpt-4o"
    assert asked.cap is None
    assert "body" in asked.opaque


def test_a_form_field_counts_to_its_end_whatever_lines_it_has() -> None:
    prompt = b"a house by the sea\r\n" * 500
    form = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + prompt + b"\r\n--b--\r\n"

    asked = _asked("openai.images", form)

    assert asked.input_tokens >= upper_tokens(prompt)


@pytest.mark.parametrize(
    "body",
    [
        b"--Content-Disposition:" + b'name="a" ' * 100_000,
        b"--" + b"Content-Disposition:" * 50_000,
        b"--" + b'Content-Disposition: name="a"\r\n\r\n' * 30_000,
        b'"\\' * 500_000,
        b'{"' * 500_000,
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_a_hostile_megabyte_is_read_in_a_moment(body: bytes, complete: bool) -> None:
    started = time.process_time()

    _asked(None, body, body_complete=complete)

    assert time.process_time() - started < 2  # it took hours where each quote was tried as the start of a string


def test_a_form_with_sound_counts_by_its_size() -> None:
    form = (
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.mp3"\r\n'
        b"Content-Type: audio/mpeg\r\n\r\n" + bytes(200_000) + b"\r\n--b--\r\n"
    )

    asked = _asked("openai.audio", form)

    assert asked.model == "whisper-1"
    assert asked.input_tokens > 10_000
    assert asked.kinds == ("audio",)


# ---------------------------------------------------------------- hostile bodies


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "model",
    "messages",
    "n",
    "max_tokens",
    "max_completion_tokens",
    "stream",
    "stream_options",
    "tools",
    "thinking",
    "prompt",
    "input",
    "background",
    "generationConfig",
    "options",
    "service_tier",
    "speed",
    "container",
    "mcp_servers",
    "contents",
    "source",
    "data",
    "url",
    "image_url",
    "images",
]


@settings(max_examples=300)
@given(
    body=st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=6),
    api=st.sampled_from([None, "openai.chat", "openai.responses", "anthropic.messages", "gemini.generate", "x"]),
)
def test_any_json_is_described_and_bounded_by_its_bytes_or_by_rules(body: Any, api: str | None) -> None:
    data = json.dumps(body).encode()

    asked = _asked(api, data)

    assert asked.input_tokens >= min(len(data), 2)
    assert asked.cap is None or 0 < asked.cap <= 1_000_000_000
    assert 1 <= asked.choices <= 10_000


@given(st.binary(max_size=500), st.sampled_from([None, "gzip", "deflate", "br", "", "gzip, gzip"]), st.booleans())
def test_any_bytes_are_described(data: bytes, coding: str | None, complete: bool) -> None:
    asked = _asked("openai.chat", data, content_encoding=coding, body_complete=complete)

    assert asked.input_tokens >= 0


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"image":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"messages": "\xff\xfe"}',
        b'{"max_tokens": 1e999}',
        b'{"max_tokens": NaN}',
        b'{"model": "' + b"x" * 100_000 + b'"}',
        b'{"model": "a", "model": "gpt-4o"}',
        b"null",
        b"",
        b"--",
    ],
)
def test_hostile_bodies_never_raise(body: bytes) -> None:
    asked = _asked("openai.chat", body)

    assert asked.input_tokens >= min(upper_tokens(body), len(body)) // 2
    assert asked.model is None or len(asked.model) <= 256


# ---------------------------------------------------------------- recorded exchanges


def _corpus() -> Path | None:
    named = os.environ.get("LLM_GUARD_CORPUS")
    places = [Path(named)] if named else [Path(__file__).parents[3] / "shared" / "corpus"]
    return next((place / "visible.jsonl.gz" for place in places if (place / "visible.jsonl.gz").is_file()), None)


def test_the_estimate_bounds_what_providers_counted_for_recorded_requests(capsys: pytest.CaptureFixture[str]) -> None:
    corpus = _corpus()
    if corpus is None:
        pytest.skip("the recorded exchanges do not lie beside this checkout")
    bounded, below = 0, []

    with gzip.open(corpus, "rt") as rows:
        for row in map(json.loads, rows):
            said = row["expected"]["input_tokens"]
            if not said or row["request_body"] is None or row["method"] != "POST":
                continue
            path = "/" + row["url_path"].partition("/")[2]
            asked = _asked(row["api"], row["request_body"], path=path, provider=row["provider"])
            if asked.opaque or not asked.counted:
                continue
            bounded += 1
            if asked.input_tokens < said:
                below.append((row["id"], said, asked.input_tokens))

    with capsys.disabled():
        print(f"\nestimates: {bounded - len(below)} of {bounded} recorded requests are bounded")
    # The few others were recorded with a shortened prompt, or through a router that added one of its own.
    assert len(below) <= bounded // 100, below
