"""Who is calling, told by Flask's session or flask_login: neither can be read before Flask handles the request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import flask
import flask_login
import openai
import pytest

from llm_guard_mw import WSGIGuardMiddleware, capture, current_call, process
from llm_guard_mw.cli.demo.standin import StandIn
from tests.doors.harness import API_KEY, PROMPT

LIMITS = ["$1/day per user", "2 requests/hour per user"]

Chat = Callable[[], Any]


class Person(flask_login.UserMixin):  # type: ignore[misc] # flask_login has no types
    def __init__(self, name: str) -> None:
        self.id, self.team = name, "acme"


@pytest.fixture
def chat(url: str) -> Iterator[Chat]:
    client = capture(openai.OpenAI(api_key=API_KEY, base_url=f"{url}/v1", max_retries=0))
    messages: list[Any] = [{"role": "user", "content": PROMPT}]
    yield lambda: client.chat.completions.create(model="gpt-4o-mini", max_tokens=50, messages=messages)
    client.close()


@pytest.fixture
def app(config: Callable[..., dict[str, Any]], provider: StandIn, clean: None) -> Iterator[flask.Flask]:
    """A Flask app behind a guard that asks flask_login, then the session."""
    app = flask.Flask(__name__)
    app.secret_key = "a test's own"
    app.wsgi_app = WSGIGuardMiddleware(  # type: ignore[method-assign] # as Flask's documentation has it
        app.wsgi_app,
        config(
            route={"limits": LIMITS, "path": "/api/{what}"},
            identity={"user": ["scope:user.id", "session:user_id"], "tenant": ["scope:user.team"]},
        ),
    )

    @app.post("/login/<name>")
    def login(name: str) -> str:
        flask.session["user_id"] = name
        return "welcome"

    yield app
    process.uninstall()


def with_flask_login(app: flask.Flask) -> list[str]:
    """flask_login on top; gives the names that its user_loader was asked for."""
    asked = []
    manager = flask_login.LoginManager(app)

    @manager.user_loader  # type: ignore[untyped-decorator] # flask_login has no types
    def load(name: str) -> Person:
        asked.append(name)
        return Person(name)

    @app.post("/login-for-good/<name>")
    def login_for_good(name: str) -> str:
        flask_login.login_user(Person(name))
        return "welcome"

    return asked


def who_paid() -> set[tuple[str | None, str | None]]:
    installed = process.install()
    installed.keeper.ledger.drain_all(installed.desk.store)
    events = installed.keeper.ledger.events()
    return {(event["tenant"], event["user"]) for event in events if event["kind"] == "settle"}


def test_the_signed_session_names_the_caller(app: flask.Flask, chat: Chat) -> None:
    @app.post("/api/chat")
    def view() -> str:
        return str(chat().choices[0].message.content)

    browser = app.test_client()
    browser.post("/login/ada")

    answers = [browser.post("/api/chat").status_code for _ in range(3)]

    assert answers == [200, 200, 429]
    assert who_paid() == {(None, "ada")}


def test_a_forged_session_is_nobody(app: flask.Flask, chat: Chat) -> None:
    @app.post("/api/chat")
    def view() -> str:
        return str(chat())

    browser = app.test_client()
    other = flask.Flask("other")
    other.secret_key = "another key"
    forged = flask.sessions.SecureCookieSessionInterface().get_signing_serializer(other)
    assert forged is not None
    browser.set_cookie("session", forged.dumps({"user_id": "ada"}))

    assert browser.post("/api/chat").status_code == 401

    assert who_paid() == set()


def test_flask_logins_user_names_the_caller_with_what_else_it_says(app: flask.Flask, chat: Chat) -> None:
    asked = with_flask_login(app)

    @app.post("/api/chat")
    def view() -> str:
        return str(chat())

    browser = app.test_client()
    browser.post("/login-for-good/ada")
    browser.post("/login/bob")  # the session says so as well, and is asked second

    assert browser.post("/api/chat").status_code == 200

    assert who_paid() == {("acme", "ada")}
    assert asked == ["ada"]


def test_whom_flask_login_does_not_know_is_told_by_the_session(app: flask.Flask, chat: Chat) -> None:
    with_flask_login(app)

    @app.post("/api/chat")
    def view() -> str:
        return str(chat())

    browser = app.test_client()
    browser.post("/login/bob")

    assert browser.post("/api/chat").status_code == 200

    assert who_paid() == {(None, "bob")}


def test_a_stream_that_is_read_after_flask_has_forgotten_its_request_belongs_to_its_caller(
    app: flask.Flask, chat: Chat
) -> None:
    with_flask_login(app)

    @app.post("/api/chat")
    def view() -> flask.Response:
        def words() -> Iterator[str]:
            assert not flask.has_request_context()
            yield str(chat().choices[0].message.content)

        return flask.Response(words())

    browser = app.test_client()
    browser.post("/login-for-good/ada")

    answers = [browser.post("/api/chat", buffered=True).status_code for _ in range(3)]

    assert answers == [200, 200, 429]
    assert who_paid() == {("acme", "ada")}


def test_usage_that_was_only_recorded_belongs_to_its_caller(app: flask.Flask) -> None:
    with_flask_login(app)

    @app.post("/api/chat")
    def view() -> str:
        call = current_call()
        assert call is not None
        call.record({"model": "gpt-4o-mini", "input_tokens": 10, "output_tokens": 20})
        return "done"

    browser = app.test_client()
    browser.post("/login-for-good/ada")

    browser.post("/api/chat", buffered=True)

    assert who_paid() == {("acme", "ada")}


def test_what_a_view_used_before_it_failed_belongs_to_its_caller(app: flask.Flask) -> None:
    with_flask_login(app)

    @app.post("/api/chat")
    def view() -> str:
        call = current_call()
        assert call is not None
        call.record({"model": "gpt-4o-mini", "input_tokens": 10, "output_tokens": 20})
        raise RuntimeError("the app's own mistake")

    browser = app.test_client()
    browser.post("/login-for-good/ada")

    assert browser.post("/api/chat", buffered=True).status_code == 500

    assert who_paid() == {("acme", "ada")}


def test_a_request_to_another_app_within_the_request_names_nobody_else(app: flask.Flask) -> None:
    with_flask_login(app)
    other = flask.Flask("other")
    other.secret_key = "another key"
    with_flask_login(other)

    @app.post("/api/chat")
    def view() -> str:
        other.test_client().post("/login-for-good/bob")
        call = current_call()
        assert call is not None
        call.record({"model": "gpt-4o-mini", "input_tokens": 10, "output_tokens": 20})
        return "done"

    browser = app.test_client()
    browser.post("/login-for-good/ada")

    browser.post("/api/chat", buffered=True)

    assert who_paid() == {("acme", "ada")}


def test_a_user_loader_that_fails_lets_nobody_in_and_leaves_the_apps_answer_alone(
    app: flask.Flask, chat: Chat, caplog: pytest.LogCaptureFixture
) -> None:
    manager = flask_login.LoginManager(app)

    @manager.user_loader  # type: ignore[untyped-decorator] # flask_login has no types
    def load(name: str) -> None:
        raise ConnectionError("the database is away")

    @app.post("/api/chat")
    def view() -> str:
        return "no provider was asked"

    @app.post("/api/story")
    def story() -> str:
        return str(chat())

    browser = app.test_client()
    with browser.session_transaction() as session:
        session["_user_id"] = "ada"

    assert browser.post("/api/chat", buffered=True).text == "no provider was asked"
    assert browser.post("/api/story").status_code == 401

    assert "identity_source_failed" in caplog.text
