"""A door to drive scenarios through: an app whose handlers are lists of steps, behind a guard, in front of a provider.

A scenario names what a handler does (`Ask()`, `Charge(3)`, `Say(status=500)`) and never how: each door performs the
steps in its own manner, so that one suite of scenarios holds for all of them. The SDK, the store and the books are
the real ones; the provider is the stand-in.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import functools
import gc
import io
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from wsgiref.validate import validator

import flask
import openai
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from llm_guard_mw import GuardMiddleware, WSGIGuardMiddleware, capture, current_call, process
from llm_guard_mw.cli.demo.standin import StandIn
from llm_guard_mw.ledger import verify

DEADLINE_SECONDS = 20.0
PEER = ("127.0.0.1", 5555)
STRANGER = ("203.0.113.9", 6666)

#: In every prompt and as every key, so that a leak of either is found wherever it goes.
CANARY = "kanarienvogel"
API_KEY = "sk-zaunkoenig-0123456789"
PROMPT = f"The {CANARY} asks in 20 words: why is the sky blue?"


# ---------------------------------------------------------------- what a handler may do


@dataclass(frozen=True)
class Ask:
    """One chat through the captured SDK client; what it says goes into the answer."""

    prompt: str = PROMPT
    model: str = "gpt-4o-mini"
    cap: int | None = 50
    stream: bool = False
    catch: bool = False  # an SDK error becomes part of the answer instead of being raised
    record: bool = False  # report the response once more through record()
    retries: int = 0
    standin: str = ""

    def arguments(self) -> dict[str, Any]:
        cap = {} if self.cap is None else {"max_tokens": self.cap}
        headers = {"x-standin": self.standin} if self.standin else {}
        messages = [{"role": "user", "content": self.prompt}]
        return {"model": self.model, "messages": messages, "extra_headers": headers, **cap}


@dataclass(frozen=True)
class Embed:
    text: str = PROMPT
    model: str = "text-embedding-3-small"


@dataclass(frozen=True)
class Background:
    """A Responses request that the provider works off on its own: nothing bounds it."""

    catch: bool = False


@dataclass(frozen=True)
class Record:
    """Report usage that no capture saw."""

    answer: Mapping[str, Any]


@dataclass(frozen=True)
class Charge:
    credits: int


@dataclass(frozen=True)
class Tag:
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Outcome:
    name: str
    value: float = 1


@dataclass(frozen=True)
class Raise:
    message: str = "the app's own mistake"


@dataclass(frozen=True)
class SignIn:
    """The app authenticates its caller itself: it believes `x-session`, and says so where `scope:user` looks."""


@dataclass(frozen=True)
class Do:
    """Something that happens while the handler runs."""

    what: Callable[[], object]


@dataclass(frozen=True)
class AtOnce:
    """Steps that run side by side."""

    steps: Sequence[Any]


@dataclass(frozen=True)
class InThread:
    """A step in a thread that carries the context: asks go through the sync SDK client."""

    step: Any
    bare: bool = False  # an own threading.Thread under copy_context(), not the framework's pool


@dataclass(frozen=True)
class AsUser:
    """Steps inside `with guard.as_user(...)`."""

    who: Mapping[str, str]
    steps: Sequence[Any]


@dataclass(frozen=True)
class Later:
    """Steps after the answer has gone out, as the framework's own background task."""

    steps: Sequence[Any]


@dataclass(frozen=True)
class Outlive:
    """A task of the app's own that goes on after its call has closed."""

    step: Any


@dataclass(frozen=True)
class Wait:
    """Until the scenario says so: `door.gate.set()`."""


@dataclass(frozen=True)
class Meet:
    """Tell the scenario that the handler has come this far: `door.met.wait()`."""


@dataclass(frozen=True)
class Say:
    """The answer, instead of what the steps have gathered."""

    status: int = 200
    body: Any = None  # a dict is sent as JSON, bytes as they are, a list chunk by chunk
    kind: str | None = None


@dataclass(frozen=True)
class Words:
    """A lazy stream: the provider is asked when the body is read, and its words are passed on one by one."""

    asks: Sequence[Ask]
    first: bytes = b""  # sent before anything is asked


