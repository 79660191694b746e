"""What only Django has: its settings, its users and sessions, its system check, its test client."""

from __future__ import annotations

import gc
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from llm_guard_mw import ConfigError, capture, current_call, guarded, load_config, process
from llm_guard_mw.cli.demo.standin import StandIn
from tests.doors import django_project
from tests.doors.harness import API_KEY, PROMPT, until

from django.contrib.auth import get_user_model  # isort: skip
from django.core.checks import run_checks  # isort: skip
from django.core.management import call_command  # isort: skip
from django.http import Http404, HttpResponse, JsonResponse, StreamingHttpResponse  # isort: skip
from django.test import AsyncClient, Client  # isort: skip
from django.test.utils import override_settings  # isort: skip
from django.urls import path  # isort: skip

TWICE = {"limits": ["$1/day per user", "2 requests/hour per user"]}

Chat = Callable[[], Any]
Project = Callable[..., None]


@pytest.fixture(scope="module", autouse=True)
def database() -> None:
    call_command("migrate", verbosity=0)


@pytest.fixture
def person() -> Iterator[Any]:
    made = get_user_model().objects.create_user("ada")
    yield made
    made.delete()


@pytest.fixture
def chat(url: str) -> Iterator[Chat]:
    client = capture(openai.OpenAI(api_key=API_KEY, base_url=f"{url}/v1", max_retries=0))
    messages: list[Any] = [{"role": "user", "content": PROMPT}]
    yield lambda: client.chat.completions.create(model="gpt-4o-mini", max_tokens=50, messages=messages)
    client.close()


@pytest.fixture
def project(config: Callable[..., dict[str, Any]], provider: StandIn, clean: None) -> Iterator[Project]:
    """A project's settings: `project({"api/chat": view}, identity={...})`."""
    changed = []

    def configure(views: dict[str, Any], *, settings: dict[str, Any] | None = None, **rest: Any) -> None:
        patterns = tuple(path(where, view) for where, view in views.items())
        rest.setdefault("identity", {"user": ["scope:user.id"]})
        rest.setdefault("route", TWICE)
        changed.append(override_settings(LLM_GUARD=config(**rest), ROOT_URLCONF=patterns, **(settings or {})))
        changed[-1].enable()

    yield configure
    for each in changed:
        each.disable()
    process.uninstall()


def who_paid() -> set[str | None]:
    installed = process.install()
    installed.keeper.ledger.drain_all(installed.desk.store)
    return {event["user"] for event in installed.keeper.ledger.events() if event["kind"] == "settle"}


# ---------------------------------------------------------------- who is calling


def test_whoever_has_logged_in_is_known_at_the_door(project: Project, person: Any, chat: Chat) -> None:
    views: list[int] = []

    def view(request: Any) -> HttpResponse:
        views.append(1)
        return HttpResponse(chat().choices[0].message.content)

    project({"api/chat": view})
    browser = Client()
    browser.force_login(person)

    answers = [browser.post("/api/chat", {"q": "why"}, "application/json") for _ in range(3)]

    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert len(views) == 2
    assert answers[0].headers["x-llm-guard-decision"] == "allow"
    assert answers[2].json()["limit"] == "2 requests/hour per user"
    assert who_paid() == {str(person.pk)}


@pytest.mark.anyio
@pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning")
async def test_an_async_view_has_the_same_caller(project: Project, url: str) -> None:
    client = capture(openai.AsyncOpenAI(api_key=API_KEY, base_url=f"{url}/v1", max_retries=0))
    person = await get_user_model().objects.acreate_user("async-ada")

    async def view(request: Any) -> HttpResponse:
        messages: list[Any] = [{"role": "user", "content": PROMPT}]
        answer = await client.chat.completions.create(model="gpt-4o-mini", max_tokens=50, messages=messages)
        return HttpResponse(answer.choices[0].message.content)

    project({"api/chat": view})
    browser = AsyncClient()
    await browser.aforce_login(person)

    answers = [await browser.post("/api/chat", {"q": "why"}, "application/json") for _ in range(3)]

    await client.close()
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert who_paid() == {str(person.pk)}
    await person.adelete()


def test_the_session_names_the_caller(project: Project, chat: Chat) -> None:
    def log_in(request: Any) -> HttpResponse:
        request.session["customer"] = "ada"
        return HttpResponse("welcome")

    project(
        {"log-in": log_in, "api/chat": lambda _: HttpResponse(str(chat()))}, identity={"user": ["session:customer"]}
    )
    browser = Client()
    browser.post("/log-in")

    assert [browser.post("/api/chat").status_code for _ in range(3)] == [200, 200, 429]

    assert who_paid() == {"ada"}


