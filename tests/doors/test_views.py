"""`@guarded`: a view brings its own rule, whatever framework runs it, and the file has the last word."""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import flask
import flask.views
import pytest
from django.conf import settings
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpResponse
from django.test import override_settings
from django.urls import include, path, re_path
from django.utils.decorators import method_decorator
from django.views import View
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.convertors import CONVERTOR_TYPES, Convertor
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Host, Mount, Route
from starlette.testclient import TestClient
from werkzeug.test import Client

from llm_guard_mw import ConfigError, GuardMiddleware, WSGIGuardMiddleware, current_call, guarded, load_config, process
from llm_guard_mw.directory import Directory, DjangoRouter
from tests.doors.harness import PEER

pytestmark = pytest.mark.usefixtures("clean")

ONCE = "1 requests/hour per user"
Ask = Callable[..., int]


@pytest.fixture
def written(config: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A configuration that names no route unless it is told to."""

    def write(*routes: Mapping[str, Any], **rest: Any) -> dict[str, Any]:
        return config(**{"routes": list(routes), **rest})

    return write


@dataclass(frozen=True)
class Served:
    """An app behind its door."""

    send: Callable[..., Any]

    def __call__(self, path: str, method: str = "POST", **headers: str) -> int:
        return int(self.send(method, path, headers={"x-user-id": "ada", **headers}).status_code)


def asgi(app: Any, config: Any, **options: Any) -> Served:
    app.add_middleware(GuardMiddleware, config=config, **options)
    client = TestClient(app, follow_redirects=False, raise_server_exceptions=False, client=PEER)
    return Served(client.request)


def wsgi(app: Any, config: Any, **options: Any) -> Served:
    if isinstance(app, flask.Flask):
        app.wsgi_app = WSGIGuardMiddleware(app.wsgi_app, config=config, **options)  # type: ignore[method-assign]  # Flask's documented way
    else:
        app = WSGIGuardMiddleware(app, config=config, **options)
    client = Client(app)
    peer = {"REMOTE_ADDR": PEER[0]}
    return Served(lambda method, url, headers: client.open(url, method=method, headers=headers, environ_base=peer))


def view() -> Callable[..., str]:
    """A view of the test's own: a mark stays on what it was put on."""
    return lambda *_, **__: "hello"


async def ahello(request: Request) -> PlainTextResponse:
    return PlainTextResponse("hello")


# ---------------------------------------------------------------- an app of each kind: /marked is, /bare is not


def starlette_function() -> Any:
    @guarded(ONCE)
    async def marked(request: Request) -> PlainTextResponse:
        return PlainTextResponse("hello")

    return Starlette(routes=[Route("/marked", marked, methods=["POST"]), Route("/bare", ahello, methods=["POST"])])


def starlette_class() -> Any:
    @guarded(ONCE)
    class Marked(HTTPEndpoint):
        async def post(self, request: Request) -> PlainTextResponse:
            return PlainTextResponse("hello")

    return Starlette(routes=[Route("/marked", Marked), Route("/bare", ahello, methods=["POST"])])


def starlette_handler() -> Any:
    class Marked(HTTPEndpoint):
        @guarded(ONCE)
        async def post(self, request: Request) -> PlainTextResponse:
            return PlainTextResponse("hello")

    return Starlette(routes=[Route("/marked", Marked), Route("/bare", ahello, methods=["POST"])])


def fastapi_sync() -> Any:
    app = FastAPI()
    app.post("/marked")(guarded(ONCE)(lambda: "hello"))
    app.post("/bare")(lambda: "hello")
    return app


def fastapi_async() -> Any:
    app = FastAPI()

    @app.post("/marked")
    @guarded(ONCE)
    async def marked(q: int = 0) -> int:
        return q

    @app.post("/bare")
    async def bare() -> str:
        return "hello"

    return app


def flask_function() -> Any:
    app = flask.Flask(__name__)

    @app.post("/marked")
    @guarded(ONCE)
    def marked() -> str:
        return "hello"

    app.add_url_rule("/bare", "bare", view(), methods=["POST"])
    return app


def flask_class() -> Any:
    app = flask.Flask(__name__)

    @guarded(ONCE)
    class Marked(flask.views.MethodView):
        def post(self) -> str:
            return "hello"

    app.add_url_rule("/marked", view_func=Marked.as_view("marked"))
    app.add_url_rule("/bare", "bare", view(), methods=["POST"])
    return app


def flask_decorators() -> Any:
    app = flask.Flask(__name__)

    class Marked(flask.views.MethodView):
        decorators = (guarded(ONCE),)

        def post(self) -> str:
            return "hello"

    app.add_url_rule("/marked", view_func=Marked.as_view("marked"))
    app.add_url_rule("/bare", "bare", view(), methods=["POST"])
    return app


def django_app(view: Any, *more: Any) -> Any:
    class Urls:
        urlpatterns = (path("marked", view), path("bare", lambda request: HttpResponse("hello")), *more)

    settings.ROOT_URLCONF = Urls  # put back by `django_as_it_was`
    return WSGIHandler()


@pytest.fixture(autouse=True)
def django_as_it_was() -> Iterator[None]:
    if not settings.configured:
        settings.configure(SECRET_KEY="for tests")
    with override_settings(ALLOWED_HOSTS=["*"], MIDDLEWARE=[], SECRET_KEY="for tests", ROOT_URLCONF=None):
        yield


def django_function() -> Any:
    return django_app(guarded(ONCE)(lambda request: HttpResponse("hello")))


def django_async() -> Any:
    @guarded(ONCE)
    async def marked(request: Any) -> HttpResponse:
        return HttpResponse("hello")

    return django_app(marked)


def django_class() -> Any:
    @guarded(ONCE)
    class Marked(View):
        def post(self, request: Any) -> HttpResponse:
            return HttpResponse("hello")

    return django_app(Marked.as_view())


def django_method_decorator() -> Any:
    @method_decorator(guarded(ONCE), name="dispatch")
    class Marked(View):
        def post(self, request: Any) -> HttpResponse:
            return HttpResponse("hello")

    return django_app(Marked.as_view())


KINDS = [
    (asgi, starlette_function), (asgi, starlette_class), (asgi, starlette_handler), (asgi, fastapi_sync),
    (asgi, fastapi_async), (wsgi, flask_function), (wsgi, flask_class), (wsgi, flask_decorators),
    (wsgi, django_function), (wsgi, django_async), (wsgi, django_class), (wsgi, django_method_decorator),
]  # fmt: skip


every_kind = pytest.mark.parametrize(("door", "made"), KINDS, ids=lambda each: each.__name__)


@every_kind
def test_a_marked_view_is_guarded_and_its_neighbours_are_not(door: Any, made: Any, written: Any) -> None:
    ask = door(made(), written())

    assert [ask("/marked"), ask("/marked")] == [200, 429]
    assert [ask("/bare"), ask("/bare")] == [200, 200]


@every_kind
def test_a_limit_keeps_its_usage_when_it_moves_into_the_file_and_back(door: Any, made: Any, written: Any) -> None:
    assert door(made(), written())("/marked") == 200
    process.uninstall()

    in_file = written({"path": "/marked", "limits": ["2 requests/hour per user"]})
    assert [door(made(), in_file)("/marked") for _ in range(2)] == [200, 429]
    process.uninstall()

    assert door(made(), written())("/marked") == 429


# ---------------------------------------------------------------- the file has the last word


def fastapi_app(**endpoints: Any) -> FastAPI:
    """An app with an endpoint at `/name` for each name."""
    app = FastAPI()
    for name, endpoint in endpoints.items():
        app.post(f"/{name}")(endpoint)
    return app


def events(**where: Any) -> list[dict[str, Any]]:
    installed = process.install()
    installed.keeper.ledger.drain_all(installed.desk.store)
    return [row for row in installed.keeper.ledger.events() if where.items() <= row.items()]


def balances() -> dict[str, int]:
    return {state.balance: state.spent for state in process.install().desk.store.balances("", 100)}


def said(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
    found = [json.loads(record.getMessage()) for record in caplog.records if record.name == "llm_guard"]
    return [each for each in found if each["event"] == event]


def spending() -> Callable[[], str]:
    def spend() -> str:
        call = current_call()
        assert call is not None
        assert call.route is not None
        call.record({"model": call.route.model, "input_tokens": 10, "output_tokens": 5})
        return str(call.feature)

    return spend


def test_what_the_view_says_is_in_the_books_and_in_the_log(written: Any, caplog: Any) -> None:
    summarize = guarded("$1/day per user", feature="summarizer", model="gpt-4o")(spending())
    ask = asgi(fastapi_app(summarize=summarize), written())

    assert ask("/summarize") == 200

    [event] = events(kind="settle")
    assert (event["feature"], event["model"], event["route"]) == ("summarizer", "gpt-4o", "/summarize")
    [line] = said(caplog, "call")
    assert (line["view"], line["route"]) == ("tests.doors.test_views:spending.<locals>.spend", "/summarize")
    assert "usd-day-user" in line["left"]


def test_the_limits_of_both_count(written: Any) -> None:
    view = guarded("3 requests/hour per user")(lambda: "hello")
    ask = asgi(fastapi_app(chat=view), written({"path": "/chat", "name": "chat", "limits": ["$1/day per user"]}))

    assert [ask("/chat") for _ in range(4)] == [200, 200, 200, 429]
    assert {name.split("|")[1] for name in balances()} == {
        "bucket:requests:3600000:0::route%20chat",
        "calendar:usd:day:0:UTC:route%20chat",
    }


@pytest.mark.parametrize(("in_file", "answers"), [("1 requests/hour per user", 1), ("3 requests/hour per user", 3)])
def test_of_limits_on_one_balance_the_file_wins(in_file: str, answers: int, written: Any, caplog: Any) -> None:
    view = guarded("2 requests/hour per user")(lambda: "hello")
    ask = asgi(fastapi_app(chat=view), written({"path": "/chat", "limits": [in_file]}))

    assert [ask("/chat") for _ in range(4)].count(200) == answers
    [line] = said(caplog, "view_overruled")
    assert line["says"] == f'"2 requests/hour per user" gives way to "{in_file}" of the file\'s route /chat'


def test_a_limit_of_the_file_for_some_leaves_the_others_to_the_view(written: Any) -> None:
    view = guarded("1 requests/hour per user")(lambda: "hello")
    for_pro = {"limit": "3 requests/hour per user", "when": {"tier": "pro"}}
    ask = asgi(fastapi_app(chat=view), written({"path": "/chat", "limits": [for_pro]}))

    assert [ask("/chat", **{"x-plan": "pro", "x-user-id": "pia"}) for _ in range(4)] == [200, 200, 200, 429]
    assert [ask("/chat", **{"x-plan": "free", "x-user-id": "fred"}) for _ in range(2)] == [200, 429]


def test_feature_and_model_of_the_file_win(written: Any, caplog: Any) -> None:
    view = guarded(feature="summarizer", model="gpt-4o")(spending())
    ask = asgi(fastapi_app(chat=view), written({"path": "/chat", "feature": "chat", "model": "gpt-4o-mini"}))

    assert ask("/chat") == 200

    [event] = events(kind="settle")
    assert (event["feature"], event["model"]) == ("chat", "gpt-4o-mini")
    assert len(said(caplog, "view_overruled")) == 2


def test_a_wider_route_of_the_file_counts_as_well(written: Any) -> None:
    app = fastapi_app(a=guarded("2 requests/hour per user")(lambda: "a"), b=lambda: "b")
    ask = asgi(app, written({"path": "/{rest:path}", "name": "all", "limits": ["3 requests/hour per user"]}))

    assert [ask("/a"), ask("/a"), ask("/a")] == [200, 200, 429]
    assert [ask("/b"), ask("/b")] == [200, 429]


def test_a_marked_view_without_limits_counts_against_those_over_all_calls(written: Any) -> None:
    app = fastapi_app(a=guarded()(lambda: "a"), b=guarded(feature="b")(lambda: "b"), c=lambda: "c")
    ask = asgi(app, written(limits=["2 requests/hour per user"]))

    assert [ask("/a"), ask("/b"), ask("/a"), ask("/c")] == [200, 200, 429, 200]


def test_a_timezone_of_the_file_holds_for_the_view(written: Any) -> None:
    ask = asgi(fastapi_app(chat=guarded("$1/day per user")(lambda: "hello")), written(timezone="Asia/Tokyo"))

    ask("/chat")

    assert [name.split("|")[1] for name in balances()] == ["calendar:usd:day:0:Asia%2FTokyo:route%20%2Fchat"]


def test_parts_that_contradict_the_file_are_told_when_the_app_starts(written: Any) -> None:
    view = guarded({"limit": "$1/day per user", "hard": 0.95})(lambda: "hello")
    app = fastapi_app(chat=view)
    app.add_middleware(GuardMiddleware, config=written(budgets={"critical": 0.99, "hard": 1}))

    with pytest.raises(ConfigError, match=r"hard = 0\.95 is below critical = 0\.99"), TestClient(app):
        pass


# ---------------------------------------------------------------- which requests


def test_the_apps_own_order_of_routes_decides(written: Any) -> None:
    app = FastAPI()
    app.post("/chat/history")(lambda: "bare")
    app.post("/chat/{id}")(guarded(ONCE)(lambda: "marked"))
    app.post("/chat/later")(lambda: "never reached")
    ask = asgi(app, written())

    assert [ask("/chat/history"), ask("/chat/history")] == [200, 200]
    assert [ask("/chat/1"), ask("/chat/2"), ask("/chat/later")] == [200, 429, 429]


def test_werkzeugs_order_of_rules_decides(written: Any) -> None:
    app = flask.Flask(__name__)
    app.add_url_rule("/chat/<name>", "marked", guarded(ONCE)(lambda name: name), methods=["POST"])
    app.add_url_rule("/chat/history", "bare", view(), methods=["POST"])
    app.add_url_rule("/chat/<int:number>", "number", view(), methods=["POST"])
    ask = wsgi(app, written())

    assert [ask("/chat/history"), ask("/chat/7"), ask("/chat/a"), ask("/chat/b")] == [200, 200, 200, 429]


@pytest.mark.parametrize("url", ["/n/\u0661", "/any/a", "/free", "/free/", "/words/long/way"])
def test_whatever_werkzeug_takes_for_a_marked_rule_is_guarded(url: str, written: Any) -> None:
    app = flask.Flask(__name__)
    marked = guarded(ONCE)(view())
    for number, rule in enumerate(["/n/<int:n>", "/any/<any(a, b):x>", "/words/<path:x>"]):
        app.add_url_rule(rule, str(number), marked, methods=["POST"])
    app.add_url_rule("/free", "free", marked, methods=["POST"], strict_slashes=False)
    ask = wsgi(app, written())

    assert [ask(url), ask(url)] == [200, 429]


def test_routers_mounts_and_blueprints_are_looked_into(written: Any) -> None:
    inner, outer, app, mounted = APIRouter(prefix="/in"), APIRouter(), FastAPI(), FastAPI()
    inner.post("/{name}")(guarded(ONCE)(lambda name: name))
    mounted.post("/{name}")(guarded(ONCE)(lambda name: name))
    outer.include_router(inner, prefix="/out")
    app.include_router(outer, prefix="/v1")
    app.mount("/sub/{tenant}", mounted)
    ask = asgi(app, written())

    assert [ask("/v1/out/in/a"), ask("/v1/out/in/b")] == [200, 429]
    assert [ask("/sub/acme/a"), ask("/sub/evil/b")] == [200, 429]
    assert {name.rpartition(":")[2] for name in balances()} == {
        "route%20%2Fv1%2Fout%2Fin%2F%7Bname%7D",
        "route%20%2Fsub%2F%7Btenant%7D%2F%7Bname%7D",
    }
    process.uninstall()

    flasks = flask.Flask(__name__)
    blue = flask.Blueprint("blue", __name__, url_prefix="/blue")
    blue.add_url_rule("/<uuid:id>", "marked", guarded(ONCE)(view()), methods=["POST"])
    flasks.register_blueprint(blue)
    ask = wsgi(flasks, written())

    assert [ask("/blue/9b1deb4d-3b7d-4bad-9bdd-2b0d7b3dcb6d") for _ in range(2)] == [200, 429]


def test_hosts_and_convertors_of_the_apps_own_are_asked(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hex(Convertor[str]):
        regex = "[0-9a-f]+"

        def convert(self, value: str) -> str:
            return value

        def to_string(self, value: str) -> str:
            return value

    monkeypatch.setitem(CONVERTOR_TYPES, "hex", Hex())

    async def marked(request: Request) -> PlainTextResponse:
        return PlainTextResponse("hello")

    guarded(ONCE)(marked)
    here = Host("here.test", Starlette(routes=[Route("/c", marked, methods=["POST"])]))
    ask = asgi(
        Starlette(
            routes=[
                here,
                Route("/{id:hex}", marked, methods=["POST"]),
                Route("/{id}", ahello, methods=["POST"]),
            ]
        ),
        written(),
    )

    assert [ask("/xyz"), ask("/ff"), ask("/ee")] == [200, 200, 429]
    assert [ask("/c", host="elsewhere.test"), ask("/c", host="here.test")] == [429, 429]


def test_routes_of_the_apps_own_making_are_asked_for_every_path(written: Any) -> None:
    class Lowered(Route):
        def matches(self, scope: Any) -> Any:
            return super().matches({**scope, "path": scope["path"].lower()})

    async def marked(request: Request) -> PlainTextResponse:
        return PlainTextResponse("hello")

    ask = asgi(Starlette(routes=[Lowered("/chat", guarded(ONCE)(marked), methods=["POST"])]), written())

    assert [ask("/CHAT"), ask("/Chat"), ask("/else")] == [200, 429, 404]


def test_django_prefixes_expressions_and_includes_are_asked(written: Any) -> None:
    marked = guarded(ONCE)(lambda request, **_: HttpResponse("hello"))
    more = [
        path("in/<slug:a>/", include([path("<int:b>", marked), re_path(r"^c?(?P<d>x|y)$", marked)])),
        re_path(r"^(?:one|two)/three\.html$", marked),
    ]
    ask = wsgi(django_app(lambda request: HttpResponse("hello"), *more), written())

    assert [ask("/marked"), ask("/marked")] == [200, 200]
    assert [ask(each) for each in ("/in/a/7", "/in/a/x", "/in/b/cy", "/two/three.html")] == [200, 429, 429, 429]


def test_djangos_own_middleware_can_ask_by_its_router(written: Any) -> None:
    django_app(guarded(ONCE, feature="search")(lambda request: HttpResponse("hello")))
    directory = Directory(load_config(written()).policy, DjangoRouter())

    rule = directory.route("POST", "/marked", {})

    assert rule is not None
    assert (rule.feature, [limit.text for limit in rule.view_limits]) == ("search", [ONCE])
    assert directory.route("POST", "/bare", {}) is None


def test_methods_narrow_a_mark(written: Any) -> None:
    app = flask.Flask(__name__)
    app.add_url_rule("/form", "form", guarded(ONCE, methods="post")(view()), methods=["GET", "POST"])
    ask = wsgi(app, written())

    assert [ask("/form", method) for method in ("POST", "GET", "GET", "OPTIONS", "POST")] == [200, 200, 200, 200, 429]


def test_all_methods_of_a_view_count_in_one_place(written: Any) -> None:
    app = flask.Flask(__name__)
    app.add_url_rule("/form", "form", guarded("2 requests/hour per user")(view()), methods=["GET", "POST"])
    ask = wsgi(app, written({"path": "/form", "name": "form", "limits": ["$1/day per user"]}))

    assert [ask("/form", method) for method in ("GET", "POST", "HEAD", "POST", "OPTIONS")] == [200, 200, 429, 429, 200]


def test_two_views_at_one_path_count_apart(written: Any) -> None:
    app = FastAPI()
    app.get("/x")(guarded(ONCE)(lambda: "got"))
    app.post("/x")(guarded(ONCE)(lambda: "posted"))
    ask = asgi(app, written())

    assert [ask("/x", "GET"), ask("/x", "POST"), ask("/x", "GET"), ask("/x", "POST")] == [200, 200, 429, 429]
    assert {name.rpartition(":")[2] for name in balances()} == {"route%20%2Fx", "route%20%2Fx%20GET"}


def test_one_view_at_two_paths_counts_in_one_place(written: Any) -> None:
    app = FastAPI()
    view = guarded(ONCE)(lambda: "hello")
    app.post("/first")(view)
    app.post("/second")(view)
    ask = asgi(app, written())

    assert [ask("/second"), ask("/first")] == [200, 429]
    assert [name.rpartition(":")[2] for name in balances()] == ["route%20%2Ffirst"]


def test_views_of_one_name_count_in_one_place(written: Any) -> None:
    a, b = guarded(ONCE, name="ai")(lambda: "a"), guarded(ONCE, name="ai")(lambda: "b")
    ask = asgi(fastapi_app(a=a, b=b), written())

    assert [ask("/a"), ask("/b")] == [200, 429]


def test_a_class_and_its_handlers_may_both_be_marked(written: Any) -> None:
    @guarded("3 requests/hour per user")
    class Chat(flask.views.MethodView):
        def get(self) -> str:
            return "got"

        @guarded("1 requests/day per user")
        def post(self) -> str:
            return "posted"

    app = flask.Flask(__name__)
    app.add_url_rule("/chat", view_func=Chat.as_view("chat"))
    ask = wsgi(app, written())

    assert [ask("/chat", "POST"), ask("/chat", "POST"), ask("/chat", "GET")] == [200, 429, 200]


def test_marks_add_up(written: Any) -> None:
    view = guarded("2 requests/hour per user", feature="a")(guarded("$0.01/day per user", model="gpt-4o")(spending()))
    ask = asgi(fastapi_app(chat=view), written())

    assert [ask("/chat"), ask("/chat"), ask("/chat")] == [200, 200, 429]
    assert len(balances()) == 2


def test_a_mark_is_found_behind_decorators_and_partials(written: Any) -> None:
    def tidy(view: Any) -> Any:
        @functools.wraps(view)
        def wrapper(*args: Any) -> Any:
            return view(*args)

        return wrapper

    app = flask.Flask(__name__)
    app.add_url_rule("/a", "a", tidy(guarded(ONCE)(lambda: "a")), methods=["POST"])
    app.add_url_rule("/b", "b", functools.partial(guarded(ONCE)(view()), 1), methods=["POST"])
    ask = wsgi(app, written())

    assert [ask("/a"), ask("/a"), ask("/b"), ask("/b")] == [200, 429, 200, 429]


def test_a_mark_that_nothing_leads_to_is_told(written: Any, caplog: Any) -> None:
    def hiding(view: Any) -> Any:
        return lambda *args: view(*args)

    lost = guarded(ONCE)(lambda: "hello")
    app = flask.Flask(__name__)
    app.add_url_rule("/lost", "lost", hiding(lost), methods=["POST"])
    ask = wsgi(app, written())

    assert [ask("/lost"), ask("/lost")] == [200, 200]
    [line] = [line for line in said(caplog, "view_not_found") if "test_a_mark_that_nothing" in line["view"]]
    assert "test_views.py" in line["where"]


def test_an_app_hidden_by_middleware_can_be_named(written: Any) -> None:
    app = flask.Flask(__name__)
    app.add_url_rule("/chat", "chat", guarded(ONCE)(view()), methods=["POST"])
    hidden = app.wsgi_app
    ask = wsgi(lambda environ, start: hidden(environ, start), written(), views=app)

    assert [ask("/chat"), ask("/chat")] == [200, 429]


def test_a_route_that_comes_later_is_found(written: Any) -> None:
    app = fastapi_app(first=guarded(ONCE)(lambda: "hello"))
    ask = asgi(app, written())
    assert ask("/first") == 200

    app.post("/second")(guarded(ONCE)(lambda: "hello"))

    assert [ask("/second"), ask("/second"), ask("/first")] == [200, 429, 429]


def test_the_router_is_asked_only_below_marked_paths(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    matches = Route.matches

    def watched(self: Route, scope: Any) -> Any:
        asked.append(scope["path"])
        return matches(self, scope)

    marked = guarded("9 requests/hour per user")(functools.partial(ahello))
    routes = [Route("/bare", ahello, methods=["POST"]), Route("/chat", marked, methods=["POST"])]
    ask = asgi(Starlette(routes=routes), written())
    ask("/chat")
    monkeypatch.setattr(Route, "matches", watched)

    assert [ask("/bare"), ask("/chat")] == [200, 200]

    # Starlette itself asks both for the one, and the first and the second for the other.
    assert asked == ["/bare", "/chat", "/chat"]


# ---------------------------------------------------------------- mistakes


def test_mistakes_are_told_all_at_once_where_they_are_written() -> None:
    with pytest.raises(ConfigError) as caught:
        guarded("5 request/fortnight per user", "$1/day per usr", 7, feature="", model="body:x", methods=["POTS"])

    problems = [f"{mistake.problem} | {mistake.fix}" for mistake in caught.value.mistakes]
    assert all("test_views.py:" in mistake.where for mistake in caught.value.mistakes)
    assert len(problems) == 6
    assert 'did you mean "user"?' in problems[1]
    assert 'did you mean "POST"?' in problems[-1]


def test_forgotten_parentheses_are_told() -> None:
    with pytest.raises(ConfigError, match="has no parentheses"):
        guarded(view())  # type: ignore[arg-type]  # the mistake itself


def test_two_marks_that_contradict_each_other_are_told() -> None:
    with pytest.raises(ConfigError, match=r'feature = "b", and .* says "a"'):
        guarded(feature="b")(guarded(feature="a")(lambda: "hello"))


def test_what_cannot_be_marked_is_told() -> None:
    with pytest.raises(ConfigError, match="put @guarded on a function or a class"):
        guarded(ONCE)("".join)


def test_a_marked_view_is_the_view_itself() -> None:
    async def view() -> None: ...

    assert guarded(ONCE)(view) is view


def test_a_view_that_the_apps_start_adds_to_a_mounted_app_is_guarded(written: Any) -> None:
    @guarded(ONCE)
    async def late(request: Request) -> PlainTextResponse:
        return PlainTextResponse("late")

    mounted = Starlette()

    @asynccontextmanager
    async def start(app: Starlette) -> AsyncIterator[None]:
        mounted.router.routes.append(Route("/late", late, methods=["POST"]))
        yield

    app = Starlette(routes=[Mount("/sub", app=mounted)], lifespan=start)
    app.add_middleware(GuardMiddleware, config=written())

    with TestClient(app, client=PEER) as client:
        statuses = [client.post("/sub/late", headers={"x-user-id": "ada"}).status_code for _ in range(2)]

    assert statuses == [200, 429]
