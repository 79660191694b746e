"""One captured conversation with a provider, without I/O: what all client libraries share.

    asked_by    is this a request that counts, and what does it ask for?
    begin       hold its price: a Tap, or the Answer of a refusal, or None (nothing guards it)
    Tap         rewrites the request, watches the answer pass, and settles once

Rule 1. Before the grant nothing leaves: a refusal is answered here, in the provider's own shape, so that the SDK
        raises its own error after one attempt.
Rule 2. After the grant the app's call comes first: nothing of ours raises into it, and no chunk waits.
Rule 3. Settling never waits either: it is handed to the store. So a cancelled task settles like any other.
Rule 4. A finalizer may run in the middle of anything, with any lock held. What it has to say goes through a queue
        that may be used there, to a thread that has the time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from queue import SimpleQueue

import msgspec

from llm_guard_mw.call import Exchange
from llm_guard_mw.capture.unasked import UnaskedUsage
from llm_guard_mw.desk import Desk, Unguarded
from llm_guard_mw.errors import IdentityError, StoreUnavailable
from llm_guard_mw.estimate import describe, rewrite
from llm_guard_mw.http import (
    Answer,
    Headers,
    identity_answer,
    refusal_answer,
    strip,
    unavailable_answer,
    with_body_length,
)
from llm_guard_mw.logs import log
from llm_guard_mw.metering import Meter, count_headers, identify_api
from llm_guard_mw.model import Asked, Reading, Refusal
from llm_guard_mw.process import AsyncGuard, Guard
from llm_guard_mw.settlement import Ending


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A request on its way out: `target` is the path with its query, header names are as the library has them."""

    method: str
    host: str
    target: str = field(repr=False)  # Google takes a key in the query
    headers: Headers = field(repr=False)
    body: bytes = field(repr=False)


def concerns(method: str, host: str, target: str, *, loaded: bool) -> bool:
    """Whether a request may count, told without its body.

    A body that is not in memory yet (`loaded`) may be a large file, and is read only if its endpoint costs something.
    """
    if method.upper() != "POST":
        return False
    api, provider = _identified(method, host, target)
    if api is None or loaded:
        return api is not None
    return describe(api, provider, method, target, b"").counted


#: A client sends to a few endpoints again and again.
_identified = lru_cache(maxsize=256)(identify_api)


def asked_by(outgoing: Outgoing) -> Asked | None:
    """What the request asks for; None if it is not an AI call we know, or one that costs nothing."""
    api, provider = identify_api(outgoing.method, outgoing.host, outgoing.target, outgoing.body)
    if api is None:
        return None
    encoding = _header(outgoing.headers, b"content-encoding")
    asked = describe(api, provider, outgoing.method, outgoing.target, outgoing.body, content_encoding=encoding)
    return asked if asked.counted else None


def begin(asked: Asked, outgoing: Outgoing) -> Tap | Answer | None:
    """Hold what the request may cost. Raises ConfigError if nothing guards this process."""
    guard = Guard()
    try:
        outcome = guard.begin(asked)
    except Exception as error:
        return _not_begun(guard.desk, asked, error)
    return _begun(guard.desk, asked, outgoing, outcome)


async def abegin(asked: Asked, outgoing: Outgoing) -> Tap | Answer | None:
    """The async twin of `begin`."""
    guard = AsyncGuard()
    try:
        outcome = await guard.begin(asked)
    except Exception as error:
        return _not_begun(guard.desk, asked, error)
    return _begun(guard.desk, asked, outgoing, outcome)


def _begun(
    desk: Desk, asked: Asked, outgoing: Outgoing, outcome: Exchange | Refusal | Unguarded
) -> Tap | Answer | None:
    if isinstance(outcome, Refusal):
        return refusal_answer(outcome if outcome.api else msgspec.structs.replace(outcome, api=asked.api))
    if isinstance(outcome, Unguarded):
        return None
    tap = Tap(desk, outcome)
    if tap.prepared(outgoing):
        return tap
    # Without the cap that was held it could cost more than was held: it does not leave.
    return unavailable_answer(StoreUnavailable("the request could not be rewritten"), api=asked.api)


def _not_begun(desk: Desk, asked: Asked, error: Exception) -> Answer | None:
    if isinstance(error, IdentityError):
        return identity_answer(error, api=asked.api)
    if isinstance(error, StoreUnavailable):
        return unavailable_answer(error, api=asked.api)
    # A bug of ours: the rule for a store that does not answer holds for it as well.
    log.exception("capture_failed", api=asked.api)
    if desk.policy.on_store_failure == "allow":
        return None
    return unavailable_answer(StoreUnavailable("the guard failed before the grant"), api=asked.api)