def test_a_caller_whom_the_view_authenticates_is_known_from_then_on(project: Project, person: Any, chat: Chat) -> None:
    def view(request: Any) -> HttpResponse:
        request.user = person  # as Django REST framework does
        return HttpResponse(str(chat()))

    project({"api/chat": view})

    assert [Client().post("/api/chat").status_code for _ in range(3)] == [200, 200, 429]

    assert who_paid() == {str(person.pk)}


def test_what_such_a_view_only_records_is_its_callers(project: Project, person: Any) -> None:
    def view(request: Any) -> HttpResponse:
        request.user = person
        call = current_call()
        assert call is not None
        call.record({"model": "gpt-4o-mini", "input_tokens": 10, "output_tokens": 20})
        return HttpResponse("done")

    project({"api/chat": view})

    Client().post("/api/chat")

    assert who_paid() == {str(person.pk)}


def test_somebody_who_has_not_logged_in_gets_a_401_at_the_first_exchange(project: Project, chat: Chat) -> None:
    project({"api/chat": lambda _: HttpResponse(str(chat()))})

    answer = Client().post("/api/chat")

    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")


# ---------------------------------------------------------------- answers


def test_a_view_that_finds_nothing_is_a_404_whatever_was_refused(project: Project, chat: Chat, person: Any) -> None:
    def view(request: Any) -> HttpResponse:
        try:
            chat()
        except openai.RateLimitError:
            raise Http404 from None
        return HttpResponse("done")

    project({"api/chat": view}, route={"limits": ["$0.000001/day per user"]}, mode="enforce")
    browser = Client()
    browser.force_login(person)

    assert browser.post("/api/chat").status_code == 404


def test_a_refused_sdk_call_is_no_error_of_the_app(project: Project, person: Any, chat: Chat) -> None:
    def view(request: Any) -> HttpResponse:
        return HttpResponse(str([chat() for _ in range(9)]))

    project({"api/chat": view}, route={"limits": ["$0.00008/day per user"]})
    browser = Client()  # it raises what Django reports as the app's
    browser.force_login(person)

    answer = browser.post("/api/chat")

    assert (answer.status_code, answer.headers["x-llm-guard-decision"]) == (429, "reject")


def test_the_apps_own_mistake_stays_its_own(project: Project, person: Any) -> None:
    def view(request: Any) -> HttpResponse:
        raise RuntimeError("the app's own mistake")

    project({"api/chat": view})
    browser = Client(raise_request_exception=False)
    browser.force_login(person)

    assert browser.post("/api/chat").status_code == 500

    assert process.install().desk.calls == {}


def test_a_stream_counts_until_it_is_closed(project: Project, person: Any, chat: Chat) -> None:
    def words() -> Iterator[str]:
        call = current_call()
        assert call is not None
        yield "first "
        yield str(chat().choices[0].message.content)
        assert current_call() is call

    project({"api/chat": lambda _: StreamingHttpResponse(words())})
    browser = Client()
    browser.force_login(person)

    answer = browser.post("/api/chat")

    assert len(process.install().desk.calls) == 1
    assert answer.getvalue().startswith(b"first ")
    assert process.install().desk.calls == {}
    assert current_call() is None
    assert who_paid() == {str(person.pk)}


@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume asynchronous iterators:Warning")
def test_an_async_stream_under_a_sync_server_is_followed(project: Project, person: Any) -> None:
    async def words() -> AsyncIterator[str]:
        call = current_call()
        assert call is not None
        call.record({"model": "gpt-4o-mini", "input_tokens": 10, "output_tokens": 20})
        yield "done"

    project({"api/chat": lambda _: StreamingHttpResponse(words())})
    browser = Client()
    browser.force_login(person)

    answer = browser.post("/api/chat")

    assert b"".join(iter(answer)) == b"done"
    answer.close()
    assert who_paid() == {str(person.pk)}


def test_djangos_cache_can_keep_an_answer(project: Project, person: Any, chat: Chat, provider: StandIn) -> None:
    cached = ["django.middleware.cache.UpdateCacheMiddleware", *django_project.MIDDLEWARE]
    cached += ["django.middleware.cache.FetchFromCacheMiddleware"]
    project(
        {"api/chat": lambda _: HttpResponse(str(chat()))},
        settings={"MIDDLEWARE": cached},
        route={"limits": ["$1/day per user"], "methods": ["GET"]},
    )
    browser = Client()
    browser.force_login(person)

    answers = [browser.get("/api/chat") for _ in range(2)]

    assert [answer.status_code for answer in answers] == [200, 200]
    assert provider.arrived == 1


def test_a_route_that_is_not_guarded_passes(project: Project) -> None:
    project({"other": lambda request: JsonResponse({"user": request.headers.get("x-user-id")})})

    answer = Client().post("/other", headers={"x-user-id": "ada"})

    assert answer.json() == {"user": "ada"}
    assert "x-llm-guard-decision" not in answer.headers


