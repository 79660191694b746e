"""What only a WSGI app or its server can do to the door: PEP 3333 in all its corners, bodies, peers, Flask."""

from __future__ import annotations

import contextvars
import io
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from wsgiref.util import FileWrapper
from wsgiref.validate import validator

import flask
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix

from llm_guard_mw import ConfigError, WSGIGuardMiddleware, capture, current_call, process
from llm_guard_mw.cli.demo.standin import StandIn
from llm_guard_mw.ledger import verify
from llm_guard_mw.wsgi import _Body
from tests.doors.harness import API_KEY, PROMPT, STRANGER, Reply, Sent, drive_wsgi, environ_of, until

pytestmark = pytest.mark.usefixtures("clean")

Config = Callable[..., dict[str, Any]]
RICH = ["$1/day per user"]
#: A captured chat costs more than that, a request at the door costs nothing.
TIGHT = ["$0.00001/day per user"]
#: An answer without usage of its own is booked by what the door saw of it.
METERED = {"limits": RICH, "model": "gpt-4o-mini"}


@pytest.fixture
def client(provider: StandIn, url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key=API_KEY, base_url=f"{url}/v1", max_retries=0) as client:
        yield capture(client)


def ask(client: openai.OpenAI) -> str:
    messages: Any = [{"role": "user", "content": PROMPT}]
    answer = client.chat.completions.create(model="gpt-4o-mini", messages=messages, max_tokens=50)
    return answer.choices[0].message.content or ""


def guarded(app: Any, config: Any) -> Any:
    """The guard between an app and a server that both keep to PEP 3333."""
    return validator(WSGIGuardMiddleware(validator(app), config=config))


def books() -> list[dict[str, Any]]:
    """The ledger's rows once everything has been written; the books add up."""
    installed = process.install()
    desk, ledger = installed.desk, installed.keeper.ledger
    until(lambda: not desk.open and not desk.calls and not desk.outbox, "everything is closed")
    found = verify(desk.store, ledger)
    assert found.ok, found.findings
    assert found.open_holds == 0
    return sorted(ledger.events(), key=lambda row: (row["call_id"], row["attempt"]))


TEXT = [("Content-Type", "text/plain")]


# ---------------------------------------------------------------- when the head goes


def test_a_generator_that_calls_start_response_when_it_is_iterated_may_still_be_refused(
    config: Config, client: openai.OpenAI
) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", TEXT)
        yield ask(client).encode()

    reply = drive_wsgi(guarded(app, config(route={"limits": TIGHT})), Sent())

    assert reply.status == 429
    assert reply.json()["code"] == "never_fits"
    books()


def test_empty_chunks_let_no_head_go(config: Config, client: openai.OpenAI) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", TEXT)
        yield b""
        yield b""
        yield ask(client).encode()

    reply = drive_wsgi(guarded(app, config(route={"limits": TIGHT})), Sent())

    assert reply.status == 429
    books()


def test_the_status_is_known_when_the_callable_returns(config: Config) -> None:
    heads: list[str] = []

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("202 Accepted", TEXT)
        yield b"first"
        raise AssertionError("nobody asked for the second")

    iterable = WSGIGuardMiddleware(app, config=config(route=METERED))(
        environ_of(Sent()), lambda status, headers: heads.append(status)
    )

    assert heads == ["202 Accepted"]
    iterable.close()  # type: ignore[attr-defined]  # PEP 3333 gives it to iterables, typing does not
    books()


def test_the_first_byte_does_not_wait_for_the_second(config: Config) -> None:
    gate = threading.Event()

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", TEXT)
        yield b"first"
        assert gate.wait(10)
        yield b"second"

    iterable = guarded(app, config(route={"limits": RICH}))(environ_of(Sent()), lambda *head: lambda data: None)
    iterator = iter(iterable)

    assert next(iterator) == b"first"
    gate.set()
    assert list(iterator) == [b"second"]
    iterable.close()
    books()


