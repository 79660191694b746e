"""The official SDKs take our refusal for their provider's: their own RateLimitError, after one attempt."""

import time

import anthropic
import httpx2
import openai
import pytest
from google import genai
from google.genai import errors as genai_errors
from google.genai.types import HttpOptions

from llm_guard_mw.errors import IdentityError
from llm_guard_mw.http import Answer, identity_answer, refusal_answer
from llm_guard_mw.model import Refusal, Shortfall

NOW = 1_795_219_200_000

SPENT = Shortfall("$2/day per user", "day", "budget_spent", 2 * 10**9, 0, 3_600_000, NOW + 3_600_000)
SOON = Shortfall("20 requests/minute per user", "rpm", "rate_limited", 20, 0, 2_500)


class Provider:
    """A transport that gives every request the same answer, and counts the attempts."""

    def __init__(self, answer: Answer) -> None:
        self.attempts = 0
        self.answer = answer

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.attempts += 1
        return httpx2.Response(self.answer.status, headers=list(self.answer.headers), content=self.answer.body)


def ask_openai_chat(provider: Provider) -> None:
    with (
        httpx2.Client(transport=httpx2.MockTransport(provider)) as http,
        openai.OpenAI(api_key="k", http_client=http) as client,
    ):
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "hi"}])


def stream_openai_responses(provider: Provider) -> None:
    with (
        httpx2.Client(transport=httpx2.MockTransport(provider)) as http,
        openai.OpenAI(api_key="k", http_client=http) as client,
    ):
        client.responses.create(model="gpt-4o", input="hi", stream=True)


def ask_anthropic(provider: Provider) -> None:
    with (
        httpx2.Client(transport=httpx2.MockTransport(provider)) as http,
        anthropic.Anthropic(api_key="k", http_client=http) as client,
    ):
        client.messages.create(model="claude-haiku-4-5", max_tokens=5, messages=[{"role": "user", "content": "hi"}])


def ask_gemini(provider: Provider) -> None:
    transport = httpx2.MockTransport(provider)
    client = genai.Client(api_key="k", http_options=HttpOptions(client_args={"transport": transport}))
    client.models.generate_content(model="gemini-2.5-flash", contents="hi")


@pytest.fixture
def naps(monkeypatch) -> list[float]:
    """What an SDK would sleep before its next attempt."""
    taken: list[float] = []
    monkeypatch.setattr(time, "sleep", taken.append)
    return taken


@pytest.mark.parametrize(
    ("api", "ask", "error"),
    [
        ("openai.chat", ask_openai_chat, openai.RateLimitError),
        ("openai.responses", stream_openai_responses, openai.RateLimitError),
        ("anthropic.messages", ask_anthropic, anthropic.RateLimitError),
    ],
)
def test_a_spent_budget_is_the_sdks_own_rate_limit_error_after_one_attempt(api, ask, error, naps):
    provider = Provider(refusal_answer(Refusal((SPENT,), NOW, call_id="call-1", api=api)))

    with pytest.raises(error, match=r"\$2/day per user"):
        ask(provider)

    assert provider.attempts == 1
    assert naps == []


def test_openai_reads_our_code_limit_and_reset_off_its_error(naps):
    provider = Provider(refusal_answer(Refusal((SPENT,), NOW, api="openai.chat")))

    with pytest.raises(openai.RateLimitError) as caught:
        ask_openai_chat(provider)

    assert caught.value.code == "budget_spent"
    assert caught.value.type == "insufficient_quota"
    assert caught.value.body["limit"] == "$2/day per user"
    assert caught.value.body["reset_at"] == "2026-11-21T01:00:00Z"


def test_anthropic_reads_our_code_limit_and_reset_off_its_error(naps):
    provider = Provider(refusal_answer(Refusal((SPENT,), NOW, api="anthropic.messages")))

    with pytest.raises(anthropic.RateLimitError) as caught:
        ask_anthropic(provider)

    assert caught.value.body["error"]["code"] == "budget_spent"
    assert caught.value.body["error"]["limit"] == "$2/day per user"


@pytest.mark.parametrize("shortfall", [SPENT, SOON])
def test_google_genai_raises_its_client_error_after_one_attempt(shortfall, naps):
    provider = Provider(refusal_answer(Refusal((shortfall,), NOW, api="gemini.generate")))

    with pytest.raises(genai_errors.ClientError) as caught:
        ask_gemini(provider)

    assert provider.attempts == 1
    assert caught.value.code == 429
    assert caught.value.status == "RESOURCE_EXHAUSTED"
    assert shortfall.limit in caught.value.message
    assert caught.value.details["error"]["reason"] == shortfall.code


@pytest.mark.parametrize(
    ("api", "ask", "error"),
    [
        ("openai.chat", ask_openai_chat, openai.RateLimitError),
        ("anthropic.messages", ask_anthropic, anthropic.RateLimitError),
    ],
)
def test_a_short_rate_limit_is_waited_out_by_the_sdk_as_long_as_we_say(api, ask, error, naps):
    provider = Provider(refusal_answer(Refusal((SOON,), NOW, api=api)))

    with pytest.raises(error):
        ask(provider)

    assert provider.attempts == 3
    assert naps == [3.0, 3.0]


@pytest.mark.parametrize(
    ("api", "ask", "error"),
    [
        ("openai.chat", ask_openai_chat, openai.AuthenticationError),
        ("anthropic.messages", ask_anthropic, anthropic.AuthenticationError),
        ("gemini.generate", ask_gemini, genai_errors.ClientError),
    ],
)
def test_an_unknown_identity_is_the_sdks_own_authentication_error(api, ask, error, naps):
    provider = Provider(identity_answer(IdentityError("no identity"), api=api))

    with pytest.raises(error):
        ask(provider)

    assert provider.attempts == 1
