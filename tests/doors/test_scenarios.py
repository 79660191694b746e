"""One suite for every door: what callers, handlers and the books see of a guarded call, word for word."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import openai
import pytest

from llm_guard_mw.errors import LimitExceeded
from tests.doors.harness import (
    PROMPT,
    STRANGER,
    Ask,
    AsUser,
    AtOnce,
    Background,
    Charge,
    Do,
    Door,
    Embed,
    InThread,
    Later,
    Meet,
    Outcome,
    Outlive,
    Raise,
    Record,
    Say,
    Sent,
    SignIn,
    Tag,
    Wait,
    Words,
    until,
)

Open = Callable[..., Door]
RICH = "$1/day per user"
#: `Ask()` costs 14_550 nano-dollars and holds some 35_000.
TIGHT = {"limits": ["$0.00001/day per user"]}


# ---------------------------------------------------------------- granted


def test_a_granted_call_carries_the_headers_of_the_contract(door: Open) -> None:
    opened = door({"/api/chat": [Ask()]}, route={"limits": [RICH, "20 requests/minute per user"]})

    reply = opened.request()

    assert reply.status == 200
    assert re.fullmatch("[0-9a-f]{32}", reply.call_id)
    assert reply.headers["x-llm-guard-decision"] == "allow"
    assert reply.headers["x-llm-guard-cost"] == "0.00001455"
    assert 'q=1000000;llm-guard-unit="micro-usd";w=86400' in reply.headers["ratelimit-policy"]
    assert '"requests-minute-user";q=20;w=60' in reply.headers["ratelimit-policy"]
    assert '"requests-minute-user";r=19' in reply.headers["ratelimit"]


def test_a_captured_call_is_one_exchange_with_the_providers_own_numbers(door: Open) -> None:
    opened = door({"/api/chat": [Ask()]}, route={"limits": [RICH]})

    reply = opened.request()

    [event] = opened.events()
    assert event["call_id"] == reply.call_id
    assert (event["kind"], event["basis"], event["exact"]) == ("settle", "exact", True)
    assert (event["input_tokens"], event["output_tokens"]) == opened.served()[0]
    assert (event["user"], event["feature"], event["route"]) == ("ada", "chat", "chat")
    assert event["cost_nanos"] == 14_550 == opened.spent()


def test_a_stream_is_metered_as_it_was_served(door: Open) -> None:
    opened = door({"/api/chat": [Words([Ask()])]}, route={"limits": [RICH]})

    reply = opened.request()

    assert reply.whole
    assert len(reply.chunks) >= 20
    assert "x-llm-guard-cost" not in reply.headers  # not known when the headers went
    assert [(row["input_tokens"], row["output_tokens"]) for row in opened.events()] == opened.served()


def test_an_agent_loop_is_many_exchanges_of_one_call(door: Open) -> None:
    opened = door({"/api/chat": [Ask(), Ask(), Ask()]}, route={"limits": [RICH, "20 requests/minute per user"]})

    reply = opened.request()

    events = opened.events()
    assert {event["call_id"] for event in events} == {reply.call_id}
    assert [event["attempt"] for event in events] == [1, 2, 3]
    assert '"requests-minute-user";r=19' in reply.headers["ratelimit"]
    assert opened.spent() == 3 * 14_550


def test_of_parallel_calls_one_takes_exchange_0_over(door: Open) -> None:
    opened = door({"/api/chat": [AtOnce([Ask()] * 5)]}, route={"limits": [RICH, "20 requests/minute per user"]})

    reply = opened.request()

    assert [event["attempt"] for event in opened.events()] == [1, 2, 3, 4, 5]
    assert opened.spent() == 5 * 14_550
    assert '"requests-minute-user";r=19' in reply.headers["ratelimit"]


def test_threads_that_carry_the_context_belong_to_the_call(door: Open) -> None:
    opened = door({"/api/chat": [InThread(Ask()), InThread(Ask(), bare=True)]}, route={"limits": [RICH]})

    reply = opened.request()

    assert reply.status == 200
    assert [event["call_id"] for event in opened.events()] == [reply.call_id] * 2


def test_an_embedding_is_metered(door: Open) -> None:
    opened = door({"/api/chat": [Embed()]}, route={"limits": [RICH]})

    assert opened.request().status == 200

    [event] = opened.events()
    assert event["input_tokens"] == opened.served()[0][0]
    assert event["api"] == "openai.embeddings"
    assert event["basis"] == "exact"
    assert event["cost_nanos"] > 0


def test_a_call_without_usage_of_its_own_is_counted_from_its_text(door: Open) -> None:
    handlers = {"/api/chat": [Say(body={"answer": "word " * 200})]}
    opened = door(handlers, route={"limits": [RICH], "model": "gpt-4o-mini"})

    reply = opened.request()

    [event] = opened.events()
    assert (event["attempt"], event["basis"], event["exact"]) == (0, "counted", False)
    assert 200 <= event["output_tokens"] <= 600
    assert event["model"] == "gpt-4o-mini"
    assert event["cost_nanos"] == opened.spent() > 0
    assert reply.headers["x-llm-guard-decision"] == "allow"


def test_with_usage_captured_an_answer_without_capture_costs_nothing(door: Open) -> None:
    handlers = {"/api/chat": [Say(body={"answer": "word " * 200})]}
    opened = door(handlers, route={"limits": [RICH], "model": "gpt-4o-mini", "usage": "captured"})

    assert opened.request().status == 200

    assert [event["kind"] for event in opened.events()] == ["release"]
    assert opened.spent() == 0


@pytest.mark.parametrize("status", [302, 404, 422, 500])
def test_an_answer_that_is_not_2xx_gives_the_hold_back(door: Open, status: int) -> None:
    opened = door({"/api/chat": [Say(status=status)]}, route={"limits": [RICH], "model": "gpt-4o-mini"})

    reply = opened.request()

    assert reply.status == status
    assert [event["kind"] for event in opened.events()] == ["release"]
    assert opened.spent() == 0


CHAT_BODY = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "model": "gpt-4o-mini",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 12, "completion_tokens": 34, "total_tokens": 46},
}
CHAT_REQUEST = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 50}
CHAT_STREAM = [
    b'data: {"id":"c","object":"chat.completion.chunk","model":"gpt-4o-mini",'
    b'"choices":[{"index":0,"delta":{"content":"Hi"}}]}\n\n',
    b'data: {"id":"c","object":"chat.completion.chunk","model":"gpt-4o-mini","choices":[],'
    b'"usage":{"prompt_tokens":12,"completion_tokens":34,"total_tokens":46}}\n\ndata: [DONE]\n\n',
]


@pytest.mark.parametrize(("body", "kind"), [(CHAT_BODY, None), (CHAT_STREAM, "text/event-stream")])
def test_an_answer_in_a_providers_shape_is_metered_without_capture(door: Open, body: Any, kind: str | None) -> None:
    opened = door({"/api/chat": [Say(body=body, kind=kind)]}, route={"limits": [RICH], "api": "openai.chat"})

    reply = opened.request(json=CHAT_REQUEST)

    [event] = opened.events()
    assert (event["attempt"], event["basis"]) == (0, "exact")
    assert (event["input_tokens"], event["output_tokens"]) == (12, 34)
    assert event["cost_nanos"] == 12 * 150 + 34 * 600 == opened.spent()
    assert reply.status == 200


RESPONSE_BODY = {
    "id": "resp_1",
    "object": "response",
    "status": "completed",
    "model": "gpt-4o-mini",
    "output": [{"type": "message", "content": [{"type": "output_text", "text": "Hi"}]}],
    "usage": {"input_tokens": 12, "output_tokens": 34, "total_tokens": 46},
}


@pytest.mark.parametrize(
    ("api", "body"),
    [("openai.responses.retrieve", RESPONSE_BODY), ("openai.count_tokens", {"input_tokens": 12})],
)
def test_an_answer_that_is_only_fetched_or_only_counts_costs_nothing(door: Open, api: str, body: Any) -> None:
    route = {"limits": [RICH], "api": api, "model": "gpt-4o-mini", "max_output_tokens": 50}
    opened = door({"/api/chat": [Say(body=body)]}, route=route)

    opened.request(json=CHAT_REQUEST)

    [event] = opened.events()
    assert (event["basis"], event["exact"], event["cost_nanos"], event["input_tokens"]) == ("exact", True, 0, None)
    assert opened.spent() == 0


# ---------------------------------------------------------------- refused at the door


def test_a_spent_budget_is_refused_at_the_door(door: Open) -> None:
    route = {"limits": ["$0.00006/day per user"], "model": "gpt-4o-mini", "max_output_tokens": 50}
    opened = door({"/api/chat": [Ask()]}, route=route)
    replies = [opened.request(json={"q": "?"}) for _ in range(4)]

    refused = replies[-1]

    assert replies[0].status == 200
    assert refused.status == 429
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.headers["x-llm-guard-decision"] == "reject"
    assert refused.headers["x-should-retry"] == "false"
    assert int(refused.headers["retry-after"]) <= 86_400
    assert 'q=60;llm-guard-unit="micro-usd";w=86400' in refused.headers["ratelimit-policy"]
    assert re.search('"usd-day-user";r=[0-9]+;t=', refused.headers["ratelimit"])
    problem = refused.json()
    assert problem["code"] == "budget_spent"
    assert problem["limit"] == "$0.00006/day per user"
    assert problem["violated-policies"] == ["usd-day-user"]


def test_a_budget_that_was_spent_to_the_end_says_when_it_resets(door: Open) -> None:
    opened = door({"/api/chat": [Record({"input_tokens": 100_000, "model": "gpt-4o-mini"})]}, route={"limits": [RICH]})
    replies = [opened.request() for _ in range(70)]

    refused = replies[-1]

    assert refused.status == 429
    assert refused.json()["code"] == "budget_spent"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT00:00:00Z", refused.json()["reset_at"])
    assert refused.headers["x-should-retry"] == "false"
    assert "ratelimit" in refused.headers


def test_too_many_requests_are_told_when_to_come_back(door: Open) -> None:
    opened = door({"/api/chat": [Ask()]}, route={"limits": ["2 requests/minute per user"]})
    opened.request()
    opened.request()

    refused = opened.request()

    assert refused.status == 429
    assert refused.json()["code"] == "rate_limited"
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert refused.json()["reset_at"] is not None
    assert opened.request(user="bert").status == 200


def test_a_call_too_many_at_once_is_refused_and_the_next_one_served(door: Open) -> None:
    opened = door(
        {"/api/chat": [Meet(), Wait()], "/api/other": [Say()]},
        routes=[
            {"path": "/api/chat", "usage": "captured"},
            {"path": "/api/other", "usage": "captured"},
        ],
        limits=["1 concurrent per user"],
    )

    def second() -> Any:
        assert opened.met.wait(10)
        reply = opened.request(path="/api/other")
        opened.gate.set()
        return reply

    first, refused = _side_by_side(opened, Sent(), second)

    assert first.status == 200
    assert refused.status == 429
    assert refused.json()["code"] == "concurrency"
    assert refused.headers["retry-after"] == "1"
    assert "x-should-retry" not in refused.headers
    opened.quiet()
    assert opened.request(path="/api/other").status == 200


def _side_by_side(door: Door, sent: Sent, meanwhile: Callable[[], Any]) -> tuple[Any, Any]:
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(lambda: door.together(sent)[0])
        second = pool.submit(meanwhile)
        return first.result(30), second.result(30)


def test_a_claim_larger_than_the_limit_never_fits_and_is_told_no_time(door: Open) -> None:
    opened = door({"/api/chat": [Ask()]}, route={"limits": ["100 tokens/minute per user"], "model": "gpt-4o-mini"})

    refused = opened.request(json={"q": "word " * 500})

    assert refused.status == 429
    assert refused.json()["code"] == "never_fits"
    assert refused.json()["reset_at"] is None
    assert "retry-after" not in refused.headers
    assert refused.headers["x-should-retry"] == "false"
    assert opened.provider.arrived == 0


def test_a_refusal_speaks_the_shape_of_the_route(door: Open) -> None:
    opened = door({"/api/chat": [Ask()]}, route={"limits": ["1 requests/minute per user"], "api": "openai.chat"})
    opened.request(json=CHAT_REQUEST)

    refused = opened.request(json=CHAT_REQUEST)

    error = refused.json()["error"]
    assert refused.status == 429
    assert (error["code"], error["type"]) == ("rate_limited", "rate_limit_exceeded")
    assert error["limit"] == "1 requests/minute per user"


def test_a_refused_call_leaves_one_row_without_usage(door: Open) -> None:
    opened = door({"/api/chat": [Ask()]}, route={"limits": ["1 requests/minute per user"]})
    opened.request()

    refused = opened.request()

    [event] = opened.events("refused")
    assert event["call_id"] == refused.call_id
    assert (event["user"], event["feature"], event["error_type"]) == ("ada", "chat", "rate_limited")
    assert (event["input_tokens"], event["cost_nanos"], event["decision"]) == (None, None, "reject")


def test_many_refusals_are_a_few_rows_and_one_with_their_number(door: Open) -> None:
    opened = door({"/api/chat": [Ask()]}, route={"limits": ["1 requests/hour per user"]})

    replies = [opened.request() for _ in range(31)]

    assert [reply.status for reply in replies] == [200] + [429] * 30
    events = opened.events("refused")
    assert sum(event["count"] for event in events) == 30
    assert len(events) < 30


# ---------------------------------------------------------------- refused inside the handler

# Exchange 0 of a route without a model claims next to nothing, so that these pass the door.


def test_an_app_that_raises_on_a_refused_sdk_call_answers_with_our_429(door: Open) -> None:
    opened = door({"/api/chat": [Ask()]}, route=TIGHT)

    reply = opened.request()

    assert reply.status == 429
    assert reply.error is None
    assert reply.json()["code"] == "never_fits"
    assert reply.headers["x-llm-guard-decision"] == "reject"
    assert opened.provider.arrived == 0
    assert opened.spent() == 0


def test_an_app_that_catches_a_refused_sdk_call_answers_as_it_likes(door: Open) -> None:
    opened = door({"/api/chat": [Ask(catch=True)]}, route=TIGHT)

    reply = opened.request()

    assert reply.status == 200
    assert reply.json() == {"said": [429]}
    assert opened.spent() == 0
    assert [event["kind"] for event in opened.events()] == ["release", "refused"]


def test_a_500_that_a_framework_made_of_a_refused_sdk_call_becomes_our_429(door: Open) -> None:
    opened = door({"/api/chat": [Ask(catch=True), Say(status=500, body={"error": "oops"})]}, route=TIGHT)

    reply = opened.request()

    assert reply.status == 429
    assert reply.json()["code"] == "never_fits"


def test_a_refused_sdk_call_is_attempted_once(door: Open) -> None:
    opened = door({"/api/chat": [Ask(retries=3)]}, route=TIGHT)

    assert opened.request().status == 429

    assert len(opened.events("refused")) == 1


def test_a_refusal_in_a_lazy_stream_before_its_first_byte_is_still_a_429(door: Open) -> None:
    opened = door({"/api/chat": [Words([Ask()])]}, route=TIGHT)

    reply = opened.request()

    assert reply.status == 429
    assert reply.json()["code"] == "never_fits"
    assert reply.whole


def test_a_refusal_in_mid_stream_breaks_the_stream_and_changes_nothing_of_what_was_sent(door: Open) -> None:
    opened = door({"/api/chat": [Words([Ask()], first=b"Well: ")]}, route=TIGHT)

    reply = opened.request()

    assert reply.status == 200
    assert reply.body == b"Well: "
    assert not reply.whole
    assert isinstance(reply.error, openai.RateLimitError)
    assert opened.spent() == 0


def test_a_loop_runs_until_its_budget_is_spent(door: Open) -> None:
    opened = door({"/api/chat": [Ask()] * 20}, route={"limits": ["$0.0001/day per user"]})

    reply = opened.request()

    assert reply.status == 429
    assert reply.json()["code"] == "budget_spent"
    assert 3 <= len(opened.settled()) <= 6
    assert opened.spent() <= 100_000


def test_a_refused_sdk_call_releases_exchange_0_for_the_next_one(door: Open) -> None:
    big = Ask(prompt="word " * 20_000, catch=True)
    opened = door({"/api/chat": [big, Ask()]}, route={"limits": ["$0.001/day per user"]})

    reply = opened.request()

    assert reply.status == 200
    assert reply.json()["said"][0] == 429
    assert [(event["kind"], event["basis"]) for event in opened.events()] == [("refused", None), ("settle", "exact")]


def test_unbounded_requests_are_refused_under_a_budget(door: Open) -> None:
    opened = door({"/api/chat": [Background()]}, route={"limits": [RICH]})

    reply = opened.request()

    assert reply.status == 429
    assert reply.json()["code"] == "never_fits"
    assert opened.provider.arrived == 0


def test_unbounded_requests_pass_where_the_policy_allows_them(door: Open) -> None:
    opened = door({"/api/chat": [Background()]}, route={"limits": [RICH]}, unbounded="allow")

    assert opened.request().status == 200

    assert opened.provider.arrived == 1


# ---------------------------------------------------------------- near the end of a budget


def test_near_the_end_of_a_budget_the_cap_is_lowered_in_the_real_request(door: Open) -> None:
    long = Ask(prompt="Tell me all, in 2000 words!", cap=3000)
    opened = door({"/api/chat": [long]}, route={"limits": ["$0.0005/day per user"]})

    reply = opened.request()

    assert reply.status == 200
    [(_, output)] = opened.served()
    assert 256 <= output < 850
    assert opened.spent() <= 500_000
    [event] = opened.events()
    assert event["estimated_output_tokens"] == output


def test_a_request_without_a_cap_is_sent_with_one(door: Open) -> None:
    opened = door(
        {"/api/chat": [Ask(prompt="Tell me all, in 2000 words!", cap=None)]},
        route={"limits": [RICH], "max_output_tokens": 300},
    )

    assert opened.request().status == 200

    assert [output for _, output in opened.served()] == [300]


def test_a_request_without_any_cap_gets_the_models_own_maximum_lowered_by_the_budget(door: Open) -> None:
    opened = door(
        {"/api/chat": [Ask(prompt="Tell me all, in 2000 words!", cap=None)]}, route={"limits": ["$0.0005/day per user"]}
    )

    assert opened.request().status == 200

    [(_, output)] = opened.served()
    assert 256 < output < 850
    assert opened.spent() <= 500_000


# ---------------------------------------------------------------- the provider's own failures


def test_each_attempt_of_a_retrying_sdk_is_an_exchange_of_its_own(door: Open) -> None:
    once = f"status=500, times=1, id={uuid4().hex}"  # the stand-in remembers it for the other doors
    opened = door({"/api/chat": [Ask(retries=2, standin=once)]}, route={"limits": [RICH]})

    reply = opened.request()

    assert reply.status == 200
    rows = [(event["attempt"], event["status"], event["cost_nanos"], event["exact"]) for event in opened.events()]
    assert rows == [(1, 500, 0, True), (2, 200, 14_550, True)]


def test_the_providers_own_429_is_not_taken_for_a_refusal_of_ours(door: Open) -> None:
    opened = door({"/api/chat": [Ask(standin="status=429")]}, route={"limits": [RICH]})

    reply = opened.request()

    assert reply.status == 500
    assert isinstance(reply.error, openai.RateLimitError)
    assert [(event["status"], event["cost_nanos"]) for event in opened.events()] == [(429, 0)]


def test_a_handler_that_raises_after_a_captured_call_settles_that_call(door: Open) -> None:
    opened = door({"/api/chat": [Ask(), Raise()]}, route={"limits": [RICH], "model": "gpt-4o-mini"})

    reply = opened.request()

    assert isinstance(reply.error, RuntimeError)
    assert [(event["attempt"], event["basis"]) for event in opened.events()] == [(1, "exact")]


def test_a_handler_that_raises_before_any_capture_books_the_hold(door: Open) -> None:
    opened = door({"/api/chat": [Raise()]}, route={"limits": [RICH], "model": "gpt-4o-mini"})

    reply = opened.request()

    assert isinstance(reply.error, RuntimeError)
    [event] = opened.events()
    assert (event["attempt"], event["basis"], event["success"]) == (0, "held", False)
    assert event["cost_nanos"] == opened.spent() > 256 * 600


def test_a_client_that_hangs_up_before_any_capture_books_the_hold(door: Open) -> None:
    pieces = [b"word "] * 50
    opened = door({"/api/chat": [Say(body=pieces)]}, route={"limits": [RICH], "model": "gpt-4o-mini"})

    reply = opened.request(hang_up_after=2)

    assert not reply.whole
    [event] = opened.events()
    assert (event["attempt"], event["basis"]) == (0, "held")


def test_a_client_that_hangs_up_in_a_captured_stream_pays_what_it_read(door: Open) -> None:
    long = Ask(prompt="Tell me all, in 300 words!", cap=400, standin="gap-ms=5")
    opened = door({"/api/chat": [Words([long])]}, route={"limits": [RICH]})

    reply = opened.request(hang_up_after=5)

    assert not reply.whole
    [event] = opened.events()
    assert (event["attempt"], event["basis"]) == (1, "counted")
    assert 5 <= event["output_tokens"] < 150


# ---------------------------------------------------------------- after the answer


def test_calls_in_background_tasks_belong_to_the_call(door: Open) -> None:
    opened = door({"/api/chat": [Say(), Later([Ask()])]}, route={"limits": [RICH]})

    reply = opened.request()

    [event] = opened.settled()
    assert (event["call_id"], event["user"]) == (reply.call_id, "ada")
    assert opened.spent() == 14_550


def test_work_that_outlives_its_call_is_a_call_of_its_own_with_the_same_name(door: Open) -> None:
    opened = door({"/api/chat": [Say(), Outlive(Ask())]}, route={"limits": [RICH], "usage": "captured"})

    reply = opened.request()
    until(lambda: bool(opened.background), "the task is done")

    assert opened.background == ["done"]
    [event] = opened.settled()
    assert event["call_id"] != reply.call_id
    assert event["parent_call_id"] == reply.call_id
    assert (event["user"], event["feature"], event["route"]) == ("ada", "chat", "chat")


def test_work_that_outlives_its_call_is_held_against_the_same_limits(door: Open) -> None:
    opened = door(
        {"/api/chat": [Say(), Outlive(Ask())]},
        route={"limits": ["$0.00001/day per user"], "usage": "captured"},
    )

    opened.request()
    until(lambda: bool(opened.background), "the task is done")

    assert isinstance(opened.background[0], openai.RateLimitError)
    assert opened.provider.arrived == 0


# ---------------------------------------------------------------- what an app reports and spends itself

NUMBERS = {"input_tokens": 10, "output_tokens": 20, "model": "gpt-4o-mini"}


def test_recorded_usage_is_summed_into_exchange_0(door: Open) -> None:
    opened = door({"/api/chat": [Record(NUMBERS), Record(NUMBERS)]}, route={"limits": [RICH]})

    opened.request()

    [event] = opened.events()
    assert (event["attempt"], event["basis"]) == (0, "exact")
    assert (event["input_tokens"], event["output_tokens"]) == (20, 40)
    assert event["cost_nanos"] == 2 * (10 * 150 + 20 * 600) == opened.spent()


def test_after_a_take_over_each_record_is_an_exchange_of_its_own(door: Open) -> None:
    opened = door({"/api/chat": [Ask(), Record(NUMBERS), Record(NUMBERS)]}, route={"limits": [RICH]})

    opened.request()

    costs = [event["cost_nanos"] for event in opened.events()]
    assert costs == [14_550, 13_500, 13_500]
    assert opened.spent() == sum(costs)


def test_a_record_before_a_take_over_is_kept(door: Open) -> None:
    opened = door({"/api/chat": [Record(NUMBERS), Ask()]}, route={"limits": [RICH]})

    opened.request()

    assert sorted(event["cost_nanos"] for event in opened.events()) == [13_500, 14_550]


def test_a_record_of_a_captured_response_adds_nothing(door: Open) -> None:
    opened = door({"/api/chat": [Ask(record=True)]}, route={"limits": [RICH]})

    opened.request()

    assert [event["cost_nanos"] for event in opened.events()] == [14_550]


def test_a_charge_is_spent(door: Open) -> None:
    opened = door({"/api/chat": [Charge(3), Charge(4)]}, route={"limits": ["10 credits/day per user"]})

    reply = opened.request()

    assert reply.status == 200
    assert [event["credits"] for event in opened.settled() if event["credits"]] == [3, 4]
    assert opened.spent("credits") == 7


def test_a_charge_too_much_is_refused_and_answered_with_our_429(door: Open) -> None:
    opened = door({"/api/chat": [Charge(8), Charge(8)]}, route={"limits": ["10 credits/day per user"]})

    reply = opened.request()

    assert reply.status == 429
    assert reply.json()["limit"] == "10 credits/day per user"
    assert opened.spent("credits") == 8


def test_tags_that_the_app_gives_stand_on_the_events_that_follow(door: Open) -> None:
    opened = door({"/api/chat": [Ask(), Tag({"team": "search"}), Ask()]}, route={"limits": [RICH]})

    opened.request()

    assert [event["tags"] for event in opened.events()] == [{}, {"team": "search"}]


def test_outcomes_stand_in_the_log_line(door: Open, caplog: pytest.LogCaptureFixture) -> None:
    opened = door({"/api/chat": [Outcome("solved"), Outcome("solved", 2)]}, route={"limits": [RICH]})

    opened.request()
    opened.quiet()

    [line] = _call_lines(caplog)
    assert line["outcomes"] == {"solved": 3}


def test_a_block_for_another_user_is_a_call_of_its_own(door: Open) -> None:
    block = AsUser({"user": "bert", "feature": "digest"}, [Ask()])
    opened = door({"/api/chat": [block]}, route={"limits": [RICH], "usage": "captured"}, limits=["$5/day per user"])

    reply = opened.request()

    [event] = opened.settled()
    assert (event["user"], event["feature"], event["parent_call_id"]) == ("bert", "digest", reply.call_id)


def test_a_block_whose_user_has_nothing_left_is_refused_on_entry(door: Open) -> None:
    opened = door(
        {"/api/chat": [AsUser({"user": "bert"}, [Say()]), AsUser({"user": "bert"}, [Say()])]},
        limits=["1 requests/hour per user"],
        route={"usage": "captured"},
    )

    reply = opened.request()

    assert reply.status == 429
    assert reply.error is None or isinstance(reply.error, LimitExceeded)


def test_a_refusal_inside_of_a_block_for_another_user_is_answered_with_our_429(door: Open) -> None:
    block = AsUser({"user": "bert"}, [Ask()])
    opened = door({"/api/chat": [block]}, limits=["$0.00001/day per user"], route={"usage": "captured"})

    reply = opened.request()

    assert reply.status == 429
    assert reply.json()["code"] == "never_fits"


# ---------------------------------------------------------------- who is calling


def test_nobody_is_a_401(door: Open) -> None:
    opened = door({"/api/chat": [Ask()]}, route={"limits": [RICH]})

    reply = opened.request(user=None)

    assert reply.status == 401
    assert reply.json()["code"] == "unauthenticated"
    assert reply.headers["www-authenticate"] == "Bearer"
    assert opened.seen == []


def test_a_strangers_identity_header_is_neither_believed_nor_passed_on(door: Open) -> None:
    opened = door(
        {"/api/chat": [Ask()]},
        route={"limits": [RICH]},
        identity={"user": ["header:x-user-id"], "trusted_proxies": ["127.0.0.1"], "anonymous": "shared"},
    )

    reply = opened.request(peer=STRANGER)

    assert reply.status == 200
    assert "x-user-id" not in opened.seen[0]["headers"]
    assert [event["user"] for event in opened.events()] == ["anonymous"]


def test_a_trusted_peers_identity_header_reaches_the_app(door: Open) -> None:
    opened = door({"/api/chat": [Ask()]}, route={"limits": [RICH]})

    opened.request()

    assert opened.seen[0]["headers"]["x-user-id"] == "ada"


def test_routes_without_a_rule_pass_but_strangers_names_do_not(door: Open) -> None:
    opened = door({"/free": [Say()]}, route={"limits": [RICH]})

    reply = opened.request(path="/free", peer=STRANGER)

    assert reply.status == 200
    assert "x-user-id" not in opened.seen[0]["headers"]
    assert not [name for name in reply.headers if name.startswith(("x-llm-guard", "ratelimit"))]
    assert opened.seen[0]["call"] is None


TAGS = '{"feature":"summarizer","user_tier":"free","workflow_id":"w1","team":"search"}'


def test_a_trusted_peers_tags_choose_feature_tier_and_balance(door: Open) -> None:
    opened = door(
        {"/api/chat": [Ask()]},
        limits=["$1/day per feature", "$1/day per tag:team"],
        tiers={"free": {"limits": ["1 requests/hour per user"]}},
    )

    first = opened.request(headers={"x-metering-tags": TAGS})
    second = opened.request(headers={"x-metering-tags": TAGS})

    assert (first.status, second.status) == (200, 429)
    [event] = opened.settled()
    assert (event["feature"], event["tier"], event["workflow_id"]) == ("summarizer", "free", "w1")
    assert event["tags"] == {"team": "search"}
    balances = {state.balance.partition("|")[0] for state in opened.installed.desk.store.balances("", 100)}
    assert "feature=summarizer" in balances
    assert "tenant=*none&tag:team=search" in balances


def test_a_strangers_tags_are_for_reports_only(door: Open) -> None:
    opened = door(
        {"/api/chat": [Ask()]},
        identity={"user": ["cookie:account"], "trusted_proxies": ["127.0.0.1"]},
        limits=["$1/day per feature", "$1/day per tag:team"],
        tiers={"free": {"limits": ["1 requests/hour per user"]}},
    )
    stranger = {"peer": STRANGER, "headers": {"x-metering-tags": TAGS, "cookie": "account=eve"}}

    replies = [opened.request(**stranger) for _ in range(2)]

    assert [reply.status for reply in replies] == [200, 200]
    assert [event["feature"] for event in opened.settled()] == ["chat", "chat"]
    assert opened.settled()[0]["tags"] == {"team": "search"}
    balances = {state.balance.partition("|")[0] for state in opened.installed.desk.store.balances("", 100)}
    assert not [name for name in balances if "search" in name or "summarizer" in name]


def test_a_tier_has_limits_of_its_own(door: Open) -> None:
    limits = ["3 requests/hour per user", {"limit": "1 requests/hour per user", "when": {"tier": "free"}}]
    opened = door({"/api/chat": [Ask()]}, route={"limits": limits})

    def statuses(user: str, plan: str) -> list[int | None]:
        return [opened.request(user=user, headers={"x-plan": plan}).status for _ in range(4)]

    assert statuses("ada", "free") == [200, 429, 429, 429]
    assert statuses("bert", "pro") == [200, 200, 200, 429]


# ---------------------------------------------------------------- known only once the app has asked

LATE = {"identity": {"user": ["scope:user"]}}


def test_the_apps_own_auth_names_the_caller_at_the_first_exchange(door: Open) -> None:
    opened = door({"/api/chat": [SignIn(), Ask()]}, route={"limits": [RICH]}, **LATE)

    reply = opened.request(headers={"x-session": "ada"})

    assert reply.status == 200
    assert [(row["user"], row["kind"]) for row in opened.events()] == [("ada", "settle")]
    [balance] = opened.installed.desk.store.balances("", 10)
    assert (balance.balance.partition("|")[0], balance.spent) == ("tenant=*none&user=ada", 14_550)


def test_whoever_is_still_nobody_at_the_first_exchange_gets_a_401(door: Open) -> None:
    opened = door({"/api/chat": [SignIn(), Ask()]}, route={"limits": [RICH]}, **LATE)

    reply = opened.request()

    assert reply.status == 401
    assert reply.error is None
    assert reply.json()["code"] == "unauthenticated"
    assert opened.provider.arrived == 0
    assert [row["kind"] for row in opened.events()] == ["release"]


def test_a_late_caller_is_held_to_the_limits_that_name_him(door: Open) -> None:
    opened = door({"/api/chat": [SignIn(), Ask()]}, route={"limits": ["1 requests/hour per user"]}, **LATE)

    replies = [opened.request(headers={"x-session": user}) for user in ("ada", "ada", "bert")]

    assert [reply.status for reply in replies] == [200, 429, 200]


def test_what_a_late_caller_records_is_his(door: Open) -> None:
    opened = door({"/api/chat": [SignIn(), Record(NUMBERS)]}, route={"limits": [RICH]}, **LATE)

    reply = opened.request(headers={"x-session": "ada"})

    assert reply.status == 200
    [event] = opened.settled()
    assert (event["user"], event["cost_nanos"]) == ("ada", 13_500)
    [balance] = opened.installed.desk.store.balances("", 10)
    assert (balance.balance.partition("|")[0], balance.spent) == ("tenant=*none&user=ada", 13_500)


# ---------------------------------------------------------------- what passes the door by


def test_options_and_other_methods_pass(door: Open) -> None:
    opened = door({"/api/chat": [Say(body=b"fine")]}, route={"limits": [RICH]})

    replies = [opened.request(method, user=None) for method in ("PUT", "GET")]

    assert [(reply.status, reply.body) for reply in replies] == [(200, b"fine")] * 2
    assert [seen["call"] for seen in opened.seen] == [None, None]
    assert opened.request("OPTIONS", user=None).status == 200
    assert not any("x-llm-guard-decision" in reply.headers for reply in replies)


def test_a_strangers_request_id_stands_in_the_books_but_names_nothing(door: Open) -> None:
    identity = {"user": ["header:x-user-id"], "anonymous": "ip"}
    opened = door({"/api/chat": [Say()]}, route={"limits": [RICH]}, identity=identity)

    first, second = [opened.request(peer=STRANGER, headers={"x-request-id": "same"}) for _ in range(2)]

    assert first.call_id != second.call_id
    rows = opened.events()
    assert [row["request_id"] for row in rows] == ["same", "same"]
    assert {row["user"] for row in rows} == {"ip:203.0.113.9"}


# ---------------------------------------------------------------- when our own side fails

Lock = Callable[[], sqlite3.Connection]


@pytest.mark.parametrize(
    ("rule", "status"), [({}, 503), ({"on_store_failure": "allow"}, 200), ({"mode": "observe"}, 200)]
)
def test_a_store_that_is_away_follows_the_rule(rule: dict[str, Any], status: int, door: Open, locked: Lock) -> None:
    opened = door({"/api/chat": [Ask()]}, route={"limits": [RICH, "$1/day per tag:team"]}, **rule)
    lock = locked()

    reply = opened.request(headers={"x-metering-tags": '{"team":"search"}'})
    lock.execute("ROLLBACK")

    assert reply.status == status
    assert reply.headers.get("retry-after") == ("1" if status == 503 else None)


def test_a_store_that_goes_away_in_mid_call_is_a_503_and_not_the_apps_fault(door: Open, locked: Lock) -> None:
    locks: list[sqlite3.Connection] = []
    opened = door({"/api/chat": [Do(lambda: locks.append(locked())), Ask()]}, route={"limits": [RICH]})

    reply = opened.request()
    locks[0].execute("ROLLBACK")

    assert reply.status == 503
    assert reply.headers["retry-after"] == "1"
    assert opened.provider.arrived == 0
    # The settlements that could not be written are tried again by the keeper.
    opened.quiet()


@pytest.mark.parametrize(("rule", "status"), [("deny", 503), ("allow", 200)])
def test_a_fault_of_ours_before_the_grant_follows_the_same_rule(
    rule: str, status: int, door: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = door({"/api/chat": [Say(body=b"fine")]}, route={"limits": [RICH]}, on_store_failure=rule)
    monkeypatch.setattr("llm_guard_mw.desk.describe", _broken)

    reply = opened.request()

    assert reply.status == status
    assert "door_failed" in caplog.text
    assert opened.installed.desk.calls == {}


def test_a_fault_of_ours_after_the_grant_costs_the_caller_nothing(door: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = door({"/api/chat": [Ask()]}, route={"limits": [RICH]})
    monkeypatch.setattr("llm_guard_mw.settlement.close", _broken)

    reply = opened.request()

    assert reply.status == 200
    assert [row["basis"] for row in opened.events()] == ["held"]


def _broken(*arguments: Any, **named: Any) -> Any:
    raise ZeroDivisionError


# ---------------------------------------------------------------- prices, modes


def unpriced(door: Open, rule: str) -> Door:
    return door({"/api/chat": [Ask(model="nobody-knows-it")]}, route={"limits": [RICH]}, prices={"unpriced": rule})


def test_a_model_without_a_price_costs_the_dearest_there_is(door: Open) -> None:
    opened = unpriced(door, "ceiling")

    assert opened.request().status == 200

    [event] = opened.settled()
    assert event["cost_nanos"] == opened.spent() > 14_550
    assert event["exact"] is False


def test_a_model_without_a_price_is_refused_where_the_rule_says_so(door: Open) -> None:
    opened = unpriced(door, "deny")

    assert opened.request().status == 429

    assert opened.provider.arrived == 0
    assert opened.settled() == []


def test_a_model_without_a_price_passes_at_an_unknown_cost_where_the_rule_says_so(door: Open) -> None:
    opened = unpriced(door, "allow")

    assert opened.request().status == 200

    [event] = opened.settled()
    assert (event["cost_nanos"], event["exact"]) == (None, False)
    assert (event["input_tokens"], event["output_tokens"]) == opened.served()[0]


def test_observing_blocks_nothing_and_says_what_it_would_have(door: Open, caplog: pytest.LogCaptureFixture) -> None:
    opened = door({"/api/chat": [Ask()]}, route={"limits": ["1 requests/hour per user"]}, mode="observe")

    replies = [opened.request() for _ in range(3)]
    opened.quiet()

    assert [reply.status for reply in replies] == [200, 200, 200]
    assert [line.get("would_refuse") for line in _call_lines(caplog)] == [None, "rate_limited", "rate_limited"]


def test_observing_lets_a_spent_budget_and_unbounded_or_unpriced_requests_pass(door: Open) -> None:
    opened = door(
        {"/api/chat": [Ask(), Background(), Ask(model="nobody-knows-it")]},
        route=TIGHT,
        mode="observe",
        prices={"unpriced": "deny"},
    )

    reply = opened.request()

    assert reply.status == 200
    assert opened.provider.arrived == 3


def test_observing_lets_a_caller_without_a_name_pass(door: Open) -> None:
    opened = door({"/api/chat": [Ask()]}, route={"limits": [RICH]}, mode="observe")

    reply = opened.request(user=None)

    assert reply.status == 200
    assert [event["user"] for event in opened.settled()] == [None]


# ---------------------------------------------------------------- bodies


def test_a_large_body_in_many_chunks_reaches_the_app_as_it_was(door: Open) -> None:
    opened = door({"/api/chat": [Ask()]}, route={"limits": [RICH]}, inspect_bytes=1024)
    chunks = [bytes([65 + i % 26]) * 700 for i in range(10)]

    reply = opened.request(chunks=chunks)

    assert reply.status == 200
    assert opened.seen[0]["body"] == b"".join(chunks)


def test_an_empty_body_reaches_the_app(door: Open) -> None:
    opened = door({"/api/chat": [Ask()]}, route={"limits": [RICH]})

    assert opened.request(chunks=[]).status == 200

    assert opened.seen[0]["body"] == b""


# ---------------------------------------------------------------- the log


def _call_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    import json

    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "llm_guard"]
    return [line for line in lines if line["event"] == "call"]


def test_a_call_leaves_one_json_line_with_who_what_and_how_much(door: Open, caplog: pytest.LogCaptureFixture) -> None:
    opened = door({"/api/chat": [Ask(), Ask()]}, route={"limits": [RICH]})

    reply = opened.request(headers={"x-tenant-id": "acme", "x-plan": "pro", "x-request-id": "r-1"})
    opened.quiet()

    [line] = _call_lines(caplog)
    assert line["call_id"] == reply.call_id
    assert (line["user"], line["tenant"], line["tier"]) == ("ada", "acme", "pro")
    assert (line["feature"], line["route"]) == ("chat", "chat")
    assert (line["decision"], line["status"], line["exchanges"]) == ("allow", 200, 2)
    assert (line["input_tokens"], line["output_tokens"]) == (2 * 17, 2 * 20)
    assert (line["cost_usd"], line["basis"], line["models"]) == ("0.0000291", ["exact"], ["gpt-4o-mini"])
    assert line["left"]["usd-day-user"] > 0
    assert line["duration_ms"] >= 0
    assert [event["request_id"] for event in opened.events()] == ["r-1", "r-1"]


def test_a_refused_call_leaves_one_json_line_that_says_why(door: Open, caplog: pytest.LogCaptureFixture) -> None:
    opened = door({"/api/chat": [Ask()]}, route={"limits": ["1 requests/hour per user"]})
    opened.request()

    opened.request()
    opened.quiet()

    line = _call_lines(caplog)[-1]
    assert (line["decision"], line["status"], line["refused"]) == ("reject", 429, "rate_limited")
    assert line["limit"] == "1 requests/hour per user"
