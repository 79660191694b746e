"""What a refused caller is told: status, headers and body of the contract."""

import json

import pytest

from llm_guard_mw.errors import IdentityError, StoreUnavailable
from llm_guard_mw.http import Answer, describe_refusal, identity_answer, refusal_answer, unavailable_answer
from llm_guard_mw.model import Refusal, Shortfall

NOW = 1_795_219_200_000  # 2026-11-21T00:00:00Z
TOMORROW = NOW + 86_400_000

SPENT = Shortfall(
    limit="$2/day per user",
    name="2-day-per-user",
    code="budget_spent",
    ceiling=2_000_000_000,
    left=12_500_000,
    wait_ms=TOMORROW - NOW,
    reset_at=TOMORROW,
)
RATE = Shortfall(
    limit="20 requests/minute per user", name="rpm", code="rate_limited", ceiling=20, left=0, wait_ms=2_001
)
BUSY = Shortfall(limit="2 concurrent per user", name="busy", code="concurrency", ceiling=2, left=0)
HELD = Shortfall(
    limit="$500/month per tenant",
    name="month",
    code="budget_spent",
    ceiling=500 * 10**9,
    left=0,
    wait_ms=TOMORROW - NOW,
    reset_at=TOMORROW,
    by_holds=True,
)
PREPAID = Shortfall(limit="$5 total per key", name="prepaid", code="budget_spent", ceiling=5 * 10**9, left=0)
HUGE = Shortfall(
    limit="40k tokens/minute per user burst 80k", name="tpm", code="never_fits", ceiling=80_000, left=80_000
)


def refusal(*shortfalls: Shortfall, api: str | None = None) -> Refusal:
    return Refusal(shortfalls=shortfalls, at=NOW, call_id="call-1", api=api)


def header(answer: Answer, name: bytes) -> bytes | None:
    values = [value for candidate, value in answer.headers if candidate == name]
    assert len(values) <= 1
    return values[0] if values else None


def test_a_spent_budget_is_a_problem_document_that_names_the_limit_and_its_reset():
    answer = refusal_answer(refusal(SPENT))

    assert answer.status == 429
    assert header(answer, b"content-type") == b"application/problem+json"
    assert header(answer, b"content-length") == b"%d" % len(answer.body)
    assert json.loads(answer.body) == {
        "type": "https://iana.org/assignments/http-problem-types#quota-exceeded",
        "title": "Quota exceeded",
        "status": 429,
        "detail": 'The limit "$2/day per user" does not cover this request: $0.0125 left of $2.00. '
        "It resets at 2026-11-22T00:00:00Z.",
        "violated-policies": ["2-day-per-user"],
        "reset_at": "2026-11-22T00:00:00Z",
        "limit": "$2/day per user",
        "code": "budget_spent",
    }


def test_every_refusal_carries_the_decision_and_the_request_id():
    answer = refusal_answer(refusal(SPENT))

    assert header(answer, b"x-llm-guard-decision") == b"reject"
    assert header(answer, b"x-llm-guard-request-id") == b"call-1"


@pytest.mark.parametrize(
    ("shortfalls", "retry_after", "should_retry"),
    [
        pytest.param((SPENT,), b"86400", b"false", id="a calendar budget: until its reset"),
        pytest.param((RATE,), b"3", None, id="a bucket: its wait, rounded up"),
        pytest.param((PREPAID,), None, b"false", id="a total never comes back"),
        pytest.param((HUGE,), None, b"false", id="what never fits"),
        pytest.param((BUSY,), b"1", None, id="concurrency: soon"),
        pytest.param((HELD,), b"1", None, id="others' holds: soon"),
        pytest.param((RATE, SPENT, BUSY), b"86400", b"false", id="of several the longest wait"),
        pytest.param((HELD, SPENT), b"86400", b"false", id="holds of others are not the only reason"),
        pytest.param((SPENT, PREPAID), None, b"false", id="one that never comes back outlasts all"),
        pytest.param((SPENT, HUGE), None, b"false", id="one that never fits decides"),
    ],
)
def test_retry_after_and_should_retry_tell_whether_waiting_helps(shortfalls, retry_after, should_retry):
    answer = refusal_answer(refusal(*shortfalls))

    assert header(answer, b"retry-after") == retry_after
    assert header(answer, b"x-should-retry") == should_retry


