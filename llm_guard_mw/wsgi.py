"""The WSGI door: `app.wsgi_app = WSGIGuardMiddleware(app.wsgi_app, config="llm_guard.toml")`.

PEP 3333, and no event loop behind it. Each request to a guarded route goes through one `_Passage`; everything else
(OPTIONS, routes without a rule) is handed on untouched.

Rule 1. The app's answer is drawn up to its first body bytes before our callable returns, and `start_response` is held
        until then: so a refusal inside a lazy stream can still be a 429, and a server that wants to know the status
        when the callable returns (granian) hears the right one.
Rule 2. A call closes at `close()`, behind the app's own: also where nobody iterated, where iterating raised, and where
        the client has gone. An app that raises before it returns closes its call by that; a server that drops the
        answer and forgets to close it does so too, a moment later.
Rule 3. The app, every `next()` and `close()` run in the Context of the call: a server may iterate in another thread.
Rule 4. An error of ours before the grant follows `on_store_failure`; after it, it is logged and nothing else.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextvars import copy_context
from http import HTTPStatus
from typing import Any  # what sys.exc_info() gives is passed on, and read by nobody here
from wsgiref.types import InputStream, StartResponse, WSGIApplication, WSGIEnvironment

from llm_guard_mw.call import Call, enter
from llm_guard_mw.desk import DoorEnding
from llm_guard_mw.directory import Directory
from llm_guard_mw.environ import headers_of, native_bytes, peer_of, take_out, whole_number
from llm_guard_mw.flask_context import follow_flask
from llm_guard_mw.guard import Guard
from llm_guard_mw.http import Answer, Headers, HttpRequest
from llm_guard_mw.identity import Identifier
from llm_guard_mw.logs import log
from llm_guard_mw.metering import Meter
from llm_guard_mw.model import Refusal
from llm_guard_mw.passage import FAILED, answer_instead, answer_to_refusal, answer_unopened, meter_for, our_headers
from llm_guard_mw.policy import Route
from llm_guard_mw.process import ConfigLike, install

TextHeaders = list[tuple[str, str]]
Write = Callable[[bytes], object]


class WSGIGuardMiddleware:
    """Guards the routes that the configuration names, and the views that are marked with `@guarded`.

    app.wsgi_app = WSGIGuardMiddleware(app.wsgi_app, config="llm_guard.toml")

    `config` is a path, or what `load_config` gives. Outermost is best: a middleware around it that rewrites
    REMOTE_ADDR decides who is a trusted proxy. `views` is the app whose views are marked, where other middleware
    hides it.
    """

    def __init__(self, app: WSGIApplication, config: ConfigLike | None = None, *, views: object = None) -> None:
        self.app = app
        self.installation = install(config)
        self.directory = Directory(self.installation.config.policy, app if views is None else views)
        self.installation.desk.identifier.refuse_async()
        self.guard = Guard(self.installation.desk)
        follow_flask()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        route = self.directory.route(environ["REQUEST_METHOD"], _path(environ), environ)
        if route is None:
            # Not guarded; but what a stranger says about identity is believed nowhere behind us.
            identifier = self.installation.desk.identifier
            take_out(environ, identifier.headers_to_strip(_http_request(environ, identifier)))
            return self.app(environ, start_response)
        self.installation.keeper.start()
        return _Passage(self, route, environ, start_response).answer()


class _Passage:
    """One request on its way through; its server gets it as the iterable of the answer."""

    def __init__(
        self, door: WSGIGuardMiddleware, route: Route, environ: WSGIEnvironment, start_response: StartResponse
    ) -> None:
        self.door = door
        self.route = route
        self.environ = environ
        self.head_only = environ["REQUEST_METHOD"] == "HEAD"  # the app may rewrite it
        self.downstream = start_response
        self.context = copy_context()
        self.call: Call | None = None
        self.meter: Meter | None = None
        self.held_start: tuple[str, TextHeaders] | None = None
        self.server_write: Write | None = None
        self.iterable: Iterable[bytes] = ()
        self.iterator: Iterator[bytes] = iter(())
        self.drawn: list[bytes] = []  # ahead of the server
        self.started = False  # the server's start_response was called
        self.ended = False  # nothing comes behind what is drawn
        self.left: int | None = None  # of the bytes that the app has promised
        self.status: int | None = None
        self.replaced = False  # the app's answer was replaced by our refusal
        self.closed = False

    def answer(self) -> Iterable[bytes]:
        environ, installation = self.environ, self.door.installation
        body = _Body(environ, installation.config.policy.inspect_bytes)
        identifier = installation.desk.identifier
        request = _http_request(environ, identifier, body.seen, complete=body.complete)
        answer = self._open(request)
        if answer is not None:
            return self._send_answer(answer)
        environ["wsgi.input"] = body.stream
        unbelieved = identifier.headers_to_strip(request)
        take_out(environ, unbelieved)
        call = self.call
        if call is None:
            return self.door.app(environ, self.downstream)
        if unbelieved:  # late identity must not believe them either
            call.request = _http_request(environ, identifier, request.body, complete=request.body_complete)
        self.context.run(enter, call)
        try:
            self._begin(call)
        except BaseException:
            self.close()
            raise
        return self

    def _open(self, request: HttpRequest) -> Answer | None:
        """Open the call; an Answer when the request goes no further. Neither call nor Answer: it passes unguarded."""
        call_id = ""
        try:
            call = self.door.guard.call_for(request, self.route)
            call_id = call.id
            outcome = self.door.guard.enter(call)
        except Exception as error:
            return answer_unopened(error, self.door.installation.desk, self.route, call_id)
        if isinstance(outcome, Refusal):
            return answer_to_refusal(call, outcome)
        self.call = outcome
        return None

    def _begin(self, call: Call) -> None:
        """Run the app until there is something to show, or nothing more to come."""
        try:
            self.iterable = self.context.run(self.door.app, self.environ, self._start_response)
            self.iterator = self.context.run(iter, self.iterable)
            while not self.started and not self.ended:
                chunk = self._draw()
                if chunk:
                    self._send_start()
                    self.drawn.append(self._metered(chunk))
                    return
            self._send_start()
        except Exception as error:
            if self.replaced:  # it has told of its failure already, and that was ours
                return
            # Whatever the app made of a refused SDK call, its caller should hear of the refusal.
            answer = answer_instead(call, self.route, error)
            if self.started or answer is None:
                raise
            self._replace(answer)

    def _draw(self) -> bytes | None:
        """The app's next chunk; None at the end, or where another answer stands instead of the app's."""
        try:
            chunk = self.context.run(next, self.iterator)
        except StopIteration:
            self.ended = True
            return None
        return None if self.replaced else chunk

    # -- what the app calls

    def _start_response(self, status: str, headers: TextHeaders, exc_info: Any = None, /) -> Write:
        if self.replaced:
            return self._write
        if self.started:  # whether the head has left, and what that means, is for the server to say
            return self._start_downstream(status, headers, exc_info)
        if self.held_start is not None and exc_info is None:
            raise AssertionError("start_response was called a second time, without exc_info")
        self.held_start = status, headers
        self.status = _code(status)
        if self.status == FAILED and self.call is not None:
            answer = answer_instead(self.call, self.route)
            if answer is not None:
                self._replace(answer)
        return self._write

    def _write(self, data: bytes) -> None:
        if self.replaced:
            return
        if not self.started and not data:
            return  # nothing to show yet: the answer may still become a refusal
        self._send_start()
        assert self.server_write is not None  # noqa: S101 - nobody gets at `write` before a head is held
        self.server_write(self._metered(data))

    # -- what the server gets

    def _send_start(self) -> None:
        """Let the held head go, if there is one."""
        if self.held_start is None:
            return
        (status, headers), self.held_start = self.held_start, None
        self._start_downstream(status, headers)
        self.started = True

    def _start_downstream(self, status: str, headers: TextHeaders, exc_info: Any = None) -> Write:
        assert self.call is not None  # noqa: S101 - no answer runs without a call
        whole = [*headers, *_text_headers(our_headers(self.call))]
        # Without exc_info where there is none: old servers know two arguments.
        self.server_write = self.downstream(status, whole, *((exc_info,) if exc_info is not None else ()))
        # Only now: a server whose head has left raises instead of taking another one.
        lowered = _lowered(headers)
        self.status = _code(status)
        self.meter = meter_for(self.call, self.route, self.status, lowered, self.door.installation.desk.billed)
        self.left = self._promised(dict(lowered))
        return self._write

    def _replace(self, answer: Answer) -> None:
        """Send our answer instead of the app's."""
        self.replaced, self.held_start = True, None
        self.started = self.ended = True
        if self.call is not None:
            self.call.decision = "reject"
        self.status = answer.status
        self.drawn = self._send_answer(answer)

    def _send_answer(self, answer: Answer) -> list[bytes]:
        self.downstream(f"{answer.status} {HTTPStatus(answer.status).phrase}", _text_headers(answer.headers))
        return [] if self.head_only else [answer.body]

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self.drawn:
            return self.drawn.pop()
        if self.ended:
            raise StopIteration
        chunk = self._draw()
        if chunk is None:
            raise StopIteration
        return self._metered(chunk)

    def _promised(self, headers: dict[bytes, bytes]) -> int | None:
        """How long the answer is: a server that has it all may never ask for the end (granian does not)."""
        if self.head_only or self.status in (204, 304):
            return 0
        return whole_number(headers.get(b"content-length", b"").decode("latin-1"))

    def _metered(self, chunk: bytes) -> bytes:
        if self.meter is not None:
            self.meter.feed(chunk)
        if self.left is not None:
            self.left -= len(chunk)
        return chunk

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        try:
            close = getattr(self.iterable, "close", None)
            if close is not None:
                self.context.run(close)
        finally:
            self._close_call()

    def __del__(self) -> None:
        """Dropped without `close()`, as by test clients: until then the call counts as running."""
        if self.call is not None and not self.closed:
            self.closed = True
            self.door.installation.desk.left_behind.append(self._close_call)

    def _close_call(self) -> None:
        assert self.call is not None  # noqa: S101 - nobody else is given to a server
        reading = self.meter.finish() if self.meter is not None else None
        whole = self.ended or (self.left is not None and self.left <= 0)
        ending = DoorEnding(status=self.status if self.started else None, whole=whole, reading=reading)
        try:
            self.door.guard.close(self.call, ending)
        except Exception:  # the caller has its answer
            log.exception("close_failed")