def test_a_head_may_be_replaced_with_exc_info_until_it_has_gone(config: Config) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", TEXT)
        try:
            raise RuntimeError("the app's own")
        except RuntimeError:
            start_response("503 Service Unavailable", TEXT, sys.exc_info())
        yield b"sorry"

    reply = drive_wsgi(guarded(app, config(route=METERED)), Sent())

    assert (reply.status, reply.body, reply.error) == (503, b"sorry", None)
    assert [row["kind"] for row in books()] == ["release"]


def test_a_head_that_has_gone_cannot_be_replaced(config: Config) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", TEXT)
        yield b"well"
        try:
            raise RuntimeError("the app's own")
        except RuntimeError:
            start_response("500 Internal Server Error", TEXT, sys.exc_info())
        yield b"never"

    reply = drive_wsgi(guarded(app, config(route=METERED)), Sent())

    assert (reply.status, reply.body, reply.whole) == (200, b"well", False)
    assert isinstance(reply.error, RuntimeError)
    assert [row["kind"] for row in books()] == ["settle"]


def test_a_second_head_without_exc_info_is_the_apps_mistake(config: Config) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", TEXT)
        start_response("201 Created", TEXT)
        return [b"never"]

    reply = drive_wsgi(guarded(app, config(route=METERED)), Sent())

    assert isinstance(reply.error, AssertionError)
    assert [row["basis"] for row in books()] == ["held"]


def test_an_app_that_never_answers_breaks_no_bookkeeping(config: Config) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        return []

    drive_wsgi(WSGIGuardMiddleware(app, config=config(route=METERED)), Sent())

    assert [row["basis"] for row in books()] == ["held"]


# ---------------------------------------------------------------- write()


def test_what_is_written_passes_and_is_metered(config: Config) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        write = start_response("200 OK", TEXT)
        write(b"word " * 100)
        write(b"word " * 100)
        return [b"and the rest"]

    reply = drive_wsgi(guarded(app, config(route=METERED)), Sent())

    assert reply.body == b"word " * 200 + b"and the rest"
    assert reply.headers["x-llm-guard-decision"] == "allow"
    [row] = books()
    assert (row["basis"], row["status"]) == ("counted", 200)
    assert row["output_tokens"] >= 200


def test_an_empty_write_lets_no_head_go(config: Config, client: openai.OpenAI) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        write = start_response("200 OK", TEXT)
        write(b"")
        write(ask(client).encode())
        return []

    reply = drive_wsgi(guarded(app, config(route={"limits": TIGHT})), Sent())

    assert reply.status == 429
    books()


def test_a_refusal_behind_a_write_changes_nothing_of_what_was_sent(config: Config, client: openai.OpenAI) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        write = start_response("200 OK", TEXT)
        write(b"Well: ")
        write(ask(client).encode())
        return []

    reply = drive_wsgi(guarded(app, config(route={"limits": TIGHT})), Sent())

    assert (reply.status, reply.body, reply.whole) == (200, b"Well: ", False)
    assert isinstance(reply.error, openai.RateLimitError)
    books()


def test_what_an_app_writes_of_its_500_is_not_seen_behind_our_429(config: Config, client: openai.OpenAI) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        try:
            ask(client)
        except openai.RateLimitError:
            start_response("500 Internal Server Error", TEXT, sys.exc_info())(b"oops")
            raise
        yield b"never"

    reply = drive_wsgi(guarded(app, config(route={"limits": TIGHT})), Sent())

    assert (reply.status, reply.error) == (429, None)
    assert reply.json()["code"] == "never_fits"
    books()


# ---------------------------------------------------------------- the end