# ---------------------------------------------------------------- what comes back


@dataclass
class Reply:
    """A response as a client sees it; `error` is what the app raised through to its server."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)
    whole: bool = False
    error: BaseException | None = None

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def call_id(self) -> str:
        return self.headers["x-llm-guard-request-id"]


@dataclass(frozen=True)
class Sent:
    """A request on its way to a door."""

    method: str = "POST"
    path: str = "/api/chat"
    json: Any = None
    chunks: Sequence[bytes] | None = None
    user: str | None = "ada"
    headers: Mapping[str, str] = field(default_factory=dict)
    peer: tuple[str, int] | None = PEER
    hang_up_after: int | None = None  # body chunks; the client goes away then
    scope: Mapping[str, Any] = field(default_factory=dict)  # more of the ASGI scope, or of the WSGI environ

    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        named = {"content-type": "application/json", **self.headers}
        if self.user is not None:
            named["x-user-id"] = self.user
        return [(name.lower().encode(), value.encode()) for name, value in named.items()]

    def body_chunks(self) -> Sequence[bytes]:
        if self.chunks is not None:
            return self.chunks
        return [json.dumps({"q": PROMPT} if self.json is None else self.json).encode()]


# ---------------------------------------------------------------- a door, whatever its kind


class Door:
    """What all doors have in common: the clients, the books, and what holds after every scenario."""

    name = ""

    def __init__(self, config: Mapping[str, Any], handlers: Mapping[str, Sequence[Any]], provider: StandIn, url: str):
        self.handlers = dict(handlers)
        self.provider = provider
        self.url = url
        self.gate = threading.Event()
        self.met = threading.Event()
        self.seen: list[dict[str, Any]] = []  # what handlers saw of their requests and calls
        self.background: list[BaseException | str] = []
        self.installed = process.install(config)
        self.sync_client = capture(openai.OpenAI(api_key=API_KEY, base_url=f"{url}/v1", max_retries=0))

    # -- requests

    def request(self, method: str = "POST", path: str = "/api/chat", **rest: Any) -> Reply:
        return self.together(Sent(method, path, **rest))[0]

    def together(self, *requests: Sent) -> list[Reply]:
        raise NotImplementedError

    # -- what is known afterwards

    def served(self) -> list[tuple[int, int]]:
        """What the provider says it has served, in tokens, request by request."""
        return [(row.input_tokens, row.output_tokens) for row in self.provider.rows if row.status == 200]

    def quiet(self) -> None:
        """Wait until everything in flight has been closed and written."""
        desk = self.installed.desk

        def closed() -> bool:
            gc.collect()  # a dropped stream is closed by its finalizer
            return not desk.open and not desk.calls and not desk.outbox

        until(closed, "exchanges and calls are closed")

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The rows of the ledger, in the order of calls and exchanges."""
        self.quiet()
        desk, ledger = self.installed.desk, self.installed.keeper.ledger
        desk.flush_refusals()
        ledger.drain_all(desk.store)
        rows = sorted(ledger.events(), key=lambda row: (row["call_id"], row["attempt"], row["kind"]))
        return rows if kind is None else [row for row in rows if row["kind"] == kind]

    def settled(self) -> list[dict[str, Any]]:
        return self.events("settle")

    def spent(self, field: str = "usd") -> int:
        """What all balances of one unit have spent together."""
        desk = self.installed.desk
        self.quiet()
        return sum(state.spent for state in desk.store.balances("", 1000) if f":{field}:" in state.balance)

    def held(self) -> int:
        self.quiet()
        return sum(state.held for state in self.installed.desk.store.balances("", 1000))

    def check(self) -> None:
        """What holds after every scenario: nothing is left open, nothing held, and the books add up."""
        self.quiet()
        assert self.held() == 0
        store, ledger = self.installed.desk.store, self.installed.keeper.ledger
        found = verify(store, ledger)
        assert found.ok, found.findings
        assert found.open_holds == 0
        rows = [(row["call_id"], row["attempt"], row["kind"]) for row in ledger.events()]
        assert len(rows) == len(set(rows))

    def close(self) -> None:
        self.sync_client.close()