@pytest.mark.parametrize(("wait_ms", "should_retry"), [(0, None), (5_000, None), (5_001, b"false")])
def test_more_than_five_seconds_are_not_worth_an_sdks_retry(wait_ms, should_retry):
    slow = Shortfall(
        limit="1 requests/minute per user", name="s", code="rate_limited", ceiling=1, left=0, wait_ms=wait_ms
    )

    answer = refusal_answer(refusal(slow))

    assert header(answer, b"x-should-retry") == should_retry
    assert int(header(answer, b"retry-after") or b"0") >= 1


def test_the_limit_that_decides_is_named_first_and_all_are_listed():
    answer = json.loads(refusal_answer(refusal(RATE, SPENT)).body)

    assert answer["limit"] == "$2/day per user"
    assert answer["code"] == "budget_spent"
    assert answer["violated-policies"] == ["rpm", "2-day-per-user"]
    assert 'Also in the way: "20 requests/minute per user".' in answer["detail"]


@pytest.mark.parametrize(
    ("shortfall", "sentence"),
    [
        (RATE, 'The limit "20 requests/minute per user" is reached: 0 requests left of 20 requests. Try again in 3 s.'),
        (
            BUSY,
            'The limit "2 concurrent per user" is reached: 0 concurrent calls left of 2 concurrent calls. '
            "Try again when one of them has ended.",
        ),
        (
            HELD,
            'The limit "$500/month per tenant" is held by calls that are still running: $0.00 left of $500.00. '
            "Try again in a second.",
        ),
        (
            PREPAID,
            'The limit "$5 total per key" does not cover this request: $0.00 left of $5.00. It does not reset.',
        ),
        (
            HUGE,
            'The limit "40k tokens/minute per user burst 80k" can never grant a request of this size: '
            "it holds 80,000 tokens at most. Waiting does not help.",
        ),
    ],
)
def test_the_message_says_which_limit_how_much_is_left_and_when_it_comes_back(shortfall, sentence):
    assert describe_refusal(refusal(shortfall)) == sentence


def test_what_never_fits_is_told_no_reset_for_that_would_invite_a_retry():
    larger_than_the_day = Shortfall(
        limit="$2/day per user", name="d", code="never_fits", ceiling=2 * 10**9, left=2 * 10**9, reset_at=TOMORROW
    )

    answer = refusal_answer(refusal(larger_than_the_day))

    assert json.loads(answer.body)["reset_at"] is None


def test_a_window_that_ends_after_all_calendars_never_resets():
    forever = Shortfall(limit="$5 total per key", name="p", code="budget_spent", ceiling=5, left=0, reset_at=2**53 - 1)

    answer = refusal_answer(refusal(forever))

    assert json.loads(answer.body)["reset_at"] is None
    assert header(answer, b"retry-after") is None


def test_openai_routes_get_openais_error_with_our_code_in_its_code():
    error = json.loads(refusal_answer(refusal(SPENT, api="openai.responses")).body)["error"]

    assert error["type"] == "insufficient_quota"
    assert error["param"] is None
    assert error["code"] == "budget_spent"
    assert error["limit"] == "$2/day per user"
    assert error["reset_at"] == "2026-11-22T00:00:00Z"
    assert error["violated-policies"] == ["2-day-per-user"]
    assert error["message"].startswith('The limit "$2/day per user"')


@pytest.mark.parametrize("shortfall", [RATE, BUSY])
def test_openais_type_tells_rates_from_money(shortfall):
    error = json.loads(refusal_answer(refusal(shortfall, api="openai.chat")).body)["error"]

    assert error["type"] == "rate_limit_exceeded"


def test_anthropic_routes_get_anthropics_error():
    body = json.loads(refusal_answer(refusal(SPENT, api="anthropic.messages")).body)

    assert body["type"] == "error"
    assert body["request_id"] == "call-1"
    assert body["error"]["type"] == "rate_limit_error"
    assert body["error"]["code"] == "budget_spent"
    assert body["error"]["limit"] == "$2/day per user"
    assert body["error"]["reset_at"] == "2026-11-22T00:00:00Z"


