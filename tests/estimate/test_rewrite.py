"""Another model, a cap, a wish for usage: written into a request, and everything else as it was."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_guard_mw.estimate import describe, rewrite

CHAT = "/v1/chat/completions"


def test_everything_else_keeps_its_bytes_and_its_place() -> None:
    body = (
        b'{ "seed": 12345678901234567890123, "model" : "gpt-4o", "temperature": 1.10, "x": 1e2,\n'
        b'  "messages": [ {"role": "user",  "content": "\\u00e9 \\/"} ], "max_tokens": 50 }'
    )

    path, written = rewrite("openai.chat", CHAT, body, model="gpt-4o-mini", cap=20, provider="openai")

    assert path == CHAT
    assert written == (
        b'{"seed":12345678901234567890123,"model":"gpt-4o-mini","temperature":1.10,"x":1e2,'
        b'"messages":[ {"role": "user",  "content": "\\u00e9 \\/"} ],"max_tokens":20}'
    )


def test_a_request_with_nothing_to_change_is_the_same_bytes() -> None:
    body = b'{ "model": "gpt-4o" }'

    assert rewrite("openai.chat", CHAT, body) == (CHAT, body)


@pytest.mark.parametrize(
    ("api", "provider", "body", "expected"),
    [
        ("openai.chat", "openai", {}, {"max_completion_tokens": 9}),
        ("openai.chat", "azure", {}, {"max_completion_tokens": 9}),
        ("openai.chat", "mistral", {}, {"max_tokens": 9}),
        ("openai.chat", None, {}, {"max_tokens": 9}),
        ("openai.chat", "openai", {"max_tokens": 50}, {"max_tokens": 9}),
        ("openai.chat", "mistral", {"max_completion_tokens": 50}, {"max_completion_tokens": 9}),
        ("openai.chat", "openai", {"max_tokens": None}, {"max_tokens": None, "max_completion_tokens": 9}),
        ("openai.responses", "openai", {}, {"max_output_tokens": 9}),
        ("openai.completions", "openai", {}, {"max_tokens": 9}),
        ("anthropic.messages", "anthropic", {"max_tokens": 50}, {"max_tokens": 9}),
        ("gemini.generate", "google", {}, {"generationConfig": {"maxOutputTokens": 9}}),
        (
            "gemini.generate",
            "google",
            {"generationConfig": {"topK": 1, "maxOutputTokens": 50}},
            {"generationConfig": {"topK": 1, "maxOutputTokens": 9}},
        ),
        (
            "gemini.generate",
            "google",
            {"generation_config": {"max_output_tokens": 50}},
            {"generation_config": {"max_output_tokens": 9}},
        ),
        ("bedrock.converse", "bedrock", {"inferenceConfig": {}}, {"inferenceConfig": {"maxTokens": 9}}),
        ("ollama.chat", "ollama", {"options": {"seed": 1}}, {"options": {"seed": 1, "num_predict": 9}}),
        ("cohere.chat.v2", "cohere", {}, {"max_tokens": 9}),
    ],
)
def test_the_cap_is_written_where_the_provider_reads_it(
    api: str, provider: str | None, body: Any, expected: Any
) -> None:
    _, written = rewrite(api, "/v1/x", json.dumps(body).encode(), cap=9, provider=provider)

    assert json.loads(written) == expected
    assert describe(api, provider, "POST", "/v1/x", written).cap == 9


def test_a_reasoning_model_gets_the_cap_under_the_name_it_takes() -> None:
    body = b'{"model":"gpt-4o","max_tokens":50}'

    _, written = rewrite("openai.chat", CHAT, body, model="o4-mini", cap=40, provider="openai")

    assert json.loads(written) == {"model": "o4-mini", "max_completion_tokens": 40}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            "/v1beta/models/gemini-2.5-pro:streamGenerateContent?alt=sse",
            "/v1beta/models/gemini-2.5-flash:streamGenerateContent?alt=sse",
        ),
        (
            "/v1/projects/p/locations/l/publishers/google/models/gemini-2.5-pro:generateContent",
            "/v1/projects/p/locations/l/publishers/google/models/gemini-2.5-flash:generateContent",
        ),
        (
            "/openai/deployments/big/chat/completions?api-version=1",
            "/openai/deployments/gemini-2.5-flash/chat/completions?api-version=1",
        ),
    ],
)
def test_a_model_in_the_url_is_changed_there(path: str, expected: str) -> None:
    assert rewrite("gemini.generate", path, b'{"contents":[]}', model="gemini-2.5-flash") == (
        expected,
        b'{"contents":[]}',
    )


def test_a_bedrock_model_is_quoted_in_the_url() -> None:
    path, _ = rewrite("bedrock.converse", "/model/a.b-v1%3A0/converse", b"{}", model="us.c-v2:0")

    assert path == "/model/us.c-v2%3A0/converse"


def test_a_model_named_in_both_places_is_changed_in_both() -> None:
    path, body = rewrite("openai.chat", "/openai/deployments/a/chat/completions", b'{"model":"a"}', model="b")

    assert (path, body) == ("/openai/deployments/b/chat/completions", b'{"model":"b"}')


def test_usage_is_asked_of_a_stream_and_the_other_options_stay() -> None:
    body = b'{"stream":true,"stream_options":{"include_obfuscation":false}}'

    _, written = rewrite("openai.chat", CHAT, body, include_usage=True, provider="openai")

    assert json.loads(written)["stream_options"] == {"include_obfuscation": False, "include_usage": True}


@pytest.mark.parametrize(
    ("api", "provider", "path", "body"),
    [
        ("openai.chat", "openai", CHAT, b'{"stream":false}'),
        ("openai.chat", "openai", CHAT, b"{}"),
        ("openai.responses", "openai", "/v1/responses", b'{"stream":true}'),
        ("anthropic.messages", "anthropic", "/v1/messages", b'{"stream":true}'),
        ("openai.chat", "azure", "/openai/deployments/a/chat/completions?api-version=2024-06-01", b'{"stream":true}'),
    ],
)
def test_usage_is_not_asked_where_asking_is_an_error(api: str, provider: str, path: str, body: bytes) -> None:
    assert rewrite(api, path, body, include_usage=True, provider=provider) == (path, body)


def test_an_azure_of_our_days_is_asked_for_usage() -> None:
    path = "/openai/deployments/a/chat/completions?api-version=2024-12-01-preview"

    _, written = rewrite("openai.chat", path, b'{"stream":true}', include_usage=True, provider="azure")

    assert json.loads(written)["stream_options"] == {"include_usage": True}


@given(st.binary(max_size=200))
def test_bytes_that_are_no_json_object_come_back(body: bytes) -> None:
    path, written = rewrite("openai.chat", CHAT, body, model="m", cap=3, include_usage=True)

    assert path == CHAT
    try:
        is_object = isinstance(json.loads(body), dict)
    except (ValueError, RecursionError):
        is_object = False
    assert is_object or written == body


@given(
    fields=st.dictionaries(
        st.text(max_size=8).filter(lambda name: name not in ("model", "max_tokens", "max_completion_tokens")),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=8) | st.floats(allow_nan=False, allow_infinity=False),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
            max_leaves=6,
        ),
        max_size=5,
    )
)
def test_unknown_fields_survive(fields: dict[str, Any]) -> None:
    _, written = rewrite(
        "openai.chat", CHAT, json.dumps(fields | {"model": "a"}).encode(), model="b", cap=7, provider="openai"
    )

    assert json.loads(written) == fields | {"model": "b", "max_completion_tokens": 7}
    assert list(json.loads(written)) == [*fields, "model", "max_completion_tokens"]