def until(claim: Callable[[], bool], what: str, seconds: float = DEADLINE_SECONDS) -> None:
    """Wait for a claim to hold; polls, since what it waits for happens in other threads and processes."""
    deadline = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.005)


# ---------------------------------------------------------------- ASGI


class AsgiDoor(Door):
    """Starlette behind `GuardMiddleware`, on an event loop of its own."""

    name = "asgi"

    def __init__(self, config: Mapping[str, Any], handlers: Mapping[str, Sequence[Any]], provider: StandIn, url: str):
        super().__init__(config, handlers, provider, url)
        self.runner = asyncio.Runner()
        self.runner.get_loop()
        self.thread = threading.Thread(target=self._turn, name="door", daemon=True)
        self.thread.start()
        self.client = self.run(self._client())
        self.tasks: set[asyncio.Task[Any]] = set()
        app = Starlette(routes=[Route(path, self._serve, methods=_METHODS) for path in self.handlers])
        app.add_middleware(GuardMiddleware, config=config)
        self.app: Any = app

    def _turn(self) -> None:
        loop = self.runner.get_loop()
        asyncio.set_event_loop(loop)
        loop.run_forever()

    async def _client(self) -> openai.AsyncOpenAI:
        return capture(openai.AsyncOpenAI(api_key=API_KEY, base_url=f"{self.url}/v1", max_retries=0))

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.runner.get_loop()).result(DEADLINE_SECONDS)

    def close(self) -> None:
        self.run(self.client.close())
        loop = self.runner.get_loop()
        loop.call_soon_threadsafe(loop.stop)
        self.thread.join(DEADLINE_SECONDS)
        self.runner.close()
        super().close()

    def together(self, *requests: Sent) -> list[Reply]:
        async def all_of_them() -> list[Reply]:
            return list(await asyncio.gather(*[drive(self.app, sent) for sent in requests]))

        replies: list[Reply] = self.run(all_of_them())
        return replies

    # -- the app

    async def _serve(self, request: Request) -> Response:
        seen: dict[str, Any] = {"headers": dict(request.headers), "body": await request.body()}
        self.seen.append(seen)
        work = _Work(self, request)
        call = current_call()
        seen["call"] = None if call is None else call.id
        for step in self.handlers[request.scope["route"].path]:
            await work.perform(step)
        return work.answer()


_METHODS = ["GET", "POST", "PUT", "DELETE", "OPTIONS"]


class _Work:
    """Performs one handler's steps on an event loop."""

    def __init__(self, door: AsgiDoor, request: Request) -> None:
        self.door = door
        self.request = request
        self.said: list[Any] = []
        self.response: Response | None = None
        self.later: Later | None = None

    def answer(self) -> Response:
        body = json.dumps({"said": self.said}).encode()
        response = self.response or Response(body, media_type="application/json")
        if self.later is not None:
            response.background = BackgroundTask(self._after, self.later)
        return response

    async def _after(self, later: Later) -> None:
        for step in later.steps:
            await self.perform(step)

    async def perform(self, step: Any) -> None:
        match step:
            case Ask():
                self.said.append(await ask(self.door.client, step))
            case Embed():
                answer = await self.door.client.embeddings.create(model=step.model, input=step.text)
                self.said.append(len(answer.data))
            case Background():
                try:
                    await self.door.client.responses.create(model="gpt-4o-mini", input=PROMPT, background=True)
                except openai.APIStatusError as error:
                    if not step.catch:
                        raise
                    self.said.append(error.status_code)
            case SignIn():
                if "x-session" in self.request.headers:
                    self.request.scope["user"] = self.request.headers["x-session"]
            case AtOnce():
                await asyncio.gather(*[self.perform(inner) for inner in step.steps])
            case InThread() if step.bare:
                self.said.append(await asyncio.to_thread(_in_bare_thread, self.door, step.step))
            case InThread():
                self.said.append(await run_in_threadpool(perform_sync, self.door, step.step))
            case AsUser():
                async with process.AsyncGuard().as_user(**step.who):
                    for inner in step.steps:
                        await self.perform(inner)
            case Later():
                self.later = step
            case Outlive():
                task = asyncio.get_running_loop().create_task(self._outlive(current_call(), step.step))
                self.door.tasks.add(task)
                task.add_done_callback(self.door.tasks.discard)
            case Wait():
                await asyncio.to_thread(self.door.gate.wait, DEADLINE_SECONDS)
            case Say():
                self.response = _response(step)
            case Words():
                self.response = StreamingResponse(self._words(step), media_type="text/plain")
            case _:
                perform_sync(self.door, step)

    async def _outlive(self, call: Any, step: Any) -> None:
        await asyncio.to_thread(until, lambda: call.closed, "the call is closed")
        try:
            await self.perform(step)
        except Exception as error:
            self.door.background.append(error)
        else:
            self.door.background.append("done")

    async def _words(self, step: Words) -> AsyncIterator[bytes]:
        if step.first:
            yield step.first
        for each in step.asks:
            stream = await self.door.client.chat.completions.create(**each.arguments(), stream=True)
            async with stream:
                async for chunk in stream:
                    if chunk.choices and chunk.choices[0].delta.content:
                        yield chunk.choices[0].delta.content.encode()