def test_gemini_routes_get_googles_error_whose_code_stays_a_number():
    error = json.loads(refusal_answer(refusal(RATE, api="gemini.generate")).body)["error"]

    assert error["code"] == 429
    assert error["status"] == "RESOURCE_EXHAUSTED"
    assert error["reason"] == "rate_limited"
    assert error["limit"] == "20 requests/minute per user"
    assert error["reset_at"] is None
    assert error["details"] == [
        {
            "@type": "type.googleapis.com/google.rpc.ErrorInfo",
            "reason": "RATE_LIMITED",
            "domain": "llm_guard_mw",
            "metadata": {"code": "rate_limited", "limit": "20 requests/minute per user"},
        },
        {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "3s"},
    ]


def test_a_shape_we_do_not_know_gets_the_problem_document():
    answer = refusal_answer(refusal(SPENT, api="bedrock.converse"))

    assert header(answer, b"content-type") == b"application/problem+json"


def test_an_identity_that_stayed_unknown_is_a_401_with_a_challenge():
    answer = refusal_answer(Refusal(shortfalls=(), at=NOW, call_id="call-1", status=401))

    body = json.loads(answer.body)
    assert answer.status == 401
    assert header(answer, b"www-authenticate") == b"Bearer"
    assert header(answer, b"retry-after") is None
    assert (body["code"], body["limit"], body["reset_at"]) == ("unauthenticated", None, None)


@pytest.mark.parametrize(
    ("api", "told"),
    [
        ("openai.chat", "invalid_request_error"),
        ("anthropic.messages", "authentication_error"),
    ],
)
def test_an_identity_error_speaks_the_routes_shape(api, told):
    answer = identity_answer(IdentityError("jwt:sub: the token has expired"), api=api, call_id="call-1")

    assert answer.status == 401
    assert json.loads(answer.body)["error"]["type"] == told
    assert header(answer, b"x-should-retry") == b"false"
    assert header(answer, b"x-llm-guard-request-id") == b"call-1"


def test_keys_that_are_still_on_their_way_are_a_503_and_not_the_callers_fault():
    answer = identity_answer(IdentityError("jwt:sub: the signing keys are being fetched", retry_after_seconds=1))

    assert answer.status == 503
    assert header(answer, b"retry-after") == b"1"
    assert header(answer, b"www-authenticate") is None


@pytest.mark.parametrize(
    ("api", "path", "told"),
    [
        (None, ("type",), "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"),
        ("openai.chat", ("error", "type"), "server_error"),
        ("anthropic.messages", ("error", "type"), "overloaded_error"),
        ("gemini.generate", ("error", "status"), "UNAVAILABLE"),
    ],
)
def test_a_store_that_is_away_is_a_503_without_its_own_words(api, path, told):
    answer = unavailable_answer(StoreUnavailable("redis://10.1.2.3 timed out", retry_after_seconds=2), api=api)

    found = json.loads(answer.body)
    for step in path:
        found = found[step]
    assert found == told
    assert answer.status == 503
    assert header(answer, b"retry-after") == b"2"
    assert b"10.1.2.3" not in answer.body


def test_text_that_no_encoding_knows_breaks_neither_body_nor_headers():
    odd = Shortfall(limit="$1/day per \ud800\r\nuser", name="\ud800", code="budget_spent", ceiling=1, left=0)

    for api in (None, "openai.chat", "anthropic.messages", "gemini.generate"):
        answer = refusal_answer(Refusal((odd,), NOW, call_id="id\r\nSet-Cookie: a=b\ud800", api=api))

        json.loads(answer.body)
        for _, value in answer.headers:
            assert all(0x20 <= byte < 0x7F for byte in value)


def test_the_ratelimit_headers_of_the_door_ride_along():
    answer = refusal_answer(refusal(RATE), headers=((b"ratelimit", b'"rpm";r=0;t=3'),))

    assert header(answer, b"ratelimit") == b'"rpm";r=0;t=3'
