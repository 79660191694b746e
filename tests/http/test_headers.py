"""RateLimit fields, the headers of ours, and header lists."""

import string
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_guard_mw.http import (
    HttpRequest,
    Quota,
    amount_text,
    dollars,
    guard_headers,
    header_value,
    ratelimit_headers,
    replace,
    rfc3339,
    strip,
    unit_of,
    with_body_length,
)
from llm_guard_mw.model import Unit


def test_ratelimit_fields_are_lists_of_quoted_names_with_integers():
    headers = ratelimit_headers(
        [
            Quota("rpm", Unit.REQUESTS, 20, 60, 19, 3),
            Quota("day", Unit.USD, 2_000_000_000, 86_400, 1_234_567_899, 3600.2),
            Quota("tpm", Unit.TOKENS, 80_000, 60, 40_000, None),
            Quota("busy", Unit.CONCURRENT, 2, None, 1, None),
        ]
    )

    assert headers == (
        (
            b"ratelimit-policy",
            b'"rpm";q=20;w=60, "day";q=2000000;llm-guard-unit="micro-usd";w=86400, '
            b'"tpm";q=80000;llm-guard-unit="tokens";w=60, "busy";q=2;qu="concurrent-requests"',
        ),
        (b"ratelimit", b'"rpm";r=19;t=3, "day";r=1234567;t=3601, "tpm";r=40000, "busy";r=1'),
    )


def test_what_is_left_is_never_negative_and_never_beyond_a_structured_integer():
    (_, policy), (_, state) = ratelimit_headers([Quota("a", Unit.TOKENS, 2**53 - 1, 60, -5, -3.0)])

    assert policy == b'"a";q=999999999999999;llm-guard-unit="tokens";w=60'
    assert state == b'"a";r=0;t=0'


def test_no_quota_makes_no_header():
    assert ratelimit_headers([]) == ()


def test_plain_tuples_in_the_same_order_will_do():
    assert ratelimit_headers([("a", Unit.REQUESTS, 1, 1, 1, 1)])[1] == (b"ratelimit", b'"a";r=1;t=1')


@given(st.text())
def test_a_name_can_neither_end_its_quotes_nor_its_header(name):
    (_, policy), _ = ratelimit_headers([Quota(name, Unit.REQUESTS, 1, None, 1, None)])

    inside = policy.removesuffix(b";q=1")[1:-1]
    assert all(0x20 <= byte < 0x7F for byte in policy)
    assert b'"' not in inside.replace(b"\\\\", b"").replace(b'\\"', b"")


@given(st.text(alphabet=st.characters(), max_size=40))
def test_a_header_value_is_printable_ascii_and_two_texts_never_share_one(text):
    value = header_value(text)

    assert all(0x21 <= byte < 0x7F for byte in value)
    assert unquote(value.decode(), errors="surrogatepass") == text


def test_plain_names_stay_readable():
    assert header_value("call_01-a/b:c") == b"call_01-a/b:c"
    assert header_value("Zoë 100%\r\n") == b"Zo%C3%AB%20100%25%0D%0A"


def test_the_decision_names_the_model_that_was_taken_instead():
    headers = dict(guard_headers(call_id="c", decision="degrade", model="gpt-4o-mini", cost_nanos=42_000))

    assert headers == {
        b"x-llm-guard-request-id": b"c",
        b"x-llm-guard-decision": b"degrade;model=gpt-4o-mini",
        b"x-llm-guard-cost": b"0.000042",
    }


def test_a_model_name_cannot_add_to_the_decision():
    (_, (_, decision)) = guard_headers(call_id="c", decision="degrade", model="a;b, c\r\nx\ud800")

    assert decision == b"degrade;model=a%3Bb%2C%20c%0D%0Ax%3F"


@pytest.mark.parametrize(
    ("nanos", "text"),
    [
        (0, "$0.00"),
        (1, "$0.000000001"),
        (42_000, "$0.000042"),
        (500_000_000, "$0.50"),
        (1_999_999_999, "$1.99"),
        (1_234_500_000_000, "$1,234.50"),
    ],
)
def test_money_is_printed_as_dollars_and_never_rounded_up(nanos, text):
    assert dollars(nanos) == text


@pytest.mark.parametrize(
    ("notation", "unit"),
    [
        ("$2/day per user", Unit.USD),
        ("$0.001 total per key", Unit.USD),
        ("20 requests/minute per user", Unit.REQUESTS),
        ("40k tokens/minute per user burst 80k", Unit.TOKENS),
        ("40k input tokens/5 minutes per user", Unit.INPUT_TOKENS),
        ("1_000 output tokens/day per tenant+feature", Unit.OUTPUT_TOKENS),
        ("10 credits total per tenant", Unit.CREDITS),
        ("2 concurrent per user", Unit.CONCURRENT),
        ("", Unit.REQUESTS),
    ],
)
def test_the_unit_is_read_off_the_notation(notation, unit):
    assert unit_of(notation) is unit


def test_one_of_something_is_singular():
    assert amount_text(Unit.REQUESTS, 1) == "1 request"
    assert amount_text(Unit.INPUT_TOKENS, 12_000) == "12,000 input tokens"


def test_times_are_rfc3339_in_utc():
    assert rfc3339(1_795_219_200_000) == "2026-11-21T00:00:00Z"
    assert rfc3339(1_795_219_200_250) == "2026-11-21T00:00:00.250Z"


HEADERS = ((b"a", b"1"), (b"content-length", b"10"), (b"a", b"2"), (b"content-digest", b"sha-256=:x:"))


def test_headers_are_stripped_by_name():
    assert strip(HEADERS, {b"a"}) == HEADERS[1:2] + HEADERS[3:]


def test_a_replaced_header_stands_once():
    assert replace(HEADERS, b"a", b"3") == (HEADERS[1], HEADERS[3], (b"a", b"3"))


def test_a_rewritten_body_gets_its_length_and_loses_the_digests_of_the_old_one():
    chunked = (*HEADERS, (b"transfer-encoding", b"chunked"))

    assert with_body_length(chunked, 7) == (HEADERS[0], HEADERS[2], (b"content-length", b"7"))


def test_a_request_reads_its_headers():
    request = HttpRequest("POST", "/", headers=HEADERS)

    assert request.header(b"a") == b"1"
    assert request.header_values(b"a") == (b"1", b"2")
    assert request.header(b"b") is None


def test_a_request_shows_neither_its_body_nor_its_surroundings():
    shown = repr(HttpRequest("POST", "/", body=b"a prompt", surroundings={"session": "secret"}))

    assert "prompt" not in shown
    assert "secret" not in shown


def test_printable_ascii_but_percent_and_space_is_left_alone():
    plain = "".join(set(string.printable) - set(string.whitespace) - {"%"})

    assert header_value(plain) == plain.encode()
