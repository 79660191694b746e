"""Capture for sessions of requests: `capture(requests.Session())`.

A session asks itself for the adapter of each URL; it is handed one that guards what passes, so adapters that are
mounted later are guarded too. The answer's `raw` is put behind a reader of ours: whatever an app reads of it, by
`content`, `iter_lines` or `raw.read`, the tap sees.

Neither requests nor urllib3 is imported here: a session brings them.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit
from weakref import ref

from llm_guard_mw.capture.exchange import Outgoing, Tap, asked_by, begin, concerns
from llm_guard_mw.http import Answer, Headers, with_body_length

# The objects of requests and urllib3 are Any: neither may be imported here.


def is_session(thing: Any) -> bool:
    """Whether this is a session of requests, or of a class made from it."""
    return any(
        kind.__module__.partition(".")[0] == "requests" and kind.__name__ == "Session" for kind in type(thing).__mro__
    )


def capture_session(session: Any) -> None:
    """Guard everything that a session sends from now on. Twice changes nothing.

    The replacement holds no strong reference to the session: a cycle would put off that its sockets are closed.
    """
    if isinstance(vars(session).get("get_adapter"), _Adapters):
        return
    session.get_adapter = _Adapters(session)


class _Adapters:
    """A session's `get_adapter`, with every adapter guarded."""

    def __init__(self, session: Any) -> None:
        self._session = ref(session)

    def __call__(self, url: str) -> Any:
        session = self._session()
        if session is None:
            raise RuntimeError("the session was dropped while it was sending")
        return _Adapter(type(session).get_adapter(session, url))


