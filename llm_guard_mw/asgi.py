"""The ASGI door: `app.add_middleware(GuardMiddleware, config="llm_guard.toml")`.

Pure ASGI, so that streams, background tasks and disconnects pass as they are. Each request to a guarded route
goes through one `_Passage`; everything else (websockets, lifespan, OPTIONS, routes without a rule) is handed on
untouched.

Rule 1. `http.response.start` is held until the first body bytes or the end, so that a refusal inside a lazy
        stream can still be a 429.
Rule 2. A call closes when the app callable returns, after its background tasks. Cancelling the request does
        not cancel the closing.
Rule 3. An error of ours before the grant follows `on_store_failure`; after it, it is logged and nothing else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from llm_guard_mw.call import Call, enter, leave
from llm_guard_mw.desk import DoorEnding
from llm_guard_mw.directory import Directory
from llm_guard_mw.guard import AsyncGuard, to_its_end
from llm_guard_mw.http import Answer, Headers, HttpRequest, strip
from llm_guard_mw.logs import log
from llm_guard_mw.metering import Meter
from llm_guard_mw.model import Reading, Refusal
from llm_guard_mw.passage import FAILED, answer_instead, answer_to_refusal, answer_unopened, meter_for, our_headers
from llm_guard_mw.policy import Route
from llm_guard_mw.process import ConfigLike, Installation, install

# The ASGI vocabulary: https://asgi.readthedocs.io/en/latest/specs/main.html
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class GuardMiddleware:
    """Guards the routes that the configuration names, and the views that are marked with `@guarded`.

    app.add_middleware(GuardMiddleware, config="llm_guard.toml")

    `config` is a path, or what `load_config` gives. Outermost is best, but inside of CORS: a browser shows its
    script a refusal only with CORS headers on it. `views` is the app whose views are marked, where other middleware
    hides it.
    """

    def __init__(self, app: ASGIApp, config: ConfigLike | None = None, *, views: object = None) -> None:
        self.app = app
        self.installation = install(config)
        self.directory = Directory(self.installation.config.policy, app if views is None else views)
        self.guard = AsyncGuard(self.installation.desk)
        _warn_about_neighbours(app, self.installation)
        _warn_about_missing_routes(app, self.installation)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._pass_by(scope, receive, send)
            return
        if scope["type"] == "lifespan":
            await self._through_a_lifespan(scope, receive, send)
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        route = self.directory.route(scope["method"], _path_below_root(scope), scope)
        if route is None:
            await self._pass_by(scope, receive, send)
            return
        self.installation.keeper.start()
        await _Passage(self.app, self.guard, self.installation, route)(scope, receive, send)

    async def _through_a_lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Look at the views before the app starts, since a mistake there should end it, and at what its start added."""
        self.directory.look()

        async def look_again(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self.directory.look(again=True)
            await send(message)

        await self.app(scope, receive, look_again)

    async def _pass_by(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Not guarded; but what a stranger says about identity is believed nowhere behind us."""
        request = _http_request(scope, b"", complete=True)
        unbelieved = self.installation.desk.identifier.headers_to_strip(request)
        await self.app(_without(scope, unbelieved), receive, send)


class _Passage:
    """One request on its way through."""

    def __init__(self, app: ASGIApp, guard: AsyncGuard, installation: Installation, route: Route) -> None:
        self.app = app
        self.guard = guard
        self.installation = installation
        self.route = route
        self.call: Call | None = None
        self.meter: Meter | None = None
        self.held_start: Message | None = None
        self.started = False  # http.response.start has gone out
        self.ended = False  # ... and so has the last of the body
        self.status: int | None = None
        self.replaced = False  # the app's answer was replaced by our refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(receive, self.installation.config.policy.inspect_bytes)
        await body.peek()
        request = _http_request(scope, b"".join(body.chunks), complete=body.complete)
        answer = await self._open(request)
        if answer is not None:
            await _send_answer(send, answer)
            return
        headers = scope["headers"]
        scope = _without(scope, self.installation.desk.identifier.headers_to_strip(request))
        call = self.call
        if call is None:
            await self.app(scope, body.receive, send)
            return
        if scope["headers"] is not headers:  # late identity must not believe what was taken out of them
            call.request = _http_request(scope, request.body, complete=request.body_complete)
        token = enter(call)
        self.downstream = send
        try:
            await self._run(scope, body.receive, call)
        finally:
            leave(token)
            await to_its_end(self.guard.close(call, self._ending()))

    async def _open(self, request: HttpRequest) -> Answer | None:
        """Open the call; an Answer when the request goes no further. Neither call nor Answer: it passes unguarded."""
        call_id = ""
        try:
            call = await self.guard.call_for(request, self.route)
            call_id = call.id
            outcome = await self.guard.enter(call)
        except Exception as error:
            return answer_unopened(error, self.installation.desk, self.route, call_id)
        if isinstance(outcome, Refusal):
            return answer_to_refusal(call, outcome)
        self.call = outcome
        return None

    async def _run(self, scope: Scope, receive: Receive, call: Call) -> None:
        try:
            await self.app(scope, receive, self._send)
        except Exception as error:
            # Whatever the app made of a refused SDK call, its caller should hear of the refusal.
            answer = answer_instead(call, self.route, error)
            if self.started or answer is None:
                raise
            await self._replace(answer)
        else:
            if self.held_start is not None and not self.replaced:
                await self._send_start()

    async def _send(self, message: Message) -> None:
        if self.replaced:
            return
        kind = message["type"]
        if kind == "http.response.start":
            self.held_start = message
            self.status = message["status"]
            if self.status == FAILED and self.call is not None:
                answer = answer_instead(self.call, self.route)
                if answer is not None:
                    await self._replace(answer)
            return
        if kind == "http.response.body":
            if self.held_start is not None:
                if not message.get("body") and message.get("more_body"):
                    return  # nothing to show yet: the answer may still become a refusal
                await self._send_start()
            if self.meter is not None:
                self.meter.feed(message.get("body", b""))
            if not message.get("more_body"):
                self.ended = True
        elif kind == "http.response.pathsend":
            self.ended = True
        elif kind == "http.response.zerocopysend":
            self.ended = not message.get("more_body")
        if self.held_start is not None and kind != "http.response.debug":
            await self._send_start()
        await self.downstream(message)

    async def _send_start(self) -> None:
        start, self.held_start = self.held_start, None
        assert start is not None  # noqa: S101 - only called while it is held
        assert self.call is not None  # noqa: S101 - no answer runs without a call
        self.meter = meter_for(
            self.call, self.route, start["status"], start.get("headers", ()), self.installation.desk.billed
        )
        self.started = True
        await self.downstream({**start, "headers": [*start.get("headers", ()), *our_headers(self.call)]})

    async def _replace(self, answer: Answer) -> None:
        """Send our answer instead of the app's."""
        self.replaced, self.held_start = True, None
        self.started = self.ended = True
        if self.call is not None:
            self.call.decision = "reject"
        self.status = answer.status
        await _send_answer(self.downstream, answer)

    def _ending(self) -> DoorEnding:
        reading: Reading | None = self.meter.finish() if self.meter is not None else None
        return DoorEnding(status=self.status if self.started else None, whole=self.ended, reading=reading)


# ---------------------------------------------------------------- the request


class _Body:
    """The request's body: read ahead as far as it is inspected, then given to the app as it came."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive = receive
        self._most = most
        self._messages: list[Message] = []
        self.chunks: list[bytes] = []
        self.complete = False

    async def peek(self) -> None:
        size = 0
        while not self.complete and size < self._most:
            message = await self._receive()
            self._messages.append(message)
            if message["type"] != "http.request":
                return
            chunk = message.get("body", b"")
            self.chunks.append(chunk)
            size += len(chunk)
            self.complete = not message.get("more_body", False)

    async def receive(self) -> Message:
        return self._messages.pop(0) if self._messages else await self._receive()


def _path_below_root(scope: Scope) -> str:
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and (path == root or path.startswith(root + "/")):
        return path[len(root) :] or "/"
    return path


def _http_request(scope: Scope, body: bytes, *, complete: bool) -> HttpRequest:
    client = scope.get("client")
    return HttpRequest(
        method=scope.get("method", "GET"),  # a websocket has none
        path=_path_below_root(scope),
        query=scope.get("query_string", b""),
        headers=_headers(scope["headers"]),
        peer=(client[0], client[1]) if client else None,
        body=body,
        body_complete=complete,
        surroundings=scope,
    )


def _headers(raw: Iterable[Any]) -> Headers:
    """Most servers give tuples; the specification lets them give lists of two, and any kind of bytes."""
    headers = tuple(raw)
    if all(type(header) is tuple and type(header[1]) is bytes for header in headers):
        return headers
    return tuple([(bytes(name), bytes(value)) for name, value in headers])


def _without(scope: Scope, names: frozenset[bytes]) -> Scope:
    """The scope without headers that the app must not believe. The app may write into it as into its own."""
    if names and any(name in names for name, _ in scope["headers"]):
        scope["headers"] = list(strip(scope["headers"], names))
    return scope


# ---------------------------------------------------------------- the answer


async def _send_answer(send: Send, answer: Answer) -> None:
    await send({"type": "http.response.start", "status": answer.status, "headers": list(answer.headers)})
    await send({"type": "http.response.body", "body": answer.body})


# ---------------------------------------------------------------- neighbours


def _warn_about_neighbours(app: Any, installation: Installation) -> None:
    """Say at start what stands on the wrong side. `app` is whatever comes behind us: only its class is looked at."""
    sources = (*installation.config.identity.user, *installation.config.identity.tenant)
    asks_app = any(source.startswith(("scope:", "session:", "state:")) for source in sources)
    inner = app
    for _ in range(64):
        name = type(inner).__name__
        advice = None
        if name == "CORSMiddleware":
            advice = "without its headers a browser hides our refusals from its scripts"
        elif asks_app and name in ("AuthenticationMiddleware", "SessionMiddleware"):
            advice = "it writes what identity is read from, and runs too late where it is"
        if advice is not None:
            log.warning("middleware_order", found=name, fix=f"add {name} after GuardMiddleware: {advice}")
        inner = getattr(inner, "app", None)
        if inner is None:
            return


def _warn_about_missing_routes(app: Any, installation: Installation) -> None:
    """Say at start which guarded routes the app does not have: a typo there would guard nothing, silently."""
    for _ in range(64):
        if app is None or getattr(app, "routes", None):
            break
        app = getattr(app, "app", None)
    routes = getattr(app, "routes", None)
    if not routes:  # no Starlette app, or one whose routes come later
        return
    for route in installation.config.policy.routes:
        scope = {
            "type": "http",
            "path": route.samples()[0],
            "method": min(route.methods),
            "root_path": "",
            "headers": [],
        }
        try:
            found = any(candidate.matches(dict(scope))[0].value for candidate in routes)
        except Exception:  # a router of its own kind: nothing can be told
            return
        if not found:
            log.warning("route_not_found", route=route.name, path=route.path, fix="name a path that the app has")
