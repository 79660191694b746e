"""The middleware for Django: `MIDDLEWARE = ["llm_guard_mw.django.GuardMiddleware", ...]`.

It stands where Django's own do, so that it knows the view's caller and the answer as Django makes them. Under WSGI it
is sync, under ASGI async; each request to a guarded route goes through one `_Passage`.

Rule 1. A call opens in `process_view`: the middleware of all of Django's layers have run, and `request.user` is known.
Rule 2. A stream is drawn up to its first bytes before the answer goes on: so a refusal inside it can still be a 429.
Rule 3. A call closes when its response is closed, behind the response's own closers; without a response, at once.
Rule 4. An error of ours before the grant follows `on_store_failure`; after it, it is logged and nothing else.
"""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any  # Django has no types: its requests, responses and views

from asgiref.sync import iscoroutinefunction, markcoroutinefunction, sync_to_async
from django.conf import settings
from django.core.exceptions import BadRequest, PermissionDenied, SuspiciousOperation
from django.http import Http404, HttpResponse
from django.http.multipartparser import MultiPartParserError

from llm_guard_mw.call import Call, current_call, enter
from llm_guard_mw.desk import DoorEnding
from llm_guard_mw.directory import Directory, DjangoRouter
from llm_guard_mw.environ import headers_of, native_bytes, peer_of, take_out, whole_number
from llm_guard_mw.guard import AsyncGuard, Guard, to_its_end
from llm_guard_mw.http import Answer, HttpRequest
from llm_guard_mw.logs import log
from llm_guard_mw.metering import Meter
from llm_guard_mw.model import Refusal
from llm_guard_mw.passage import FAILED, answer_instead, answer_to_refusal, answer_unopened, meter_for, our_headers
from llm_guard_mw.policy import Route
from llm_guard_mw.process import ConfigLike, install

#: Where a request keeps its passage, from one of our methods to the next.
_PASSAGE = "_llm_guard_passage"

#: Exceptions that Django answers itself, with less than a 500.
_ANSWERED = (Http404, PermissionDenied, BadRequest, SuspiciousOperation, MultiPartParserError)


def configured() -> ConfigLike | None:
    """What the settings say: a path, a dict, or None for what the environment or the folder has."""
    said: ConfigLike | None = getattr(settings, "LLM_GUARD", None)
    return said


class GuardMiddleware:
    """Guards the routes that the configuration names. First in MIDDLEWARE is best, but behind CORS."""

    sync_capable = async_capable = True

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        self.get_response = get_response
        self.installation = install(configured())
        self.directory = Directory(self.installation.config.policy, DjangoRouter())
        self.is_async = iscoroutinefunction(get_response)
        self.sync_guard = Guard(self.installation.desk)
        self.async_guard = AsyncGuard(self.installation.desk)
        self.process_view: Callable[..., Any] = self._open_sync
        if self.is_async:
            self.process_view = self._open_async
            markcoroutinefunction(self)
        else:
            self.installation.desk.identifier.refuse_async()
        said = self.installation.config.identity
        asked = (*said.user, *said.tenant, *said.tier)
        #: Identity is read from what Django loads from its database when it is first looked at.
        self.asks_django = any(source.startswith(("scope:user.", "session:")) for source in asked)

    def __call__(self, request: Any) -> Any:
        passage = self._passage(request)
        if self.is_async:
            return self.get_response(request) if passage is None else self._run_async(request, passage)
        return self.get_response(request) if passage is None else self._run_sync(request, passage)

    def process_exception(self, request: Any, error: Exception) -> Any:
        """A view has failed: of a refused SDK call, its caller should hear of the refusal."""
        passage = getattr(request, _PASSAGE, None)
        if passage is None or passage.call is None or isinstance(error, _ANSWERED):
            return None
        return passage.instead(error)

    def _passage(self, request: Any) -> _Passage | None:
        """A way through for a request to a guarded route. What strangers say of who they are is believed nowhere."""
        identifier = self.installation.desk.identifier
        names = identifier.headers_to_strip(_http_request(request, identifier.identity_headers))
        if names:
            take_out(request.META, names)
            request.__dict__.pop("headers", None)  # made of META, once
        route = self.directory.route(request.method, request.path_info, request.META)
        if route is None:
            return None
        self.installation.keeper.start()
        passage = _Passage(self, route, request)
        setattr(request, _PASSAGE, passage)
        return passage

    # -- sync

    def _run_sync(self, request: Any, passage: _Passage) -> Any:
        before = current_call()
        try:
            response = passage.answered(self.get_response(request))
            if passage.call is not None:
                self.sync_guard.ask_now(passage.call)
            if passage.streams(response):
                passage.follow(response) if response.is_async else passage.draw(response)
        except BaseException as error:
            response = passage.failed(error)
            if response is None:
                passage.close()
                raise
        finally:
            enter(before)
        return passage.sent(response)

    def _open_sync(self, request: Any, view: Any, arguments: Any, named: Any) -> Any:
        passage: _Passage | None = getattr(request, _PASSAGE, None)
        if passage is None or passage.call is not None:  # a middleware inside of us may ask twice
            return None
        call_id = ""
        try:
            call = self.sync_guard.call_for(passage.http_request(), passage.route)
            call_id = call.id
            return passage.opened(call, self.sync_guard.enter(call))
        except Exception as error:
            return passage.unopened(error, call_id)

    # -- async

    async def _run_async(self, request: Any, passage: _Passage) -> Any:
        before = current_call()
        try:
            response = passage.answered(await self.get_response(request))
            if passage.call is not None and not passage.call.identified:
                await self._look(request)
                await self.async_guard.ask_now(passage.call)
            if passage.streams(response):
                if response.is_async:
                    await passage.adraw(response)
                else:
                    await sync_to_async(passage.draw)(response)
        except BaseException as error:
            response = passage.failed(error)
            if response is None:
                await passage.aclose()
                raise
        finally:
            enter(before)
        return passage.sent(response)

    async def _open_async(self, request: Any, view: Any, arguments: Any, named: Any) -> Any:
        passage: _Passage | None = getattr(request, _PASSAGE, None)
        if passage is None or passage.call is not None:  # a middleware inside of us may ask twice
            return None
        call_id = ""
        try:
            await self._look(request)
            call = await self.async_guard.call_for(passage.http_request(), passage.route)
            call_id = call.id
            return passage.opened(call, await self.async_guard.enter(call))
        except Exception as error:
            return passage.unopened(error, call_id)

    async def _look(self, request: Any) -> None:
        """Let Django load who is logged in where it may wait: the sources look at it on the event loop."""
        if self.asks_django:
            await sync_to_async(_look_at)(request)