def _response(say: Say) -> Response:
    if isinstance(say.body, list):

        async def pieces() -> AsyncIterator[bytes]:
            for piece in say.body:
                yield piece

        return StreamingResponse(pieces(), say.status, media_type=say.kind or "text/plain")
    body = say.body if isinstance(say.body, bytes) else json.dumps(say.body or {}).encode()
    return Response(body, say.status, media_type=say.kind or "application/json")


async def ask(client: openai.AsyncOpenAI, step: Ask) -> Any:
    """One chat; gives the text, or the status of an error that is caught."""
    client = client.with_options(max_retries=step.retries)
    try:
        if step.stream:
            words = []
            async with await client.chat.completions.create(**step.arguments(), stream=True) as stream:
                async for chunk in stream:
                    words.append(chunk.choices[0].delta.content or "")
            return "".join(words)
        answer = await client.chat.completions.create(**step.arguments())
    except openai.APIStatusError as error:
        if not step.catch:
            raise
        return error.status_code
    return _said(step, answer)


def _said(step: Ask, answer: Any) -> Any:
    call = current_call()
    if step.record and call is not None:
        call.record(answer)
    return answer.choices[0].message.content


def perform_sync(door: Door, step: Any) -> Any:
    """Steps that need no waiting, or have a thread to wait in."""
    call = current_call()
    match step:
        case Ask():
            client = door.sync_client.with_options(max_retries=step.retries)
            try:
                return _said(step, client.chat.completions.create(**step.arguments()))
            except openai.APIStatusError as error:
                if not step.catch:
                    raise
                return error.status_code
        case Meet():
            door.met.set()
        case Do():
            step.what()
        case Raise():
            raise RuntimeError(step.message)
        case Record() if call is not None:
            call.record(step.answer)
        case Charge() if call is not None:
            call.charge(credits=step.credits, provider="ocr")
        case Tag() if call is not None:
            call.tag(**step.tags)
        case Outcome() if call is not None:
            call.outcome(step.name, step.value)
        case _:
            raise AssertionError(f"{step} cannot be performed here")
    return None


def _in_bare_thread(door: Door, step: Any) -> Any:
    """An own thread, as apps start them: it knows the call because it was given the context."""
    said: list[Any] = []
    context = contextvars.copy_context()
    thread = threading.Thread(target=lambda: said.append(context.run(perform_sync, door, step)))
    thread.start()
    thread.join()
    return said[0]


# ---------------------------------------------------------------- a server, as far as a door can tell