class _Adapter:
    """One of a session's adapters, with `send` guarded; everything else is the adapter's own."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def send(self, request: Any, *arguments: Any, **named: Any) -> Any:
        scheme, host, target = _address(request.url)
        loaded = request.body is None or isinstance(request.body, bytes | str)
        if not concerns(request.method, host, target, loaded=loaded):
            return self.inner.send(request, *arguments, **named)
        if not loaded:
            request = _with_loaded_body(request)
        outgoing = Outgoing(request.method, host, target, _raw_headers(request.headers), _bytes(request.body))
        asked = asked_by(outgoing)
        tap = begin(asked, outgoing) if asked is not None else None
        if tap is None:
            return self.inner.send(request, *arguments, **named)
        if isinstance(tap, Answer):
            return self._local(request, tap)
        rewritten = tap.rewritten(outgoing)
        if rewritten is not outgoing:
            request = request.copy()
            request.url = f"{scheme}://{host}{rewritten.target}"
            _put_in(request, rewritten.headers, rewritten.body)
        try:
            response = self.inner.send(request, *arguments, **named)
        except BaseException as error:
            if _never_left(error):
                tap.unsent()
            else:
                tap.failed(error)
            raise
        # What an app's auth sends once more, it sends through here.
        response.connection = self
        response.raw = _Reader(response.raw, tap, response.status_code)
        return response

    def _local(self, request: Any, answer: Answer) -> Any:
        """A response that came over no connection."""
        library = sys.modules["requests"]
        response: Any = library.Response()
        response.status_code = answer.status
        response.reason = "Too Many Requests" if answer.status == 429 else "Refused"
        for name, value in answer.headers:
            response.headers[name.decode("latin-1")] = value.decode("latin-1")
        response.encoding = "utf-8"
        response.url = request.url
        response.request = request
        response.connection = self
        response.raw = io.BytesIO(answer.body)
        return response


# ---------------------------------------------------------------- the request


def _address(url: str) -> tuple[str, str, str]:
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return parts.scheme, parts.netloc.rpartition("@")[2], target


def _with_loaded_body(request: Any) -> Any:
    """The request with its file or generator read: what an AI endpoint is asked must be known before it is asked."""
    body = request.body
    data = body.read() if hasattr(body, "read") else b"".join([_bytes(piece) for piece in body])
    request = request.copy()
    _put_in(request, with_body_length(_raw_headers(request.headers), len(_bytes(data))), _bytes(data))
    return request


def _put_in(request: Any, headers: Headers, body: bytes) -> None:
    request.body = body
    request._body_position = None  # there is no file to wind back
    request.headers = type(request.headers)(
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in headers
        if name.lower() != b"transfer-encoding"
    )


def _raw_headers(headers: Any) -> Headers:
    return tuple([(_latin(name), _latin(value)) for name, value in headers.items()])


def _latin(text: Any) -> bytes:
    return text if isinstance(text, bytes) else str(text).encode("latin-1", "replace")


def _bytes(body: Any) -> bytes:
    """A body as it leaves: texts are sent as UTF-8."""
    return body.encode() if isinstance(body, str) else bytes(body or b"")


def _never_left(error: BaseException) -> bool:
    """Whether the connection was not there yet when this was raised."""
    if not isinstance(error, Exception):
        return False
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"ConnectTimeout", "ProxyError", "InvalidURL", "InvalidSchema", "InvalidHeader"}:
        return True
    cause = error.args[0] if error.args else None
    reasons = {kind.__name__ for kind in type(getattr(cause, "reason", None)).__mro__}
    return bool(reasons & {"NewConnectionError", "ConnectTimeoutError", "NameResolutionError", "ProxyError"})


# ---------------------------------------------------------------- the answer


class _Reader(io.BufferedIOBase):
    """An answer's `raw`; whatever is read of it, the tap sees first."""

    def __init__(self, inner: Any, tap: Tap, status: int) -> None:
        self._inner = inner
        self._tap = tap
        self._status = status
        self._headers = _raw_headers(inner.headers)
        self._decoded: bool | None = None  # whether the tap was told that what it sees is decoded
        self._ready = bytearray()  # seen, and not given out yet
        self._begin(decoded=True)

    def __getattr__(self, name: str) -> Any:
        if name in ("_inner", "_tap"):
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __del__(self) -> None:
        self._tap.forgotten()

    # -- as requests reads it

    def stream(self, amt: int | None = 2**16, decode_content: bool | None = None) -> Iterator[bytes]:
        """The rest in chunks, as they come."""
        self._begin(decoded=self._decodes(decode_content))
        tap = self._tap
        if self._ready:
            yield self._taken(-1)
        try:
            for chunk in self._inner.stream(amt, decode_content=decode_content):
                if data := tap.chunk(chunk):
                    yield data
            if data := tap.rest():
                yield data
        except GeneratorExit:
            # Whoever stops in between closes the answer, or drops it: both are told below. This may be a finalizer.
            raise
        except BaseException as error:
            tap.failed(error)
            raise
        tap.ended()

    def close(self) -> None:
        self._tap.broken_off()
        self._inner.close()

    # -- as an app reads it

    def read(self, amt: int | None = None, decode_content: bool | None = None, cache_content: bool = False) -> bytes:
        return self._read("read", amt, decode_content)

    def read1(self, amt: int | None = None, decode_content: bool | None = None) -> bytes:
        return self._read("read1", amt, decode_content)

    def read_chunked(self, amt: int | None = None, decode_content: bool | None = None) -> Iterator[bytes]:
        return self.stream(amt, decode_content)

    @property
    def data(self) -> bytes:
        return self.read()

    def __iter__(self) -> Iterator[bytes]:
        rest = b""
        for chunk in self.stream(decode_content=True):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from [line + b"\n" for line in lines]
        if rest:
            yield rest

    @property
    def closed(self) -> bool:
        return not self._ready and bool(self._inner.closed)

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._inner.tell())

    def fileno(self) -> int:
        return int(self._inner.fileno())

    # -- what the tap is told

    def _read(self, how: str, amt: int | None, decode_content: bool | None) -> bytes:
        """What the inner one gives, without a usage that only we asked for: so one read may take several."""
        self._begin(decoded=self._decodes(decode_content))
        size = -1 if amt is None or amt < 0 else amt
        whole = how == "read" and size < 0
        over = False
        while size and not over and (whole or not self._ready):
            try:
                data = getattr(self._inner, how)(None if size < 0 else size, decode_content=decode_content)
            except BaseException as error:
                self._tap.failed(error)
                raise
            self._ready += self._tap.chunk(data) if data else b""
            over = whole or not data
        if over or self._nothing_left():
            self._ready += self._tap.rest()
            self._tap.ended()
        return self._taken(size)

    def _nothing_left(self) -> bool:
        """Whether a reader who knows the length may stop here. Of a compressed answer more may wait in its decoder."""
        plain = all(name.lower() != b"content-encoding" for name, _ in self._headers)
        return plain and getattr(self._inner, "length_remaining", None) == 0

    def _taken(self, size: int) -> bytes:
        size = len(self._ready) if size < 0 else size
        data = bytes(self._ready[:size])
        del self._ready[:size]
        return data

    def _decodes(self, decode_content: bool | None) -> bool:
        return bool(self._inner.decode_content if decode_content is None else decode_content)

    def _begin(self, *, decoded: bool) -> None:
        """Tell the tap that the answer begins; once more if an app reads it otherwise than requests itself does."""
        if self._decoded is None or (self._decoded != decoded and self._inner.tell() == 0):
            self._decoded = decoded
            self._tap.head(self._status, self._headers, decoded=decoded)