class _Passage:
    """One request on its way through."""

    def __init__(self, door: GuardMiddleware, route: Route, request: Any) -> None:
        self.door = door
        self.route = route
        self.request = request
        self.call: Call | None = None
        self.meter: Meter | None = None
        self.status: int | None = None
        self.whole = False  # the answer was passed on to its end
        self.replaced = False  # the view's answer was replaced by our refusal
        self.closed = False
        self.before: Call | None = None  # the current call around the closing of the response

    # -- opening

    def http_request(self) -> HttpRequest:
        installation = self.door.installation
        body, complete = _body(self.request, installation.config.policy.inspect_bytes)
        return _http_request(self.request, installation.desk.identifier.identity_headers, body, complete=complete)

    def opened(self, call: Call, outcome: Call | Refusal) -> Any:
        """None: the view may run. Else the answer that stands instead."""
        if isinstance(outcome, Refusal):
            return _response(answer_to_refusal(call, outcome))
        self.call = outcome
        enter(outcome)
        return None

    def unopened(self, error: Exception, call_id: str) -> Any:
        """The answer to a call that could not be opened; None: it passes unguarded."""
        answer = answer_unopened(error, self.door.installation.desk, self.route, call_id)
        return None if answer is None else _response(answer)

    # -- what came back

    def instead(self, error: Exception | None = None) -> Any:
        """Our answer, where the view's failure came of a refusal of ours."""
        if self.call is None or self.replaced:
            return None
        answer = answer_instead(self.call, self.route, error)
        if answer is None:
            return None
        self.replaced = True
        self.call.decision = "reject"
        return _response(answer)

    def answered(self, response: Any) -> Any:
        """The view's answer, or ours. Django makes a 500 of what the view, or a middleware inside, raises."""
        return (response.status_code == FAILED and self.instead()) or response

    def failed(self, error: BaseException) -> Any:
        """Something was raised through to us; None: it is not ours to answer."""
        return self.instead(error) if isinstance(error, Exception) else None

    def streams(self, response: Any) -> bool:
        """Whether the answer is still to be made. A file is not: servers send it in ways of their own."""
        own = self.call is not None and not self.replaced
        return own and response.streaming and getattr(response, "file_to_stream", None) is None

    def draw(self, response: Any) -> None:
        """Run a stream up to its first bytes: until then its answer may become a refusal."""
        chunks = self._within(iter(response.streaming_content))
        first = next((chunk for chunk in chunks if chunk), b"")
        response.streaming_content = self._passed_on(first, chunks)

    async def adraw(self, response: Any) -> None:
        chunks = self._awithin(aiter(response.streaming_content))
        first = b""
        async for first in chunks:
            if first:
                break
        response.streaming_content = self._apassed_on(first, chunks)

    def follow(self, response: Any) -> None:
        """An async stream that Django will run on a loop of its own, which cannot be begun before that."""
        response.streaming_content = self._apassed_on(b"", self._awithin(aiter(response.streaming_content)))

    def _within(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Each step in the call, whoever takes it."""
        while True:
            with _current(self.call):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk

    async def _awithin(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        while True:
            with _current(self.call):
                chunk = await anext(chunks, None)
            if chunk is None:
                return
            yield chunk

    def _passed_on(self, first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
        try:
            if first:
                yield self._metered(first)
            for chunk in rest:
                yield self._metered(chunk)
        except Exception:  # under ASGI Django closes no response whose stream has failed
            self.close()
            raise
        self.whole = True

    async def _apassed_on(self, first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            if first:
                yield self._metered(first)
            async for chunk in rest:
                yield self._metered(chunk)
        except Exception:  # as above
            await self.aclose()
            raise
        self.whole = True

    def _metered(self, chunk: bytes) -> bytes:
        if self.meter is not None:
            self.meter.feed(chunk)
        return chunk

    # -- what goes on

    def sent(self, response: Any) -> Any:
        """The answer goes on: our headers beside it, a meter on it. Its closing closes the call."""
        if self.call is None:
            return response
        self.status = response.status_code
        if not self.replaced:
            headers = [(native_bytes(name), native_bytes(value)) for name, value in response.items()]
            billed = self.door.installation.desk.billed
            self.meter = meter_for(self.call, self.route, response.status_code, headers, billed)
            for name, value in our_headers(self.call):
                response.headers[name.decode("latin-1")] = value.decode("latin-1")
        if not response.streaming:
            self._metered(response.content)
        self.whole = not self.streams(response)
        response._resource_closers.insert(0, _AtClose(self._enter))
        response._resource_closers.append(_AtClose(self._leave))
        setattr(self.request, _PASSAGE, None)  # from here on the response alone holds us
        return response

    def __del__(self) -> None:
        """A response that nobody closes: a middleware around us has failed, or has put another one in its place."""
        if self.call is not None and not self.closed:
            self.door.installation.desk.left_behind.append(self.close)

    def _enter(self) -> None:
        self.before = current_call()
        enter(self.call)

    def _leave(self) -> None:
        enter(self.before)
        self.close()

    # -- the end

    def close(self) -> None:
        """The call is over. Closing twice changes nothing."""
        if self.call is None or self.closed:
            return
        self.closed = True
        try:
            self.door.sync_guard.close(self.call, self._ending())
        except Exception:  # the caller has its answer
            log.exception("close_failed")

    async def aclose(self) -> None:
        if self.call is None or self.closed:
            return
        self.closed = True
        await to_its_end(self.door.async_guard.close(self.call, self._ending()))

    def _ending(self) -> DoorEnding:
        reading = self.meter.finish() if self.meter is not None else None
        return DoorEnding(status=self.status, whole=self.whole, reading=reading)


class _AtClose:
    """What is done when a response closes. A copy of the response, out of Django's cache, closes nothing of ours."""

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step

    def __call__(self) -> None:
        self._step()

    def __reduce__(self) -> tuple[type[_AtClose], tuple[Callable[[], None]]]:
        return _AtClose, (_nothing,)


def _nothing() -> None:
    pass


@contextmanager
def _current(call: Call | None) -> Iterator[None]:
    before = current_call()
    enter(call)
    try:
        yield
    finally:
        enter(before)


def _response(answer: Answer) -> Any:
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in answer.headers}
    return HttpResponse(answer.body, status=answer.status, headers=headers)


