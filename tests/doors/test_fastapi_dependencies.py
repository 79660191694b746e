"""FastAPI apps that know their callers in a dependency: the guard asks again before the first provider call leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import openai
import pytest
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request
from starlette.testclient import TestClient

from llm_guard_mw import GuardMiddleware, capture, current_call, guarded, process
from tests.doors.harness import API_KEY, PEER, PROMPT

pytestmark = pytest.mark.usefixtures("clean")

PEOPLE = {"ada's key": ("ada", "acme"), "bob's key": ("bob", "acme")}
Config = Callable[..., dict[str, Any]]


async def in_state(request: Request, x_key: Annotated[str | None, Header()] = None) -> None:
    if x_key in PEOPLE:
        request.state.user, request.state.tenant = PEOPLE[x_key]


def in_scope(request: Request, x_key: Annotated[str | None, Header()] = None) -> None:
    """A sync one: it runs in a thread of the pool."""
    if x_key in PEOPLE:
        user, tenant = PEOPLE[x_key]
        request.scope["user"] = {"id": user, "org": tenant}


def strict(x_key: Annotated[str | None, Header()] = None) -> str:
    """The app's own 401, in its own words."""
    if x_key not in PEOPLE:
        raise HTTPException(401, "who are you?")
    return x_key


async def behind_another(request: Request, key: Annotated[str, Depends(strict)]) -> None:
    request.state.user, request.state.tenant = PEOPLE[key]


WAYS = [
    pytest.param(in_state, {"user": ["state:user"], "tenant": ["state:tenant"]}, id="state"),
    pytest.param(in_scope, {"user": ["scope:user.id"], "tenant": ["scope:user.org"]}, id="scope"),
    pytest.param(behind_another, {"user": ["state:user"], "tenant": ["state:tenant"]}, id="behind another"),
]


@pytest.fixture
def client(url: str, provider: Any) -> Iterator[openai.OpenAI]:
    with capture(openai.OpenAI(api_key=API_KEY, base_url=f"{url}/v1", max_retries=0)) as client:
        yield client


def app_of(client: openai.OpenAI, depends: Any, config: Any) -> TestClient:
    """`/api/chat` asks in a sync endpoint, `/v1/async` in an async one of a router that brings the dependency."""
    app, router = FastAPI(), APIRouter(dependencies=[Depends(depends)])

    def ask() -> str:
        answer = client.chat.completions.create(
            model="gpt-4o-mini", max_tokens=50, messages=[{"role": "user", "content": PROMPT}]
        )
        return str(answer.choices[0].message.content)

    @app.post("/api/chat", dependencies=[Depends(depends)])
    def chat() -> str:
        return ask()

    @router.post("/async")
    @guarded("$1/day per user", feature="async")
    async def asynchronous() -> str:
        return ask()

    app.include_router(router, prefix="/v1")
    app.add_middleware(GuardMiddleware, config=config)
    return TestClient(app, client=PEER)


def events() -> list[dict[str, Any]]:
    installed = process.install()
    installed.keeper.ledger.drain_all(installed.desk.store)
    return sorted(installed.keeper.ledger.events(), key=lambda row: (row["user"] or "", row["route"]))


@pytest.mark.parametrize("path", ["/api/chat", "/v1/async"])
@pytest.mark.parametrize(("depends", "identity"), WAYS)
def test_whom_a_dependency_finds_is_whom_the_books_name(
    path: str, depends: Any, identity: Any, client: openai.OpenAI, config: Config
) -> None:
    web = app_of(client, depends, config(identity=identity))

    assert [web.post(path, headers={"x-key": key}).status_code for key in PEOPLE] == [200, 200]

    assert [(event["user"], event["tenant"], event["kind"]) for event in events()] == [
        ("ada", "acme", "settle"),
        ("bob", "acme", "settle"),
    ]


@pytest.mark.parametrize("path", ["/api/chat", "/v1/async"])
@pytest.mark.parametrize(("depends", "identity"), WAYS)
def test_the_budget_of_whom_a_dependency_finds_is_held(
    path: str, depends: Any, identity: Any, client: openai.OpenAI, config: Config, provider: Any
) -> None:
    web = app_of(client, depends, config(identity=identity, limits=["$0.00006/day per user"]))

    answers = [web.post(path, headers={"x-key": "ada's key"}) for _ in range(4)]
    other = web.post(path, headers={"x-key": "bob's key"})

    assert [answer.status_code for answer in answers][:1] == [200]
    assert answers[-1].status_code == 429
    assert answers[-1].headers["x-llm-guard-decision"] == "reject"
    assert other.status_code == 200
    assert provider.arrived == len([answer for answer in [*answers, other] if answer.status_code == 200])


@pytest.mark.parametrize("path", ["/api/chat", "/v1/async"])
@pytest.mark.parametrize(("depends", "identity"), WAYS)
def test_whom_no_dependency_knows_reaches_no_provider(
    path: str, depends: Any, identity: Any, client: openai.OpenAI, config: Config, provider: Any
) -> None:
    web = app_of(client, depends, config(identity=identity))

    answer = web.post(path, headers={"x-key": "nobody's key"})

    assert answer.status_code == 401
    assert ("who are you?" in answer.text) == (depends is behind_another)
    assert provider.arrived == 0
    assert [event["kind"] for event in events()] in ([], ["release"])


def test_the_handler_sees_its_caller_once_something_was_asked(client: openai.OpenAI, config: Config) -> None:
    seen: list[str | None] = []
    app = FastAPI()

    @app.post("/api/chat", dependencies=[Depends(in_state)])
    def chat() -> None:
        call = current_call()
        assert call is not None
        seen.append(call.principal.user)
        client.chat.completions.create(model="gpt-4o-mini", max_tokens=9, messages=[{"role": "user", "content": "?"}])
        seen.append(call.principal.user)

    app.add_middleware(GuardMiddleware, config=config(identity={"user": ["state:user"]}))

    assert TestClient(app).post("/api/chat", headers={"x-key": "ada's key"}).status_code == 200
    assert seen == [None, "ada"]


def test_what_a_handler_reports_without_a_capture_is_its_callers(config: Config, caplog: Any) -> None:
    app = FastAPI()

    @app.post("/api/chat", dependencies=[Depends(in_state)])
    async def chat() -> None:
        call = current_call()
        assert call is not None
        call.record({"model": "gpt-4o-mini", "input_tokens": 10, "output_tokens": 5})

    app.add_middleware(GuardMiddleware, config=config(identity={"user": ["state:user"]}))

    assert TestClient(app).post("/api/chat", headers={"x-key": "ada's key"}).status_code == 200
    [event] = events()
    assert (event["user"], event["input_tokens"]) == ("ada", 10)
    lines = [json.loads(record.getMessage()) for record in caplog.records if '"event":"call"' in record.getMessage()]
    assert [line["user"] for line in lines] == ["ada"]