async def drive(app: Any, sent: Sent) -> Reply:
    """Put one request through an ASGI app as a server would, and hang up when told to."""
    reply = Reply()
    waiting = list(sent.body_chunks()) or [b""]
    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if waiting:
            chunk = waiting.pop(0)
            return {"type": "http.request", "body": chunk, "more_body": bool(waiting)}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            assert reply.status is None, "two answers to one request"
            reply.status = message["status"]
            reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            assert len(reply.headers) == len(message["headers"]), message["headers"]
        elif message["type"] == "http.response.body":
            assert reply.status is not None, "a body before its head"
            assert not reply.whole, "a body after its end"
            if message.get("body"):
                reply.chunks.append(message["body"])
            reply.whole = not message.get("more_body", False)
            if sent.hang_up_after is not None and len(reply.chunks) >= sent.hang_up_after:
                gone.set()
            await asyncio.sleep(0)

    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": sent.method,
        "scheme": "http",
        "path": sent.path,
        "raw_path": sent.path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": sent.raw_headers(),
        "client": sent.peer,
        "server": ("127.0.0.1", 80),
        **sent.scope,
    }
    try:
        await app(scope, receive, send)
    except Exception as error:
        reply.error = error
    if reply.error is not None and reply.status is None:
        reply.status = 500  # what every server answers then
    with contextlib.suppress(AttributeError):
        gone.set()
    return reply


# ---------------------------------------------------------------- WSGI


class WsgiDoor(Door):
    """Flask behind `WSGIGuardMiddleware`; what its handlers raise passes to the server, as it does in Starlette.

    PEP 3333 is watched over on both sides of the guard, and its server changes threads wherever it may.
    """

    name = "wsgi"

    def __init__(self, config: Mapping[str, Any], handlers: Mapping[str, Sequence[Any]], provider: StandIn, url: str):
        super().__init__(config, handlers, provider, url)
        app = flask.Flask(__name__)
        app.config["PROPAGATE_EXCEPTIONS"] = True
        for path in self.handlers:
            app.add_url_rule(path, path, functools.partial(self._serve, path), methods=_METHODS)
        strict = validator(WSGIGuardMiddleware(validator(app.wsgi_app), config=config))
        lenient = WSGIGuardMiddleware(app.wsgi_app, config=config)

        def door(environ: Any, start_response: Any) -> Any:
            # Of an input without a length Werkzeug reads the whole, as PEP 3333 allows and its validator does not.
            return (lenient if "wsgi.input_terminated" in environ else strict)(environ, start_response)

        self.app: Any = door

    def together(self, *requests: Sent) -> list[Reply]:
        with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(functools.partial(drive_wsgi, self.app), requests))

    # -- the app

    def _serve(self, path: str) -> flask.Response:
        seen: dict[str, Any] = {
            "headers": {name.lower(): value for name, value in flask.request.headers.items()},
            "body": flask.request.get_data(),
        }
        self.seen.append(seen)
        work = _SyncWork(self)
        call = current_call()
        seen["call"] = None if call is None else call.id
        for step in self.handlers[path]:
            work.perform(step)
        return work.answer()


class _SyncWork:
    """Performs one handler's steps in the thread of its request."""

    def __init__(self, door: WsgiDoor) -> None:
        self.door = door
        self.said: list[Any] = []
        self.response: flask.Response | None = None
        self.later: Later | None = None

    def answer(self) -> flask.Response:
        body = json.dumps({"said": self.said}).encode()
        response = self.response or flask.Response(body, mimetype="application/json")
        if self.later is not None:
            response.call_on_close(functools.partial(self._after, self.later))
        return response

    def _after(self, later: Later) -> None:
        for step in later.steps:
            self.perform(step)

    def perform(self, step: Any) -> None:
        match step:
            case Ask():
                self.said.append(perform_sync(self.door, step))
            case Embed():
                answer = self.door.sync_client.embeddings.create(model=step.model, input=step.text)
                self.said.append(len(answer.data))
            case Background():
                try:
                    self.door.sync_client.responses.create(model="gpt-4o-mini", input=PROMPT, background=True)
                except openai.APIStatusError as error:
                    if not step.catch:
                        raise
                    self.said.append(error.status_code)
            case SignIn():
                if "x-session" in flask.request.headers:
                    flask.request.environ["user"] = flask.request.headers["x-session"]
            case AtOnce():
                contexts = [contextvars.copy_context() for _ in step.steps]
                with concurrent.futures.ThreadPoolExecutor(len(contexts)) as pool:
                    list(pool.map(lambda context, inner: context.run(self.perform, inner), contexts, step.steps))
            case InThread() if step.bare:
                self.said.append(_in_bare_thread(self.door, step.step))
            case InThread():
                with concurrent.futures.ThreadPoolExecutor(1) as pool:
                    context = contextvars.copy_context()
                    self.said.append(pool.submit(context.run, perform_sync, self.door, step.step).result())
            case AsUser():
                with process.Guard().as_user(**step.who):
                    for inner in step.steps:
                        self.perform(inner)
            case Later():
                self.later = step
            case Outlive():
                context = contextvars.copy_context()
                threading.Thread(target=context.run, args=(self._outlive, current_call(), step.step)).start()
            case Wait():
                self.door.gate.wait(DEADLINE_SECONDS)
            case Say():
                self.response = _flask_response(step)
            case Words():
                self.response = flask.Response(self._words(step), mimetype="text/plain")
            case _:
                perform_sync(self.door, step)

    def _outlive(self, call: Any, step: Any) -> None:
        until(lambda: call.closed, "the call is closed")
        try:
            self.perform(step)
        except Exception as error:
            self.door.background.append(error)
        else:
            self.door.background.append("done")

    def _words(self, step: Words) -> Iterator[bytes]:
        if step.first:
            yield step.first
        for each in step.asks:
            with self.door.sync_client.chat.completions.create(**each.arguments(), stream=True) as stream:
                for chunk in stream:
                    if chunk.choices and chunk.choices[0].delta.content:
                        yield chunk.choices[0].delta.content.encode()