class Answer:
    """An iterable that tells what was done with it, and in which call."""

    def __init__(self, *chunks: bytes, fail: bool = False) -> None:
        self.chunks = list(chunks)
        self.fail = fail
        self.done: list[Any] = []

    def __call__(self, environ: Any, start_response: Any) -> Answer:
        start_response("200 OK", TEXT)
        return self

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        self.done.append(("next", current_call()))
        if not self.chunks:
            raise RuntimeError("the app's own") if self.fail else StopIteration
        return self.chunks.pop(0)

    def close(self) -> None:
        call = current_call()
        assert call is not None
        self.done.append(("close", call, call.closed))


def test_every_step_runs_in_the_call_and_the_call_closes_behind_the_app(config: Config) -> None:
    app = Answer(b"one", b"two")
    door = guarded(app, config(route={"limits": RICH}))

    reply = drive_wsgi(door, Sent())  # each step in another thread

    assert reply.body == b"onetwo"
    assert [step[0] for step in app.done] == ["next", "next", "next", "close"]
    assert {step[1].id for step in app.done} == {reply.call_id}
    assert app.done[-1][2] is False
    assert app.done[-1][1].closed is True
    books()


def test_an_answer_that_nobody_reads_is_closed_as_cut_off(config: Config) -> None:
    app = Answer(b"one", b"two")

    drive_wsgi(guarded(app, config(route=METERED)), Sent(hang_up_after=0))

    assert [step[0] for step in app.done] == ["next", "close"]
    assert [row["basis"] for row in books()] == ["held"]


def test_an_iteration_that_fails_is_closed_by_the_server(config: Config) -> None:
    app = Answer(b"one", fail=True)

    reply = drive_wsgi(guarded(app, config(route=METERED)), Sent())

    assert isinstance(reply.error, RuntimeError)
    assert app.done[-1][0] == "close"
    assert [row["basis"] for row in books()] == ["held"]


def test_closing_twice_changes_nothing(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    app = Answer(b"one")
    iterable: Any = WSGIGuardMiddleware(app, config=config(route=METERED))(environ_of(Sent()), lambda *head: None)

    iterable.close()
    iterable.close()

    assert [step[0] for step in app.done].count("close") == 1
    assert caplog.text.count('"event":"call"') == 1
    books()


def test_an_answer_that_is_dropped_unclosed_is_closed_by_the_keeper(config: Config) -> None:
    app = Answer(b"word " * 50, b"and more")
    door = WSGIGuardMiddleware(app, config=config(route={"limits": ["1 concurrent per user"], "model": "gpt-4o-mini"}))
    iterable: Any = door(environ_of(Sent()), lambda *head: None)

    refused = drive_wsgi(door, Sent())
    del iterable
    books()

    assert refused.status == 429
    assert drive_wsgi(door, Sent()).status == 200
    books()


def test_a_generator_hears_that_its_client_has_gone(config: Config) -> None:
    heard: list[Any] = []

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", TEXT)
        try:
            for _ in range(50):
                yield b"word "
        except GeneratorExit:
            heard.append(current_call())
            raise

    reply = drive_wsgi(guarded(app, config(route=METERED)), Sent(hang_up_after=2))

    assert [call.id for call in heard] == [reply.call_id]
    assert [row["basis"] for row in books()] == ["held"]


def test_what_an_app_raises_in_close_reaches_the_server_and_the_call_is_closed(config: Config) -> None:
    class Failing(Answer):
        def close(self) -> None:
            raise RuntimeError("the app's own")

    reply = drive_wsgi(guarded(Failing(b"one"), config(route=METERED)), Sent())

    assert isinstance(reply.error, RuntimeError)
    assert [row["basis"] for row in books()] == ["counted"]


def test_an_exit_out_of_the_app_closes_the_call(config: Config) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        raise SystemExit  # as gunicorn ends a worker that takes too long

    with pytest.raises(SystemExit):
        WSGIGuardMiddleware(app, config=config(route=METERED))(environ_of(Sent()), lambda *head: None)

    assert [row["basis"] for row in books()] == ["held"]


def test_a_promised_length_that_was_delivered_is_a_whole_answer(config: Config) -> None:
    class Promised(Answer):
        def __call__(self, environ: Any, start_response: Any) -> Answer:
            start_response("200 OK", [*TEXT, ("Content-Length", "6")])
            return self

    app = Promised(b"one", b"two")

    # granian does not ask for the end of a body whose length it knows.
    reply = drive_wsgi(WSGIGuardMiddleware(app, config=config(route=METERED)), Sent(hang_up_after=2))

    assert reply.body == b"onetwo"
    assert [step[0] for step in app.done] == ["next", "next", "close"]
    assert [row["basis"] for row in books()] == ["counted"]


def test_a_file_is_sent_by_the_servers_wrapper_and_closed(config: Config) -> None:
    file = io.BytesIO(b"word " * 20_000)

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", TEXT)
        return environ["wsgi.file_wrapper"](file, 4096)

    reply = drive_wsgi(
        WSGIGuardMiddleware(app, config=config(route=METERED)), Sent(scope={"wsgi.file_wrapper": FileWrapper})
    )

    assert reply.body == b"word " * 20_000
    assert file.closed
    assert [row["basis"] for row in books()] == ["counted"]


# ---------------------------------------------------------------- HEAD


def test_an_answer_to_head_has_no_body_and_is_whole(config: Config) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [*TEXT, ("Content-Length", "5")])
        return []

    route = {**METERED, "methods": ["GET"]}

    reply = drive_wsgi(guarded(app, config(route=route)), Sent("HEAD", chunks=[]))

    assert (reply.status, reply.body, reply.whole) == (200, b"", True)
    assert [row["basis"] for row in books()] == ["counted"]


