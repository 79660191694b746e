"""Other makers' calls through a capture: held by their requests, settled by their own bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_guard_mw.call import Exchange
from llm_guard_mw.capture.exchange import Outgoing, Tap, asked_by
from llm_guard_mw.process import Guard
from tests.capture.conftest import Books

GOLDEN = Path(__file__).parents[1] / "golden" / "metering"
INDEX: dict[str, dict[str, Any]] = json.loads((GOLDEN / "index.json").read_text())
BEDROCK = "bedrock-runtime.us-east-1.amazonaws.com"
CONVERSE = {"messages": [{"role": "user", "content": [{"text": "tide?"}]}], "inferenceConfig": {"maxTokens": 60}}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "tide?"}], "max_tokens": 60}


@pytest.mark.parametrize(
    ("host", "target", "body", "name"),
    [
        (BEDROCK, "/model/us.amazon.nova-lite-v1%3A0/converse-stream", CONVERSE, "bedrock_converse.frames"),
        (BEDROCK, "/model/us.amazon.nova-lite-v1%3A0/converse", CONVERSE, "bedrock_converse.json"),
        (BEDROCK, "/model/mistral.m/invoke", {"prompt": "tide?", "max_tokens": 60}, "bedrock_invoke_only_headers.json"),
        (
            BEDROCK,
            "/model/anthropic.claude-haiku-4-5/invoke-with-response-stream",
            {"messages": [{"role": "user", "content": "tide?"}], "max_tokens": 60},
            "bedrock_invoke_claude.frames",
        ),
        ("api.cohere.com", "/v2/chat", {**CHAT, "model": "command-r7b-12-2024", "stream": True}, "cohere_chat_v2.sse"),
        ("api.cohere.com", "/v1/chat", {"model": "command-r7b-12-2024", "message": "tide?"}, "cohere_chat_v1.ndjson"),
        ("localhost:11434", "/api/chat", {**CHAT, "options": {"num_predict": 60}}, "ollama_chat.ndjson"),
    ],
)
def test_a_captured_call_is_settled_by_its_makers_own_numbers(
    host: str, target: str, body: dict[str, Any], name: str, books: Books
) -> None:
    due = INDEX[name]
    outgoing = Outgoing("POST", host, target, (), json.dumps(body).encode())
    asked = asked_by(outgoing)
    assert asked is not None
    guard = Guard()
    exchange = guard.begin(asked)
    assert isinstance(exchange, Exchange)
    tap = Tap(guard.desk, exchange)
    headers = {"content-type": due["content_type"], **due.get("headers", {})}

    assert tap.prepared(outgoing)
    tap.head(200, tuple((name.encode(), value.encode()) for name, value in headers.items()))
    answer = (GOLDEN / name).read_bytes()
    for at in range(0, len(answer), 97):
        tap.chunk(answer[at : at + 97])
    tap.ended()

    [event] = books.settled()
    assert (event["basis"], event["api"], event["provider"]) == ("exact", due["api"], due["provider"])
    assert event["input_tokens"] == due["usage"]["input_tokens"]
    assert event["output_tokens"] == due["usage"]["output_tokens"]
