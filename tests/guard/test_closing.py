"""The end of a call: whatever the app said meanwhile, all that was held is let go of and booked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_guard_mw import process
from llm_guard_mw.call import enter, leave
from llm_guard_mw.capture.exchange import Outgoing, Tap, asked_by
from llm_guard_mw.desk import DoorEnding
from llm_guard_mw.guard import Guard
from llm_guard_mw.http import HttpRequest
from llm_guard_mw.ledger import verify
from llm_guard_mw.model import Asked, Usage

Install = Callable[..., process.Installation]
HALF_A_CHARACTER = json.loads('"\\ud800"')
ASKED = Asked(api="openai.chat", provider="openai", model="gpt-4o-mini", input_tokens=100, cap=100)


def events(installed: process.Installation) -> list[dict[str, Any]]:
    installed.keeper.ledger.drain_all(installed.desk.store)
    return list(installed.keeper.ledger.events())


def nothing_left(installed: process.Installation) -> bool:
    desk = installed.desk
    desk.store.now()  # what was handed in before has been done
    return not desk.open and not desk.calls and not desk.store.holds("", 10)


SAID = {"id": "r1", "choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}}


def test_reports_after_a_take_over_are_booked_once_and_at_the_routes_model(guarded: Install) -> None:
    """The app reports the last chunk of a stream that it holds on to, and a call to somebody no capture knows."""
    installed = guarded(identity={"anonymous": "shared"}, routes=[{"path": "/c", "model": "gpt-4o"}])
    guard = Guard(installed.desk)
    call = guard.call_for(HttpRequest("POST", "/c"), installed.config.policy.routes[0])
    assert guard.enter(call) is call
    token = enter(call)
    body = {"model": "gpt-4o", "messages": [], "stream": True, "stream_options": {"include_usage": True}}
    asked = asked_by(Outgoing("POST", "api.openai.com", "/v1/chat/completions", (), json.dumps(body).encode()))
    assert asked is not None
    tap = Tap(installed.desk, guard.begin(asked))  # type: ignore[arg-type]
    tap.head(200, ((b"content-type", b"text/event-stream"),))
    tap.chunk(b"data: " + json.dumps(SAID | {"object": "chat.completion.chunk", "model": "gpt-4o"}).encode() + b"\n\n")

    call.record(SAID | {"object": "chat.completion", "model": "gpt-4o"})
    call.record({"input_tokens": 1000, "output_tokens": 0})
    leave(token)
    guard.close(call, DoorEnding(status=200))
    tap.broken_off()

    assert nothing_left(installed)
    booked = sorted((event["input_tokens"], event["cost_nanos"]) for event in events(installed))
    assert booked == [(100, 750_000), (1000, 2_500_000)]


def test_half_a_character_in_a_tag_costs_no_settlement(guarded: Install) -> None:
    installed = guarded(limits=["$1/day global", "1 concurrent global"])

    for _ in range(2):
        with Guard(installed.desk).as_user(user="ada") as call:
            call.tag(topic=HALF_A_CHARACTER)
            call.outcome(HALF_A_CHARACTER)
            call.record({"input_tokens": 10, "output_tokens": 5, "model": "gpt-4o-mini"})

    assert nothing_left(installed)
    assert [event["tags"] for event in events(installed)] == [{"topic": "?"}] * 2


def test_a_number_that_no_store_can_hold_costs_the_other_bookings_nothing(guarded: Install) -> None:
    installed = guarded(limits=["$1/day global", "1 concurrent global"])
    guard = Guard(installed.desk)

    for _ in range(2):
        with guard.as_user(user="ada") as call:
            exchange = guard.begin(ASKED)
            guard.finish(exchange, None, status=None, ending="not_sent")  # type: ignore[arg-type]
            call.door = None
            call.record(Usage(input_tokens=10**30, output_tokens=1, model="gpt-4o-mini"))
            call.record({"input_tokens": 10, "output_tokens": 5, "model": "gpt-4o-mini"})

    assert not installed.desk.calls
    assert [event["input_tokens"] for event in events(installed) if event["kind"] == "settle"] == [10, 10]


@pytest.mark.parametrize("wrong", [{"provider": 12}, {"answer": {"input_tokens": 10**30}}])
def test_a_report_that_cannot_be_meant_is_a_value_error(guarded: Install, wrong: dict[str, Any]) -> None:
    installed = guarded()
    given = {"answer": {"input_tokens": 1}, **wrong}

    with Guard(installed.desk).as_user(user="ada") as call, pytest.raises(ValueError, match="would be right"):
        call.record(given.pop("answer"), **given)

    assert nothing_left(installed)


def test_a_primary_key_is_an_id(guarded: Install) -> None:
    installed = guarded(limits=["$1/day global"])

    with Guard(installed.desk).as_user(user=42, tenant=7) as call:  # type: ignore[arg-type]
        call.record({"input_tokens": 10, "output_tokens": 5, "model": "gpt-4o-mini"})

    assert [(event["user"], event["tenant"]) for event in events(installed)] == [("42", "7")]
    assert verify(installed.desk.store, installed.keeper.ledger).ok


@pytest.mark.parametrize("user", ["", "x" * 257, "a\0b", True, 1.5, b"ada"])
def test_an_id_that_is_none_is_a_value_error(guarded: Install, user: Any) -> None:
    installed = guarded()

    with pytest.raises(ValueError, match="would be right"), Guard(installed.desk).as_user(user=user):
        raise AssertionError("it was let in")


def test_requests_show_no_credential_and_no_prompt_of_themselves() -> None:
    secret = ((b"authorization", b"Bearer hush"),)

    shown = repr(HttpRequest("POST", "/", b"key=hush", secret)) + repr(
        Outgoing("POST", "host", "/?key=hush", secret, b"hush")
    )

    assert "hush" not in shown


def test_a_long_journal_does_not_keep_leases_from_being_renewed(
    guarded: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = guarded(limits=["$1/day global"])
    installed.desk.store.append("a/0/refused", b"{}")
    keeper = installed.keeper
    monkeypatch.setattr("llm_guard_mw.keeper.DRAIN_BATCH", 1)
    monkeypatch.setattr("llm_guard_mw.keeper.DRAIN_TURN_SECONDS", 0.05)
    monkeypatch.setattr(keeper.ledger, "drain", lambda store, most: most)  # a journal that never ends

    next(duty for duty in keeper.duties if duty.name == "drain").work()
