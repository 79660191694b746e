"""What a sync app sends from generators and from threads of its own, and whom the books name for it."""

from __future__ import annotations

import contextvars
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flask
import openai
import pytest
import requests
from werkzeug.test import Client

from llm_guard_mw import Guard, WSGIGuardMiddleware, capture, current_call, process
from tests.doors.harness import API_KEY, PEER, PROMPT

pytestmark = pytest.mark.usefixtures("clean")

ASK: dict[str, Any] = {"model": "gpt-4o-mini", "max_tokens": 50, "messages": [{"role": "user", "content": PROMPT}]}
Send = Callable[..., Any]


@pytest.fixture
def sdk(url: str, provider: Any) -> Iterator[openai.OpenAI]:
    with capture(openai.OpenAI(api_key=API_KEY, base_url=f"{url}/v1", max_retries=0)) as client:
        yield client


@pytest.fixture
def session(provider: Any) -> Iterator[requests.Session]:
    with capture(requests.Session()) as session:
        session.headers["authorization"] = f"Bearer {API_KEY}"
        yield session


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """As apps have it: made once, before any request, so its threads carry nobody's context."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        yield pool


def serve(view: Callable[..., Any], config: Any) -> Client:
    app = flask.Flask(__name__)
    app.add_url_rule("/api/chat", "chat", view, methods=["POST"])
    app.wsgi_app = WSGIGuardMiddleware(app.wsgi_app, config=config)  # type: ignore[method-assign]  # Flask's documented way
    return Client(app)


def post(client: Client) -> Any:
    return client.post("/api/chat", headers={"x-user-id": "ada"}, environ_base={"REMOTE_ADDR": PEER[0]}, buffered=True)


def events() -> list[dict[str, Any]]:
    installed = process.install()
    installed.keeper.ledger.drain_all(installed.desk.store)
    return [row for row in installed.keeper.ledger.events() if row["model"] is not None]


def calls(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "llm_guard"]
    return [line for line in lines if line["event"] == "call"]


def words_of_sdk(sdk: openai.OpenAI) -> Iterator[str]:
    for chunk in sdk.chat.completions.create(**ASK, stream=True):
        yield chunk.choices[0].delta.content or ""


def words_of_session(session: requests.Session, url: str) -> Iterator[str]:
    with session.post(f"{url}/v1/chat/completions", json={**ASK, "stream": True}, stream=True) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])["choices"][0]["delta"].get("content") or ""


@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize("library", ["sdk", "requests"])
def test_a_generator_of_a_flask_view_belongs_to_its_call(
    library: str,
    with_context: bool,
    sdk: openai.OpenAI,
    session: requests.Session,
    url: str,
    config: Any,
    provider: Any,
) -> None:
    def view() -> flask.Response:
        words = words_of_sdk(sdk) if library == "sdk" else words_of_session(session, url)
        return flask.Response(flask.stream_with_context(words) if with_context else words)

    answer = post(serve(view, config()))

    assert len(answer.text.split()) == 20
    [event] = events()
    assert (event["user"], event["basis"], event["output_tokens"]) == ("ada", "exact", provider.rows[0].output_tokens)


@pytest.mark.parametrize("library", ["sdk", "requests"])
def test_a_refusal_in_a_generator_before_its_first_word_is_a_429(
    library: str, sdk: openai.OpenAI, session: requests.Session, url: str, config: Any, provider: Any
) -> None:
    def view() -> flask.Response:
        return flask.Response(words_of_sdk(sdk) if library == "sdk" else words_of_session(session, url))

    client = serve(view, config({"limits": ["$0.00001/day per user"]}))
    answers = [post(client) for _ in range(3)]

    assert answers[-1].status_code == 429
    assert json.loads(answers[-1].data)["code"] in ("budget_spent", "never_fits")
    assert provider.arrived < 3


def test_a_generator_that_is_drawn_by_another_thread_belongs_to_its_call(
    sdk: openai.OpenAI, pool: ThreadPoolExecutor, config: Any
) -> None:
    client = serve(lambda: flask.Response(words_of_sdk(sdk)), config())

    answer = pool.submit(post, client).result()

    assert len(answer.text.split()) == 20
    assert [event["user"] for event in events()] == ["ada"]


def test_a_pools_thread_without_the_context_is_unattributed(
    sdk: openai.OpenAI, pool: ThreadPoolExecutor, config: Any, caplog: Any
) -> None:
    def view() -> str:
        return str(pool.submit(lambda: sdk.chat.completions.create(**ASK).choices[0].message.content).result())

    answer = post(serve(view, config(limits=["$1/day global", "$0.0000001/day per user"], routes=[])))

    assert answer.status_code == 200
    [event] = events()
    # A limit per user cannot name it, so it holds nobody; the one over everything counts.
    assert (event["user"], event["parent_call_id"], event["basis"]) == (None, None, "exact")
    assert [line["unattributed"] for line in calls(caplog)] == [True]
    spent = {state.balance: state.spent for state in process.install().desk.store.balances("", 100)}
    assert [balance.partition("|")[0] for balance, amount in spent.items() if amount] == ["global"]


def test_a_pools_thread_inside_a_guarded_call_is_no_part_of_it_without_the_context(
    sdk: openai.OpenAI, pool: ThreadPoolExecutor, config: Any, caplog: Any
) -> None:
    def view() -> str:
        pool.submit(lambda: sdk.chat.completions.create(**ASK)).result()
        call = current_call()
        return str(call and call.captures)

    assert post(serve(view, config())).text == "0"
    assert [event["user"] for event in events()] == [None]
    assert {(line["user"], line.get("unattributed")) for line in calls(caplog)} == {("ada", None), (None, True)}


def test_a_pools_thread_with_a_copy_of_the_context_belongs_to_the_call(
    sdk: openai.OpenAI, pool: ThreadPoolExecutor, config: Any, caplog: Any
) -> None:
    def view() -> str:
        context = contextvars.copy_context()
        return str(pool.submit(context.run, lambda: sdk.chat.completions.create(**ASK).model).result())

    assert post(serve(view, config())).status_code == 200
    assert [event["user"] for event in events()] == ["ada"]
    assert [line["exchanges"] for line in calls(caplog)] == [1]


def test_as_user_names_whom_a_pools_thread_works_for(sdk: openai.OpenAI, pool: ThreadPoolExecutor, config: Any) -> None:
    def work(user: str) -> str:
        with Guard().as_user(user=user, feature="digest"):
            return str(sdk.chat.completions.create(**ASK).model)

    assert post(serve(lambda: pool.submit(work, "bob").result(), config())).status_code == 200
    assert [(event["user"], event["feature"]) for event in events()] == [("bob", "digest")]


def test_many_threads_of_one_call_share_its_budget(sdk: openai.OpenAI, config: Any) -> None:
    def one() -> int:
        try:
            sdk.chat.completions.create(**ASK)
        except openai.RateLimitError:
            return 429
        return 200

    def view() -> dict[str, int]:
        with ThreadPoolExecutor(8) as crowd:
            asked = [crowd.submit(contextvars.copy_context().run, one) for _ in range(24)]
            answers = [each.result() for each in asked]
        return {"granted": answers.count(200), "refused": answers.count(429)}

    answer = post(serve(view, config({"limits": ["$0.0002/day per user"]}))).json

    assert answer["granted"] > 0
    assert answer["refused"] > 0
    assert sum(event["cost_nanos"] or 0 for event in events()) <= 200_000