# ---------------------------------------------------------------- the request


class _Body:
    """The request's body: read ahead as far as it is inspected, then given to the app as it came.

    Without a length, and without a server that says where the input ends, there is none that an app could read.
    """

    def __init__(self, environ: WSGIEnvironment, most: int) -> None:
        self.seen = b""
        self.stream: InputStream = environ["wsgi.input"]
        length = whole_number(environ.get("CONTENT_LENGTH"))
        if length is None and not environ.get("wsgi.input_terminated"):
            self.complete = not environ.get("HTTP_TRANSFER_ENCODING") and not environ.get("CONTENT_LENGTH")
            return
        replay = _Replay(self.stream, length)
        self.seen, ended = replay.look(most)
        self.complete = ended if length is None else len(self.seen) == length
        self.stream = io.BytesIO(self.seen) if self.complete else io.BufferedReader(replay)


class _Replay(io.RawIOBase):
    """The server's input once more from its beginning: what was looked at, then the rest.

    Of the server's stream only `read(n)` is used, and never beyond the length: what else it can do after that is not
    the same everywhere (granian's `read()` forgets what an earlier `read(n)` left).
    """

    def __init__(self, stream: InputStream, length: int | None) -> None:
        self._stream = stream
        self._left = length
        self._seen = io.BytesIO()
        self._error: Exception | None = None

    def look(self, most: int) -> tuple[bytes, bool]:
        """At most so many bytes, and whether the stream has ended behind them."""
        ended = False
        while not ended and self._seen.tell() < most:
            try:
                chunk = self._more(most - self._seen.tell())
            except Exception as error:  # the client has gone: the app hears of it where it gets there
                self._error = error
                break
            self._seen.write(chunk)
            ended = not chunk
        self._seen.seek(0)
        return self._seen.getvalue(), ended

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        chunk = self._seen.read(len(buffer))
        if not chunk and self._error is not None:
            error, self._error = self._error, None
            raise error
        chunk = chunk or self._more(len(buffer))
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def _more(self, size: int) -> bytes:
        if self._left is not None:
            size = min(size, self._left)
        chunk = self._stream.read(size) if size else b""
        if self._left is not None:
            self._left -= len(chunk)
        return chunk


def _path(environ: WSGIEnvironment) -> str:
    """What is left below SCRIPT_NAME, as text: a server hands on the bytes of the path as Latin-1."""
    return native_bytes(environ.get("PATH_INFO", "")).decode("utf-8", "replace") or "/"


def _http_request(
    environ: WSGIEnvironment, identifier: Identifier, body: bytes = b"", *, complete: bool = True
) -> HttpRequest:
    return HttpRequest(
        method=environ["REQUEST_METHOD"],
        path=_path(environ),
        query=native_bytes(environ.get("QUERY_STRING", "")),
        headers=headers_of(environ, identifier.identity_headers),
        peer=peer_of(environ),
        body=body,
        body_complete=complete,
        surroundings=environ,
    )


# ---------------------------------------------------------------- the answer


def _code(status: str) -> int:
    """The number in "200 OK"; 0 of what is no status: the server will say so."""
    return whole_number(status[:3]) or 0


def _lowered(headers: TextHeaders) -> Headers:
    return tuple((native_bytes(name.lower()), native_bytes(value)) for name, value in headers)


def _text_headers(headers: Headers) -> TextHeaders:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