def test_a_refusal_of_head_has_the_headers_and_no_body(config: Config) -> None:
    door = guarded(Answer(b""), config(route={"limits": ["1 requests/day per user"], "methods": ["GET"]}))

    replies = [drive_wsgi(door, Sent("HEAD", chunks=[])) for _ in range(2)]

    assert (replies[1].status, replies[1].body) == (429, b"")
    assert int(replies[1].headers["content-length"]) > 0
    books()


# ---------------------------------------------------------------- the request's body


class Wire(io.BytesIO):
    """A server's input: it may be read with `read(n)`, and not beyond its end."""

    def read(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        assert 0 < size <= len(self.getbuffer()) - self.tell(), "read beyond the end"
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        raise AssertionError("some servers lose bytes here")


READS = st.one_of(
    st.tuples(st.sampled_from(["read", "readline", "readlines"]), st.integers(-1, 40)),
    st.tuples(st.sampled_from(["read", "readline", "readlines"])),
    st.tuples(st.just("__next__")),
)


@given(
    body=st.lists(st.sampled_from([b"a", b"bc", b"\n", b"word ", b"x" * 30]), max_size=30).map(b"".join),
    most=st.integers(1, 60),
    length_is_known=st.booleans(),
    reads=st.lists(READS, max_size=8),
)
def test_however_an_app_reads_its_body_it_reads_what_was_sent(
    body: bytes, most: int, length_is_known: bool, reads: list[Any]
) -> None:
    if length_is_known:
        looked = _Body({"wsgi.input": Wire(body), "CONTENT_LENGTH": str(len(body))}, most)
    else:
        looked = _Body({"wsgi.input": io.BytesIO(body), "wsgi.input_terminated": True}, most)
    given_to_app: Any = looked.stream
    expected: Any = io.BytesIO(body)

    assert looked.seen == body[:most]
    assert looked.complete is (len(body) <= most if length_is_known else len(body) < most)
    for name, *size in reads:
        if name == "__next__":
            assert next(given_to_app, None) == next(expected, None)
        else:
            assert getattr(given_to_app, name)(*size) == getattr(expected, name)(*size)
    assert given_to_app.read() == expected.read()


def test_a_body_without_length_and_end_is_not_touched() -> None:
    stream = object()

    looked = _Body({"wsgi.input": stream, "HTTP_TRANSFER_ENCODING": "chunked"}, 100)  # type: ignore[dict-item]

    assert looked.stream is stream
    assert looked.complete is False


@pytest.mark.parametrize("length", ["", None, "0"])
def test_a_request_without_a_body_is_complete(length: str | None) -> None:
    stream = Wire(b"of the next request")

    looked = _Body({"wsgi.input": stream, **({} if length is None else {"CONTENT_LENGTH": length})}, 100)

    assert (looked.seen, looked.complete, stream.tell()) == (b"", True, 0)


def test_a_client_that_goes_away_while_it_sends_is_the_apps_to_hear_of(config: Config) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            found = super().read(size)
            if not found:
                raise ConnectionResetError("gone")
            return found

    def app(environ: Any, start_response: Any) -> list[bytes]:
        head = environ["wsgi.input"].read(4)
        with pytest.raises(ConnectionResetError):
            environ["wsgi.input"].read(100)
        start_response("400 Bad Request", TEXT)
        return [head]

    scope = {"wsgi.input": Broken(b'{"q": '), "CONTENT_LENGTH": "50"}

    reply = drive_wsgi(WSGIGuardMiddleware(app, config=config(route=METERED)), Sent(scope=scope))

    assert (reply.status, reply.body) == (400, b'{"q"')
    books()


def test_a_body_cut_short_reaches_the_app_as_far_as_it_came() -> None:
    looked = _Body({"wsgi.input": io.BytesIO(b"half"), "CONTENT_LENGTH": "8"}, 100)

    assert (looked.seen, looked.complete) == (b"half", False)
    assert looked.stream.read() == b"half"


# ---------------------------------------------------------------- paths, names, peers


def plain(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", TEXT)
    return [b"fine"]


def test_a_mounted_app_is_guarded_below_its_own_root(config: Config) -> None:
    door = guarded(plain, config(route={"limits": RICH}))
    app = DispatcherMiddleware(plain, {"/inner": door})

    replies = [drive_wsgi(app, Sent(path=path)) for path in ("/inner/api/chat", "/api/chat")]

    assert ["x-llm-guard-decision" in reply.headers for reply in replies] == [True, False]
    assert [row["route"] for row in books()] == ["chat"]


def test_a_path_is_matched_as_text(config: Config) -> None:
    routes = [{"path": "/grüße/{name}", "name": "greet", "limits": RICH}]
    path = "/grüße/ada".encode().decode("latin-1")  # as PEP 3333 has it

    reply = drive_wsgi(guarded(plain, config(routes=routes)), Sent(path=path))

    assert reply.headers["x-llm-guard-decision"] == "allow"
    assert [row["route"] for row in books()] == ["greet"]


def test_two_headers_that_name_the_caller_differently_name_nobody(config: Config) -> None:
    door = guarded(plain, config(route={"limits": RICH}))

    replies = [drive_wsgi(door, Sent(user=user)) for user in ("eve,ada", "ada,ada", "ada, ada", "ada")]

    # A server joins them into one value: to invent the first is to be somebody new each time.
    assert [reply.status for reply in replies] == [401, 200, 200, 200]
    assert "more than once" in replies[0].json()["detail"]
    assert {row["user"] for row in books()} == {"ada"}


def test_names_with_an_underscore_are_no_way_around_the_stripping(config: Config) -> None:
    seen: list[Any] = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        seen.append(environ.get("HTTP_X_USER_ID"))
        return plain(environ, start_response)

    door = guarded(app, config(route={"limits": RICH}))

    drive_wsgi(door, Sent(path="/free", peer=STRANGER, user=None, headers={"X_User_Id": "ada"}))

    assert seen == [None]


UNIX = {"identity": {"user": ["header:x-user-id"], "trusted_proxies": ["unix"], "anonymous": "ip"}}


@pytest.mark.parametrize(
    ("peer", "user"),
    [
        ({"REMOTE_ADDR": ""}, "ada"),  # gunicorn and granian
        ({"REMOTE_ADDR": "localhost", "REMOTE_PORT": "None"}, "ada"),  # waitress
        ({}, "ip:unknown"),
        ({"REMOTE_ADDR": "localhost", "REMOTE_PORT": "80"}, "ip:localhost"),
        ({"REMOTE_ADDR": "127.0.0.1", "REMOTE_PORT": "0"}, "ip:unknown"),  # rewritten by an ASGI server in front
    ],
)
def test_a_unix_socket_is_known_by_what_servers_call_it(peer: dict[str, str], user: str, config: Config) -> None:
    door = guarded(plain, config(route={"limits": RICH}, **UNIX))

    drive_wsgi(door, Sent(peer=None, scope=peer))

    assert [row["user"] for row in books()] == [user]


def test_the_peer_is_the_servers_also_behind_werkzeugs_proxy_fix(config: Config) -> None:
    door = ProxyFix(guarded(plain, config(route={"limits": RICH})))

    # Whoever comes from elsewhere and calls himself a trusted address is not believed; the proxy is.
    forged = drive_wsgi(door, Sent(peer=STRANGER, headers={"x-forwarded-for": "127.0.0.1"}))
    proxied = drive_wsgi(door, Sent(headers={"x-forwarded-for": "198.51.100.7"}))

    assert [forged.status, proxied.status] == [401, 200]
    assert [row["user"] for row in books()] == ["ada"]


async def who_async(request: Any) -> str:
    return "ada"


def test_an_async_identity_source_is_refused_when_the_door_is_made(config: Config) -> None:
    with pytest.raises(ConfigError, match="no event loop"):
        WSGIGuardMiddleware(plain, config=config(identity={"user": [f"{__name__}:who_async"]}))


# ---------------------------------------------------------------- contexts and loops


def test_nothing_of_the_call_is_left_in_the_servers_context(config: Config) -> None:
    named: contextvars.ContextVar[str] = contextvars.ContextVar("named", default="nobody")

    def app(environ: Any, start_response: Any) -> list[bytes]:
        named.set("ada")
        return plain(environ, start_response)

    def serve() -> tuple[Any, str]:
        iterable = WSGIGuardMiddleware(app, config=config(route={"limits": RICH}))(
            environ_of(Sent()), lambda *head: None
        )
        list(iterable)
        iterable.close()  # type: ignore[attr-defined]  # see above
        return current_call(), named.get()

    assert contextvars.Context().run(serve) == (None, "nobody")
    books()


def test_a_guarded_call_starts_no_event_loop(config: Config, client: openai.OpenAI) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", TEXT)
        return [ask(client).encode()]

    before = {thread.name for thread in threading.enumerate()}
    drive_wsgi(guarded(app, config(route={"limits": RICH})), Sent())
    begun = {thread.name for thread in threading.enumerate()} - before

    assert begun <= {"llm-guard-keeper", "llm-guard-store", "llm_guard lost streams"}
    books()


# ---------------------------------------------------------------- Flask


@pytest.fixture
def app() -> flask.Flask:
    return flask.Flask(__name__)


def put_in_front(app: flask.Flask, config: dict[str, Any]) -> flask.Flask:
    app.wsgi_app = WSGIGuardMiddleware(app.wsgi_app, config=config)  # type: ignore[method-assign]  # Flask's idiom
    return app


def test_a_500_that_flask_makes_of_a_refused_sdk_call_is_our_429(
    app: flask.Flask, config: Config, client: openai.OpenAI
) -> None:
    @app.post("/api/chat")
    def chat() -> str:
        return ask(client)

    reply = drive_wsgi(put_in_front(app, config(route={"limits": TIGHT})), Sent())

    assert (reply.status, reply.error) == (429, None)
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.json()["code"] == "never_fits"
    books()


def test_a_500_that_flask_makes_of_a_refused_charge_or_block_is_our_429(app: flask.Flask, config: Config) -> None:
    @app.post("/api/chat")
    def chat() -> str:
        call = current_call()
        assert call is not None
        call.charge(credits=11)
        return "never"

    @app.post("/api/digest")
    def digest() -> str:
        with process.Guard().as_user(user="bert"), process.Guard().as_user(user="bert"):
            return "never"

    routes = [
        {"path": "/api/chat", "limits": ["10 credits/day per user"]},
        {"path": "/api/digest", "usage": "captured"},
    ]
    door = put_in_front(app, config(routes=routes, limits=["1 concurrent per user"]))

    replies = [drive_wsgi(door, Sent(path=path)) for path in ("/api/chat", "/api/digest")]

    assert [reply.status for reply in replies] == [429, 429]
    assert [reply.json()["limit"] for reply in replies] == ["10 credits/day per user", "1 concurrent per user"]
    books()


def test_a_500_of_the_apps_own_making_stays_one(app: flask.Flask, config: Config) -> None:
    @app.post("/api/chat")
    def chat() -> str:
        raise RuntimeError("the app's own")

    reply = drive_wsgi(put_in_front(app, config(route=METERED)), Sent())

    assert reply.status == 500
    assert reply.headers["x-llm-guard-decision"] == "allow"
    assert [row["kind"] for row in books()] == ["release"]


def test_an_error_handler_of_the_app_answers_a_refusal_as_it_likes(
    app: flask.Flask, config: Config, client: openai.OpenAI
) -> None:
    @app.errorhandler(openai.RateLimitError)
    def upgrade(error: openai.RateLimitError) -> tuple[str, int]:
        return "Upgrade for more", 402

    @app.post("/api/chat")
    def chat() -> str:
        return ask(client)

    reply = drive_wsgi(put_in_front(app, config(route={"limits": TIGHT})), Sent())

    assert (reply.status, reply.body) == (402, b"Upgrade for more")
    books()


def test_a_stream_with_the_context_of_its_request_is_guarded(
    app: flask.Flask, config: Config, client: openai.OpenAI
) -> None:
    @app.post("/api/chat")
    def chat() -> flask.Response:
        @flask.stream_with_context
        def words() -> Iterator[str]:
            for _ in range(2):
                yield f"{flask.request.path}: {ask(client)}\n"

        return flask.Response(words())

    reply = drive_wsgi(put_in_front(app, config(route={"limits": RICH})), Sent())

    assert reply.body.count(b"/api/chat: ") == 2
    assert [row["call_id"] for row in books()] == [reply.call_id] * 2


def test_flasks_own_test_client_keeps_the_context_of_the_request(app: flask.Flask, config: Config) -> None:
    @app.post("/api/chat")
    def chat() -> dict[str, str]:
        flask.g.seen = "yes"
        return {"said": "fine"}

    put_in_front(app, config(route={"limits": [*RICH, "1 concurrent per user"]}))
    who = {"headers": {"x-user-id": "ada"}, "environ_base": {"REMOTE_ADDR": "127.0.0.1", "REMOTE_PORT": "5555"}}

    with app.test_client() as tester:
        for _ in range(2):
            with tester.post("/api/chat", json={"q": "?"}, **who) as response:
                assert response.json == {"said": "fine"}
                assert flask.g.seen == "yes"

    books()


def test_a_reply_is_the_same_with_and_without_the_guard_but_for_its_headers(app: flask.Flask, config: Config) -> None:
    @app.post("/api/chat")
    def chat() -> tuple[dict[str, Any], int, dict[str, str]]:
        return {"heard": flask.request.get_json()}, 201, {"X-Own": "yes"}

    def of(reply: Reply) -> Any:
        kept = {name: value for name, value in reply.headers.items() if not name.startswith(("x-llm", "ratelimit"))}
        return reply.status, kept, reply.body

    bare = drive_wsgi(app.wsgi_app, Sent())
    behind = drive_wsgi(put_in_front(app, config(route={"limits": RICH})), Sent())

    assert of(bare) == of(behind)
    books()
