"""Capture for httpx2, and for the legacy httpx where an SDK takes it: both have the same classes under two names.

A client's transports are wrapped in place, those of its mounts (proxies) as well, so that copies of an SDK's client,
which share it, are guarded too. Both libraries assert the base class of transports and byte streams, so each gets its
own thin subclasses of the logic here.

Neither library is imported here: a client brings its own.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any
from weakref import ref

from llm_guard_mw.capture.exchange import Outgoing, Tap, abegin, asked_by, begin, concerns
from llm_guard_mw.http import Answer

# Requests, responses, transports and clients of either library are Any: there is no type that is both.


def is_client(thing: Any) -> bool:
    """Whether this is a client of httpx2 or httpx, sync or async."""
    return _library_of(thing) is not None


def capture_client(client: Any) -> None:
    """Wrap all transports of a client in place. What is wrapped already stays as it is."""
    library = _library_of(client)
    if library is None:
        raise TypeError(f"{type(client).__name__} is no client of httpx2 or httpx")
    family = _family(library)
    client._transport = family.guarded(client._transport)
    for pattern, transport in list(client._mounts.items()):
        if transport is not None:  # None: the client's own transport
            client._mounts[pattern] = family.guarded(transport)
    if hasattr(client, "_client_for_running_loop"):
        _capture_inner_clients(client)


def _capture_inner_clients(client: Any) -> None:
    """google-genai's async client sends through one inner client per event loop, made when it is needed.

    The replacement holds no strong reference to the client: its finalizer closes sockets, and a cycle would put
    that off.
    """
    if "_client_for_running_loop" in vars(client):
        return
    weak = ref(client)

    def client_for_running_loop() -> Any:
        outer = weak()
        if outer is None:
            raise RuntimeError("the client was dropped while it was sending")
        inner = type(outer)._client_for_running_loop(outer)
        capture_client(inner)
        return inner

    client._client_for_running_loop = client_for_running_loop


def _library_of(client: Any) -> str | None:
    for kind in type(client).__mro__:
        root = kind.__module__.partition(".")[0]
        if root in ("httpx2", "httpx") and kind.__name__ in ("Client", "AsyncClient"):
            return root
    return None


# ---------------------------------------------------------------- one family of classes a library


@dataclass(frozen=True, slots=True)
class _Family:
    """The wrappers as subclasses of one library's own bases."""

    library: ModuleType
    transport: type[_Transport]
    async_transport: type[_AsyncTransport]

    def guarded(self, transport: Any) -> Any:
        if isinstance(transport, _Guarded):
            return transport
        if isinstance(transport, self.library.AsyncBaseTransport):
            return self.async_transport(transport)
        return self.transport(transport)


@cache
def _family(name: str) -> _Family:
    library = sys.modules[name]
    stream = type("GuardedStream", (_Stream, library.SyncByteStream), {})
    async_stream = type("AsyncGuardedStream", (_AsyncStream, library.AsyncByteStream), {})
    # Before any of these the connection was not there yet.
    unsent = (
        library.ConnectError,
        library.ConnectTimeout,
        library.PoolTimeout,
        library.ProxyError,
        library.UnsupportedProtocol,
    )
    shared = {"library": library, "unsent": unsent}
    return _Family(
        library,
        type("GuardedTransport", (_Transport, library.BaseTransport), {**shared, "stream": stream}),
        type(
            "AsyncGuardedTransport", (_AsyncTransport, library.AsyncBaseTransport), {**shared, "stream": async_stream}
        ),
    )


class _Guarded:
    """What both transports do without I/O."""

    library: ModuleType
    unsent: tuple[type[Exception], ...]
    stream: Any

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        # Only what is not found here: tools that look into a transport (its pool, its limits) still find it.
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def _request(self, request: Any, tap: Tap, outgoing: Outgoing) -> Any:
        """The request to send: the very same one if nothing was rewritten."""
        rewritten = tap.rewritten(outgoing)
        if rewritten is outgoing:
            return request
        url = request.url.copy_with(raw_path=rewritten.target.encode("ascii"))
        return self.library.Request(
            request.method, url, headers=rewritten.headers, content=rewritten.body, extensions=request.extensions
        )

    def _response(self, response: Any, tap: Tap) -> Any:
        tap.head(response.status_code, tuple(response.headers.raw))
        response.stream = self.stream(response.stream, tap)
        return response

    def _local(self, answer: Answer) -> Any:
        return self.library.Response(answer.status, headers=list(answer.headers), content=answer.body)