# ---------------------------------------------------------------- the request


class _Surroundings(Mapping[str, Any]):
    """Where the sources look: the request's META, and whom Django knows. Live: a view may authenticate its caller."""

    def __init__(self, request: Any) -> None:
        self._request = request

    def __getitem__(self, key: str) -> Any:
        try:
            if key == "user":
                return self._request.user
            if key == "session":
                return dict(self._request.session.items())
        except AttributeError:  # the middleware that puts it there is not installed
            raise KeyError(key) from None
        if key == "server" and hasattr(self._request, "scope"):
            return self._request.scope["server"]
        return self._request.META[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("user", "session", *self._request.META))

    def __len__(self) -> int:
        return 2 + len(self._request.META)


def _http_request(
    request: Any, identity_headers: frozenset[bytes], body: bytes = b"", *, complete: bool = True
) -> HttpRequest:
    return HttpRequest(
        method=request.method,
        path=request.path_info,
        query=native_bytes(request.META.get("QUERY_STRING", "")),
        headers=headers_of(request.META, identity_headers),
        peer=_peer(request),
        body=body,
        body_complete=complete,
        surroundings=_Surroundings(request),
    )


def _peer(request: Any) -> tuple[str, int] | None:
    if not hasattr(request, "scope"):
        return peer_of(request.META)
    client = request.scope.get("client")
    return (client[0], client[1]) if client else None


def _body(request: Any, most: int) -> tuple[bytes, bool]:
    """The body, and whether it is known whole. Django gives all of it or nothing, so a large one is not looked at."""
    length = whole_number(request.META.get("CONTENT_LENGTH"))
    if length is None and not hasattr(request, "scope"):  # without a length, a WSGI app has no body to read
        return b"", "HTTP_TRANSFER_ENCODING" not in request.META
    try:
        if length is None:  # Django has spooled it, to a file if it is long
            length = request._stream.seek(0, io.SEEK_END)
            request._stream.seek(0)
        return (request.body, True) if length <= most else (b"", False)
    except Exception:  # read by somebody else already, too large for Django's settings, the client has gone
        return b"", False


def _look_at(request: Any) -> None:
    """Have Django load the user and the session. What goes wrong shows where the sources look."""
    with suppress(Exception):
        _ = request.user.is_authenticated
    with suppress(Exception):
        request.session.items()