def test_a_strangers_identity_header_is_not_believed_by_the_view_either(project: Project) -> None:
    identity = {"user": ["header:x-user-id"], "trusted_proxies": ["10.0.0.1"]}
    project({"other": lambda request: JsonResponse({"user": request.headers.get("x-user-id")})}, identity=identity)

    assert Client().post("/other", headers={"x-user-id": "ada"}).json() == {"user": None}
    assert Client(REMOTE_ADDR="10.0.0.1").post("/other", headers={"x-user-id": "ada"}).json() == {"user": "ada"}


# ---------------------------------------------------------------- settings


def ours(messages: list[Any]) -> list[Any]:
    return [message for message in messages if str(message.id).startswith("llm_guard_mw.")]


def test_the_system_check_says_what_check_says(project: Project, tmp_path: Path) -> None:
    wrong = tmp_path / "llm_guard.toml"
    wrong.write_text('mod = "observe"\nlimits = ["$5/fortnight global"]\n')
    with pytest.raises(ConfigError) as raised:
        load_config(wrong, check=True)

    with override_settings(LLM_GUARD=wrong):
        found = ours(run_checks())

    assert [(each.obj, each.msg, each.hint) for each in found] == [
        (mistake.where, mistake.problem, mistake.fix) for mistake in raised.value.mistakes
    ]
    assert [each.id for each in found] == ["llm_guard_mw.E001"] * 2
    assert all(each.is_serious() for each in found)


def test_a_good_configuration_has_nothing_to_say(project: Project) -> None:
    project({"api/chat": lambda _: HttpResponse("")})

    assert ours(run_checks()) == []


def test_a_route_that_no_view_answers_is_told(project: Project) -> None:
    project({"api/chat/": lambda _: HttpResponse("")})

    [found] = ours(run_checks())

    assert (found.id, found.obj, found.hint) == ("llm_guard_mw.W003", "route chat", 'write "/api/chat/"')


def test_a_middleware_that_was_forgotten_is_told(project: Project) -> None:
    project({"api/chat": lambda _: HttpResponse("")}, settings={"MIDDLEWARE": []})

    [found] = ours(run_checks())

    assert (found.id, found.msg) == ("llm_guard_mw.W002", "nothing is guarded")


def test_a_configuration_that_is_missing_is_told(project: Project, tmp_path: Path) -> None:
    with override_settings(LLM_GUARD=str(tmp_path / "nowhere.toml")):
        [found] = ours(run_checks())

    assert found.id == "llm_guard_mw.E001"
    assert "nowhere.toml" in found.obj + found.msg


def test_manage_py_check_prints_the_fix(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from django.core.management.base import SystemCheckError

    with (
        override_settings(LLM_GUARD={"limits": ["$5/fortnight global"]}),
        pytest.raises(SystemCheckError, match="fortnight"),
    ):
        call_command("check")


def test_a_path_is_as_good_as_a_dict(project: Project, tmp_path: Path, person: Any, chat: Chat) -> None:
    project({"api/chat": lambda _: HttpResponse(str(chat()))})
    file = tmp_path / "llm_guard.toml"
    where = json.dumps(f"sqlite:///{tmp_path / 'guard.db'}")
    file.write_text(
        f'store = {where}\nledger = {where}\n[[routes]]\npath = "/api/chat"\nlimits = ["1 requests/hour per user"]\n'
    )

    with override_settings(LLM_GUARD=file):
        browser = Client()
        browser.force_login(person)
        answers = [browser.post("/api/chat").status_code for _ in range(2)]

    assert answers == [200, 429]


def test_limits_at_a_view_hold_through_djangos_door(project: Project, person: Any) -> None:
    marked = guarded("1 requests/hour per user", feature="search")(lambda request: HttpResponse("found"))
    project({"search": marked, "other": lambda request: HttpResponse("free")})
    client = Client()
    client.force_login(person)

    statuses = [client.post(each).status_code for each in ("/search", "/search", "/other", "/other")]

    assert statuses == [200, 429, 200, 200]


class Failing:
    """A middleware around the guard that loses its response."""

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        self.get_response(request)
        raise RuntimeError("a middleware outside has failed")


class Twice:
    """A middleware inside of the guard that asks for the response twice."""

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        self.get_response(request)
        return self.get_response(request)


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_call_ends_whatever_other_middleware_does_with_its_response(
    project: Project, person: Any, where: str
) -> None:
    failing, twice = f"{__name__}.Failing", f"{__name__}.Twice"
    around = [failing, *django_project.MIDDLEWARE] if where == "outside" else [*django_project.MIDDLEWARE, twice]
    project({"api/chat": lambda request: HttpResponse("hello")}, settings={"MIDDLEWARE": around})
    client = Client(raise_request_exception=False)
    client.force_login(person)

    client.post("/api/chat")
    gc.collect()

    desk = process.install().desk
    until(lambda: not desk.open and not desk.calls, "the call is closed")
