"""What a real request claims, and what is written into it: never a cap that the provider does not hear of."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

import pytest

from llm_guard_mw import process
from llm_guard_mw.call import Exchange, enter, leave
from llm_guard_mw.capture.exchange import Outgoing, Tap, asked_by
from llm_guard_mw.guard import Guard
from llm_guard_mw.http import HttpRequest

Install = Callable[..., process.Installation]
OPENAI = "api.openai.com"
ASK: Any = [{"role": "user", "content": "Why?"}]


def begun(installed: process.Installation, outgoing: Outgoing) -> Exchange:
    asked = asked_by(outgoing)
    assert asked is not None
    exchange = Guard(installed.desk).begin(asked)
    assert isinstance(exchange, Exchange)
    return exchange


def post(path: str, body: dict[str, Any], *, host: str = OPENAI, zipped: bool = False) -> Outgoing:
    data = json.dumps(body).encode()
    if zipped:
        return Outgoing("POST", host, path, ((b"content-encoding", b"gzip"),), gzip.compress(data))
    return Outgoing("POST", host, path, (), data)


@pytest.mark.parametrize("host", [OPENAI, "llm.internal"])
def test_a_reasoning_model_is_capped_in_the_field_that_it_takes(guarded: Install, host: str) -> None:
    installed = guarded(limits=["$100/day global"])
    outgoing = post("/v1/chat/completions", {"model": "gpt-5-mini", "messages": ASK}, host=host)
    tap = Tap(installed.desk, begun(installed, outgoing))

    body = json.loads(tap.rewritten(outgoing).body)
    tap.unsent()

    assert "max_completion_tokens" in body
    assert "max_tokens" not in body


@pytest.mark.parametrize(
    ("host", "path"),
    [
        (OPENAI, "/v1/batches"),
        (OPENAI, "/v1/responses/compact"),
        (OPENAI, "/v1/videos"),
        (OPENAI, "/v1/threads/runs"),
        ("api.anthropic.com", "/v1/messages/batches"),
        ("generativelanguage.googleapis.com", "/v1beta/cachedContents"),
        ("generativelanguage.googleapis.com", "/v1beta/interactions"),
    ],
)
def test_a_request_without_a_place_for_a_cap_leaves_as_it_came(guarded: Install, host: str, path: str) -> None:
    installed = guarded(limits=["1000 requests/minute global"], unbounded="allow")
    outgoing = post(path, {"model": "gpt-4o", "input": "x"}, host=host)
    tap = Tap(installed.desk, begun(installed, outgoing))

    assert tap.rewritten(outgoing) is outgoing
    tap.unsent()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_cap_is_only_lowered_where_it_can_be_written(guarded: Install, zipped: bool) -> None:
    guarded_by = guarded(limits=["5000 tokens/day global"])
    outgoing = post("/v1/chat/completions", {"model": "gpt-4o", "messages": ASK, "max_tokens": 9000}, zipped=zipped)
    asked = asked_by(outgoing)
    assert asked is not None

    outcome = Guard(guarded_by.desk).begin(asked)

    if zipped:
        assert not isinstance(outcome, Exchange)
    else:
        assert isinstance(outcome, Exchange)
        assert outcome.cap is not None
        assert outcome.cap < 5000


def test_a_routes_cap_bounds_nothing_that_it_cannot_be_written_into(guarded: Install) -> None:
    installed = guarded(
        limits=["$100/day global"],
        identity={"anonymous": "shared"},
        routes=[{"path": "/chat", "model": "gpt-4o", "max_output_tokens": 10}],
    )

    guard = Guard(installed.desk)
    route = installed.config.policy.routes[0]
    call = guard.call_for(HttpRequest("POST", "/chat"), route)
    token = enter(call)
    try:
        exchange = begun(installed, post("/v1/chat/completions", {"model": "gpt-4o", "messages": ASK}, zipped=True))
    finally:
        leave(token)

    assert exchange.draft.estimated_output_tokens == 16_384
    guard.finish(exchange, None, status=None, ending="not_sent")


def test_many_texts_in_one_request_are_not_bounded_by_the_window_of_one(guarded: Install) -> None:
    installed = guarded(limits=["$100/day global"])
    texts = ["zygomorphic quixotry " * 200] * 100

    exchange = begun(installed, post("/v1/embeddings", {"model": "text-embedding-3-small", "input": texts}))

    assert (exchange.draft.estimated_input_tokens or 0) > 80_000  # one text may have 8192
