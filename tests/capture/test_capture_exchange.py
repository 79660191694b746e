"""What stands between a granted exchange and the wire, and what a guard that cannot say yes answers."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from llm_guard_mw.call import Exchange
from llm_guard_mw.capture import capture
from llm_guard_mw.capture.exchange import Outgoing, Tap, asked_by
from llm_guard_mw.cli.demo.standin import StandIn
from llm_guard_mw.process import Guard

ASK: Any = [{"role": "user", "content": "Why?"}]


def chat_request(body: dict[str, Any]) -> Outgoing:
    headers = ((b"Host", b"x"), (b"Content-Length", b"9"), (b"Content-MD5", b"z"), (b"Accept-Encoding", b"gzip"))
    return Outgoing("POST", "api.openai.com", "/v1/chat/completions", headers, json.dumps(body).encode())


def granted(outgoing: Outgoing) -> tuple[Tap, Exchange]:
    asked = asked_by(outgoing)
    assert asked is not None
    guard = Guard()
    exchange = guard.begin(asked)
    assert isinstance(exchange, Exchange)
    return Tap(guard.desk, exchange), exchange


@pytest.mark.usefixtures("books")
def test_a_granted_request_carries_the_model_and_the_cap_that_were_granted() -> None:
    outgoing = chat_request({"model": "gpt-4o", "messages": ASK, "max_tokens": 900, "stream": True})
    tap, exchange = granted(outgoing)
    exchange.model, exchange.cap, exchange.ask_usage = "gpt-4o-mini", 300, True

    sent = tap.rewritten(outgoing)
    tap.unsent()

    body = json.loads(sent.body)
    assert (body["model"], body["max_tokens"]) == ("gpt-4o-mini", 300)
    assert body["stream_options"] == {"include_usage": True}
    headers = dict(sent.headers)
    assert headers[b"content-length"] == str(len(sent.body)).encode()
    assert headers[b"accept-encoding"] == b"identity"
    assert not {b"Content-MD5", b"Content-Length", b"Accept-Encoding"} & headers.keys()


@pytest.mark.usefixtures("books")
def test_a_gemini_request_names_its_model_in_the_url() -> None:
    body = json.dumps({"contents": [{"parts": [{"text": "Why?"}]}], "generationConfig": {"maxOutputTokens": 50}})
    target = "/v1beta/models/gemini-2.5-pro:streamGenerateContent?alt=sse"
    outgoing = Outgoing("post", "generativelanguage.googleapis.com", target, (), body.encode())
    tap, exchange = granted(outgoing)
    exchange.model = "gemini-2.5-flash"

    sent = tap.rewritten(outgoing)
    tap.unsent()

    assert sent.target == "/v1beta/models/gemini-2.5-flash:streamGenerateContent?alt=sse"


@pytest.mark.usefixtures("books")
def test_a_request_that_needs_no_change_is_the_same_object() -> None:
    outgoing = chat_request({"model": "gpt-4o", "messages": ASK, "max_tokens": 90})
    tap, exchange = granted(outgoing)
    exchange.cap = None

    assert tap.rewritten(outgoing) is outgoing
    tap.unsent()


def test_an_exchange_ends_once_whatever_is_said_later(books: Any) -> None:
    tap, _ = granted(chat_request({"model": "gpt-4o", "messages": ASK, "max_tokens": 90}))

    tap.unsent()
    tap.lost()
    tap.ended()
    tap.forgotten()

    assert [event["kind"] for event in books.events()] == ["release"]
    assert books.add_up()


@pytest.fixture
def store_is_away(guarded: Callable[..., Any], tmp_path: Path) -> Callable[[str], Any]:
    """A guard whose store cannot be opened: where its file should be is a folder."""
    (tmp_path / "folder.db").mkdir()
    return lambda rule: guarded(store=f"sqlite:///{tmp_path / 'folder.db'}", on_store_failure=rule)


def test_a_store_that_is_away_is_a_503(url: str, provider: StandIn, store_is_away: Callable[[str], Any]) -> None:
    store_is_away("deny")
    client = capture(openai.OpenAI(api_key="x", base_url=f"{url}/v1", max_retries=0))
    with client, pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="gpt-4o-mini", messages=ASK)

    assert caught.value.status_code == 503
    assert caught.value.code == "store_unavailable"
    assert not provider.rows


def test_a_store_that_is_away_lets_calls_pass_if_the_policy_says_so(
    url: str, provider: StandIn, store_is_away: Callable[[str], Any]
) -> None:
    store_is_away("allow")
    with capture(openai.OpenAI(api_key="x", base_url=f"{url}/v1", max_retries=0)) as client:
        client.chat.completions.create(model="gpt-4o-mini", messages=ASK)

    assert [row.status for row in provider.rows] == [200]


def test_capture_is_a_function_even_after_its_modules_were_imported() -> None:
    importlib.import_module("llm_guard_mw.capture.exchange")

    from llm_guard_mw import capture as found

    client = openai.OpenAI(api_key="x")
    assert found(client) is client
    client.close()


def test_capture_imports_no_sdk_and_no_aiohttp() -> None:
    script = (
        "import sys, llm_guard_mw.capture;"
        "print(sorted({'openai', 'anthropic', 'google.genai', 'aiohttp', 'httpx'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