class _Transport(_Guarded):
    def __enter__(self) -> Any:
        self.inner.__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.inner.__exit__(*exc_info)

    def close(self) -> None:
        self.inner.close()

    def handle_request(self, request: Any) -> Any:
        if not _concerns(request):
            return self.inner.handle_request(request)
        request.read()
        outgoing = _outgoing(request)
        asked = asked_by(outgoing)
        tap = begin(asked, outgoing) if asked is not None else None
        if tap is None:
            return self.inner.handle_request(request)
        if isinstance(tap, Answer):
            return self._local(tap)
        try:
            response = self.inner.handle_request(self._request(request, tap, outgoing))
        except BaseException as error:
            tap.failed(error, self.unsent)
            raise
        return self._response(response, tap)


class _AsyncTransport(_Guarded):
    async def __aenter__(self) -> Any:
        await self.inner.__aenter__()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        await self.inner.__aexit__(*exc_info)

    async def aclose(self) -> None:
        await self.inner.aclose()

    async def handle_async_request(self, request: Any) -> Any:
        if not _concerns(request):
            return await self.inner.handle_async_request(request)
        await request.aread()
        outgoing = _outgoing(request)
        asked = asked_by(outgoing)
        tap = await abegin(asked, outgoing) if asked is not None else None
        if tap is None:
            return await self.inner.handle_async_request(request)
        if isinstance(tap, Answer):
            return self._local(tap)
        try:
            response = await self.inner.handle_async_request(self._request(request, tap, outgoing))
        except BaseException as error:
            tap.failed(error, self.unsent)
            raise
        return self._response(response, tap)


class _Stream:
    """The answer's bytes on their way to the app, chunk by chunk as they came."""

    def __init__(self, inner: Any, tap: Tap) -> None:
        self._inner = inner
        self._tap = tap

    def __iter__(self) -> Iterator[bytes]:
        tap = self._tap
        try:
            for chunk in self._inner:
                if data := tap.chunk(chunk):
                    yield data
            if data := tap.rest():
                yield data
        except GeneratorExit:
            # Whoever stops in between closes the stream, or drops it: both are told below. This may be a finalizer.
            raise
        except BaseException as error:
            tap.failed(error)
            raise
        tap.ended()

    def close(self) -> None:
        self._tap.broken_off()
        self._inner.close()

    def __del__(self) -> None:
        self._tap.forgotten()


class _AsyncStream:
    """The async twin of `_Stream`."""

    def __init__(self, inner: Any, tap: Tap) -> None:
        self._inner = inner
        self._tap = tap

    async def __aiter__(self) -> AsyncIterator[bytes]:
        tap = self._tap
        try:
            async for chunk in self._inner:
                if data := tap.chunk(chunk):
                    yield data
            if data := tap.rest():
                yield data
        except GeneratorExit:
            raise
        except BaseException as error:
            tap.failed(error)
            raise
        tap.ended()

    async def aclose(self) -> None:
        self._tap.broken_off()
        await self._inner.aclose()

    def __del__(self) -> None:
        self._tap.forgotten()


def _concerns(request: Any) -> bool:
    target = request.url.raw_path.decode("ascii")
    return concerns(request.method, _host(request), target, loaded=_is_loaded(request))


def _is_loaded(request: Any) -> bool:
    try:
        request.content  # noqa: B018  both libraries' RequestNotRead is a RuntimeError
    except RuntimeError:
        return False
    return True


def _outgoing(request: Any) -> Outgoing:
    return Outgoing(
        request.method,
        _host(request),
        request.url.raw_path.decode("ascii"),
        tuple(request.headers.raw),
        request.content,
    )


def _host(request: Any) -> str:
    host: str = request.url.netloc.decode("ascii")
    return host
