"""Capture for the aiohttp sessions that google-genai's async client makes, one an event loop.

The client asks itself for a session before each request; it is handed one that guards what passes. What goes out and
comes back are aiohttp's own objects, since the SDK tells them by their class: a refusal as well.

aiohttp is imported when the first session appears, so an environment without it never asks for it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import cache
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from weakref import ref

from llm_guard_mw.capture.exchange import Outgoing, Tap, abegin, asked_by, concerns
from llm_guard_mw.http import Answer

# aiohttp's and the SDK's objects are Any: neither may be imported here.


def capture_sessions(api: Any) -> None:
    """Guard every session that a google-genai client gets from now on. Twice changes nothing.

    The replacement holds no strong reference to the client: its finalizer closes sockets, and a cycle would put
    that off.
    """
    if "_get_aiohttp_session" in vars(api):
        return
    weak = ref(api)

    async def guarded_session() -> Any:
        client = weak()
        if client is None:
            raise RuntimeError("the client was dropped while it was sending")
        session = await type(client)._get_aiohttp_session(client)
        return session if session is None else _Session(session)

    api._get_aiohttp_session = guarded_session


class _Session:
    """One of aiohttp's sessions, with `request` guarded; everything else is the session's own."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    async def request(self, method: str, url: Any, **arguments: Any) -> Any:
        parts = urlsplit(str(url))
        target = urlunsplit(("", "", parts.path or "/", parts.query, ""))
        body = arguments.get("data") or b""
        if not isinstance(body, bytes) or not concerns(method, parts.netloc, target, loaded=True):
            return await self._session.request(method, url, **arguments)
        outgoing = Outgoing(method, parts.netloc, target, _raw(arguments.get("headers") or {}), body)
        asked = asked_by(outgoing)
        tap = await abegin(asked, outgoing) if asked is not None else None
        if tap is None:
            return await self._session.request(method, url, **arguments)
        if isinstance(tap, Answer):
            return _local_response()(method, str(url), tap)
        rewritten = tap.rewritten(outgoing)
        if rewritten is not outgoing:
            url = f"{parts.scheme}://{parts.netloc}{rewritten.target}"
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in rewritten.headers}
            arguments = {**arguments, "data": rewritten.body, "headers": headers}
        try:
            response = await self._session.request(method, url, **arguments)
        except BaseException as error:
            tap.failed(error, _unsent())
            raise
        # google-auth's session wraps aiohttp's response in one of its own.
        _watch(getattr(response, "_response", response), tap, decoded=getattr(self._session, "auto_decompress", True))
        return response


def _watch(response: Any, tap: Tap, *, decoded: bool) -> None:
    """Let the tap see what is read of this response, and how it ends."""
    tap.head(response.status, tuple(response.raw_headers), decoded=decoded)
    response.content = _Content(response.content, tap)
    kind: Any = type(response)
    response.__class__ = _watched(kind)


class _Content:
    """A response's stream reader; whatever is read of it, the tap sees."""

    def __init__(self, inner: Any, tap: Tap) -> None:
        self._inner = inner
        self.tap = tap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __del__(self) -> None:
        self.tap.forgotten()

    async def read(self, n: int = -1) -> bytes:
        return self._saw(await self._reading(self._inner.read(n)))

    async def readany(self) -> bytes:
        return self._saw(await self._reading(self._inner.readany()))

    async def readline(self, **arguments: Any) -> bytes:
        return self._saw(await self._reading(self._inner.readline(**arguments)))

    async def readuntil(self, *arguments: Any, **named: Any) -> bytes:
        return self._saw(await self._reading(self._inner.readuntil(*arguments, **named)))

    async def readexactly(self, n: int) -> bytes:
        return self._saw(await self._reading(self._inner.readexactly(n)))

    async def readchunk(self) -> tuple[bytes, bool]:
        data, ends = await self._reading(self._inner.readchunk())
        return self._saw(data), ends

    def read_nowait(self, n: int = -1) -> bytes:
        data: bytes = self._inner.read_nowait(n)
        return self._saw(data)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._each(self.readline)

    def iter_any(self) -> AsyncIterator[bytes]:
        return self._each(self.readany)

    def iter_chunked(self, n: int) -> AsyncIterator[bytes]:
        return self._each(lambda: self.read(n))

    async def iter_chunks(self) -> AsyncIterator[tuple[bytes, bool]]:
        while (piece := await self.readchunk()) != (b"", False):
            yield piece

    async def _each(self, read: Callable[[], Awaitable[bytes]]) -> AsyncIterator[bytes]:
        while data := await read():
            yield data

    async def _reading(self, reading: Awaitable[Any]) -> Any:
        try:
            return await reading
        except BaseException as error:
            self.tap.failed(error)
            raise

    def _saw(self, data: bytes) -> bytes:
        if data:
            self.tap.chunk(data)
        if self._inner.at_eof():
            self.tap.ended()
        return data


@cache
def _watched(kind: Any) -> Any:
    """`kind` of response, with the ways in which an app lets go of one."""

    def release(self: Any) -> Any:
        _let_go(self)
        return kind.release(self)

    def close(self: Any) -> None:
        _let_go(self)
        kind.close(self)

    return type(kind.__name__, (kind,), {"release": release, "close": close, "__module__": kind.__module__})


def _let_go(response: Any) -> None:
    if isinstance(response.content, _Content):
        if response.content.at_eof():
            response.content.tap.ended()
        response.content.tap.broken_off()


@cache
def _local_response() -> type[Any]:
    """A class of responses that came over no connection: what an SDK is told of a refusal."""
    import aiohttp
    from multidict import CIMultiDict, CIMultiDictProxy
    from yarl import URL

    class LocalResponse(aiohttp.ClientResponse):
        # The base's __init__ wants a connection's parts, other ones in each release; only what reading needs is set.
        def __init__(self, method: str, url: str, answer: Answer) -> None:
            self.method = method
            self.status = answer.status
            self.reason = "Too Many Requests" if answer.status == 429 else "Refused"
            self._real_url = self._url = URL(url)
            self._request_info = aiohttp.RequestInfo(URL(url), method, CIMultiDictProxy(CIMultiDict()), URL(url))
            self._raw_headers = answer.headers
            self._headers = CIMultiDictProxy(
                CIMultiDict((name.decode("latin-1"), value.decode("latin-1")) for name, value in answer.headers)
            )
            self._body = answer.body
            self._cache: dict[str, Any] = {}
            self._traces = []

        async def read(self) -> bytes:
            return self._body or b""

        def release(self) -> Any:
            return None

        def close(self) -> None:
            return None

    return LocalResponse


@cache
def _unsent() -> tuple[type[Exception], ...]:
    """Before any of these the connection was not there yet."""
    import aiohttp

    return (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL)


def _raw(headers: Any) -> tuple[tuple[bytes, bytes], ...]:
    return tuple((str(name).encode("latin-1"), str(value).encode("latin-1")) for name, value in headers.items())