class Tap:
    """Sits on one granted exchange, from the rewritten request to the end of the answer. Settles exactly once."""

    __slots__ = ("_desk", "_exchange", "_meter", "_outgoing", "_over", "_status", "_unasked")

    def __init__(self, desk: Desk, exchange: Exchange) -> None:
        self._desk = desk
        self._exchange = exchange
        self._meter: Meter | None = None
        self._outgoing: Outgoing | None = None
        self._unasked: UnaskedUsage | None = None
        self._status: int | None = None
        self._over = False

    def prepared(self, outgoing: Outgoing) -> bool:
        """Rewrite the request; False if that fails, and then the exchange is closed as never sent."""
        try:
            self._outgoing = self._rewrite(outgoing)
        except Exception:
            log.exception("rewrite_failed", call_id=self._exchange.call.id, api=self._exchange.api)
            self.unsent()
            return False
        return True

    def rewritten(self, outgoing: Outgoing) -> Outgoing:
        """The request as it was granted: another model, a cap, usage asked for. The same object if none of them."""
        return self._outgoing or self._rewrite(outgoing)

    def _rewrite(self, outgoing: Outgoing) -> Outgoing:
        exchange = self._exchange
        if exchange.model is None and exchange.cap is None and not exchange.ask_usage:
            return outgoing
        target, body = rewrite(
            exchange.api,
            outgoing.target,
            outgoing.body,
            model=exchange.model,
            cap=exchange.cap,
            include_usage=exchange.ask_usage,
            provider=exchange.provider,
        )
        headers = with_body_length(outgoing.headers, len(body))
        if exchange.ask_usage:
            # A chunk can be taken out of a plain stream only.
            headers = (*strip(headers, (b"accept-encoding",)), (b"accept-encoding", b"identity"))
        return replace(outgoing, target=target, headers=headers, body=body)

    # -- the answer

    def head(self, status: int, headers: Headers, *, decoded: bool = False) -> None:
        """The answer begins. `decoded` says that its chunks come without the content encoding of its headers."""
        _listen_for_the_lost()
        exchange = self._exchange
        self._status = status
        encoding = None if decoded else _header(headers, b"content-encoding")
        kind = _header(headers, b"content-type")
        try:
            self._meter = Meter(
                exchange.api,
                provider=exchange.provider,
                content_type=kind,
                content_encoding=encoding,
                status=status,
                headers=count_headers(exchange.api, headers),
                request_model=exchange.model or exchange.asked.model,
                billed=self._desk.billed,
            )
        except Exception:
            log.exception("metering_failed", call_id=exchange.call.id, attempt=exchange.number)
        plain = encoding is None or encoding.strip().lower() == "identity"
        if exchange.ask_usage and plain and (kind or "").lower().startswith("text/event-stream"):
            self._unasked = UnaskedUsage()

    def chunk(self, data: bytes) -> bytes:
        """A chunk passes: what the app is to see of it, which is all of it but a usage that it did not ask for."""
        self._exchange.saw_first_byte()
        if self._meter is not None:
            try:
                self._meter.feed(data)
            except Exception:
                self._broken()
        return data if self._unasked is None else self._unasked.feed(data)

    def rest(self) -> bytes:
        """What `chunk` still holds when the answer has ended."""
        return b"" if self._unasked is None else self._unasked.rest()

    # -- the ways to end; each after the first changes nothing

    def ended(self) -> None:
        """The answer was passed on to its end."""
        self._settle("complete")

    def broken_off(self) -> None:
        """The app reads no more, and the connection is closed: what a stream had not written yet, it never will."""
        self._settle("cut")

    def lost(self) -> None:
        """The connection broke after bytes had left."""
        self._settle("error")

    def unsent(self) -> None:
        """The bytes never left."""
        self._settle("not_sent")

    def failed(self, error: BaseException, unsent: tuple[type[Exception], ...] = ()) -> None:
        """`error` ended it; `unsent` are the errors before which nothing can have been sent."""
        if isinstance(error, unsent):
            self.unsent()
        elif isinstance(error, Exception):
            self.lost()
        else:  # cancelled: the library closes the connection
            self.broken_off()

    def forgotten(self) -> None:
        """The app dropped the answer without a word. For finalizers: takes no lock and runs no code of the guard."""
        if not self._over:
            _lost.put(self)

    def _settle(self, ending: Ending) -> None:
        if self._over:
            return
        self._over = True
        exchange, reading = self._exchange, self._reading()
        try:
            closing = self._desk.finished(exchange, reading, status=self._status, ending=self._ending(ending, reading))
            if closing is not None:
                self._desk.settle_soon(closing)
                self._desk.settled(exchange.call)
        except Exception:
            log.exception("settle_failed", call_id=exchange.call.id, attempt=exchange.number)

    def _ending(self, ending: Ending, reading: Reading | None) -> Ending:
        """What the way it ended means for the books."""
        if self._status is not None and 300 <= self._status < 400:
            return "not_sent"  # sent elsewhere: the request that follows counts
        if self._status is not None and self._status >= 400:
            return "complete"  # an error is one, whether its text was read or not
        if ending == "cut":
            if reading is not None and reading.ended:
                return "complete"  # SDKs stop reading at the protocol's end, before the body's
            if self._status is None or not self._exchange.asked.stream:
                return "error"  # an answer that is not streamed was written, and billed, before its first byte
        return ending

    def _reading(self) -> Reading | None:
        if self._meter is None:
            return None
        try:
            return self._meter.finish()
        except Exception:
            self._broken()
            return None

    def _broken(self) -> None:
        self._meter = None
        log.exception("metering_failed", call_id=self._exchange.call.id, attempt=self._exchange.number)


# ---------------------------------------------------------------- what finalizers leave behind

# SimpleQueue.put may be called from a finalizer that interrupts another put of the same thread.
_lost: SimpleQueue[Tap] = SimpleQueue()
_listener: threading.Thread | None = None


def _listen_for_the_lost() -> None:
    """Start the thread that settles what was dropped, once a process."""
    global _listener
    if _listener is None:
        _listener = threading.Thread(target=_settle_the_lost, name="llm_guard lost streams", daemon=True)
        _listener.start()


def _after_fork() -> None:
    """The thread does not survive a fork, and what was dropped before is the parent's to settle."""
    global _lost, _listener
    _lost, _listener = SimpleQueue(), None


os.register_at_fork(after_in_child=_after_fork)


def _settle_the_lost() -> None:
    while True:
        try:
            _lost.get().broken_off()
        except Exception:  # nobody else would settle the next one
            log.exception("settle_failed")


def _header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in headers if key.lower() == name), None)
