"""Money that was once lost between two steps: each test is a case that a review has met."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_guard_mw import process
from llm_guard_mw.errors import StoreUnavailable
from llm_guard_mw.guard import Guard
from llm_guard_mw.ledger import verify
from llm_guard_mw.model import Asked, Reading, Usage
from llm_guard_mw.stores.protocol import TooLate
from tests.model import servers

Install = Callable[..., process.Installation]
LEG = next((leg for leg in ("valkey", "redis7", "redis62") if not servers.missing(leg)), None)
NEEDS_REDIS = pytest.mark.skipif(LEG is None, reason="no Redis of any kind is installed")


@pytest.fixture
def redis(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[servers.Server]:
    monkeypatch.setenv("LLM_GUARD_SPOOL", str(tmp_path / "spool"))
    server = servers.Server(LEG or "").start()
    yield server
    server.process.send_signal(signal.SIGCONT)
    server.stop()


def asked(model: str = "gpt-4o") -> Asked:
    return Asked(api="openai.chat", provider="openai", model=model, input_tokens=10, cap=10)


def exchange(guard: Guard, model: str) -> None:
    begun: Any = guard.begin(asked(model))
    usage = Usage(input_tokens=10, output_tokens=5, model=model)
    guard.finish(begun, Reading(usage=usage, ended=True), status=200, ending="complete")


@NEEDS_REDIS
def test_what_was_booked_without_a_hold_does_not_teach_later_settlements_to_count_requests_again(
    guarded: Install, redis: servers.Server
) -> None:
    installed = guarded(store=redis.url, limits=["100 requests/day per model", "$50/day per model"])
    guard = Guard(installed.desk)
    with guard.as_user(user="ada") as call:
        exchange(guard, "gpt-4o")
        call.record({"input_tokens": 11, "output_tokens": 7, "model": "gpt-4o-mini"}, provider="openai")

    for _ in range(3):
        with guard.as_user(user="bob"):
            exchange(guard, "gpt-4o")
            exchange(guard, "gpt-4o-mini")

    verified = verify(installed.desk.store, installed.keeper.ledger)
    assert (verified.ok, verified.findings) == (True, ())
    spent = {each.balance: (each.spent, each.held) for each in installed.desk.store.balances("", 10)}
    assert spent["model=gpt-4o-mini|calendar:requests:day:0:UTC:all"] == (4, 0)


def test_a_reserve_that_came_too_late_may_have_been_granted_before(guarded: Install) -> None:
    installed = guarded()
    guard = Guard(installed.desk)
    with guard.as_user(user="ada") as call:
        plan: Any = installed.desk.plan_request(call, asked())

        with pytest.raises(StoreUnavailable) as raised:
            installed.desk.read(plan, TooLate(0))

    assert raised.value.asked


@NEEDS_REDIS
def test_what_a_store_does_not_take_while_it_is_closed_goes_into_the_spool(
    guarded: Install, redis: servers.Server, tmp_path: Path
) -> None:
    installed = guarded(store=redis.url)
    guard = Guard(installed.desk)
    with guard.as_user(user="ada"):
        begun: Any = guard.begin(asked())
        redis.process.send_signal(signal.SIGSTOP)
        usage = Usage(input_tokens=10, output_tokens=5, model="gpt-4o")
        closing = installed.desk.finished(begun, Reading(usage=usage, ended=True), status=200, ending="complete")
        assert closing is not None
        installed.desk.settle_soon(closing)

    process.uninstall()

    assert [name.endswith(".spool") for name in os.listdir(tmp_path / "spool")] == [True]


def test_a_value_has_a_balance_of_its_own_also_where_a_limit_holds_for_one_model_only(guarded: Install) -> None:
    installed = guarded(limits=[{"limit": "$5/day per workflow", "when": {"model": "gpt-4o"}}])
    guard = Guard(installed.desk)

    for workflow in ("one", "two"):
        with guard.as_user(user="ada", tags={"workflow_id": workflow}):
            exchange(guard, "gpt-4o")

    subjects = [each.balance.partition("|")[0] for each in installed.desk.store.balances("", 10)]
    assert subjects == ["tenant=*none&workflow=one", "tenant=*none&workflow=two"]