def _flask_response(say: Say) -> flask.Response:
    if isinstance(say.body, list):
        return flask.Response(iter(say.body), say.status, mimetype=say.kind or "text/plain")
    body = say.body if isinstance(say.body, bytes) else json.dumps(say.body or {}).encode()
    return flask.Response(body, say.status, mimetype=say.kind or "application/json")


def environ_of(sent: Sent) -> dict[str, Any]:
    """What a server makes of a request. A body in chunks has no length, and an end that the input tells."""
    body = b"".join(sent.body_chunks())
    environ: dict[str, Any] = {
        "REQUEST_METHOD": sent.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": sent.path,
        "QUERY_STRING": "",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
    if sent.chunks is None:
        environ["CONTENT_LENGTH"] = str(len(body))
    else:
        environ |= {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}
    if sent.peer is not None:
        environ |= {"REMOTE_ADDR": sent.peer[0], "REMOTE_PORT": str(sent.peer[1])}
    for name, value in sent.raw_headers():
        key = name.decode().upper().replace("-", "_")
        environ[key if key == "CONTENT_TYPE" else f"HTTP_{key}"] = value.decode()
    return {**environ, **sent.scope}


def drive_wsgi(app: Any, sent: Sent) -> Reply:
    """Put one request through a WSGI app as a server would, each step in a context of its own; hang up when told to."""
    reply = Reply()
    head: list[Any] = []
    gone = sent.hang_up_after

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], None]:
        if exc_info is not None and reply.status is not None:
            raise exc_info[1]
        assert exc_info is not None or not head, "two answers to one request"
        head[:] = status, headers
        return send

    def send(data: bytes) -> None:
        if data or reply.whole:
            assert head, "a body before its head"
            if reply.status is None:
                status, headers = head
                reply.status = int(status.split(" ")[0])
                reply.headers = {name.lower(): value for name, value in headers}
                assert len(reply.headers) == len(headers), headers
        if data:
            reply.chunks.append(data)

    def elsewhere(step: Callable[..., Any], *arguments: Any) -> Any:
        """In another thread, which knows nothing of the one before."""
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(step, *arguments).result()

    def serve() -> None:
        iterable = app(environ_of(sent), start_response)
        try:
            iterator = iter(iterable)
            while gone is None or len(reply.chunks) < gone:
                chunk = elsewhere(next, iterator, None)
                if chunk is None:
                    reply.whole = True
                    send(b"")
                    break
                send(chunk)
        finally:
            if hasattr(iterable, "close"):
                elsewhere(iterable.close)

    try:
        contextvars.Context().run(serve)
    except Exception as error:
        reply.error, reply.whole = error, False
    if reply.error is not None and reply.status is None:
        reply.status = 500  # what every server answers then
    return reply


#: Every door there is; `doors` in conftest.py runs the scenarios through each.
DOORS: Sequence[type[Door]] = (AsgiDoor, WsgiDoor)
