"""HTTP facts in, answers out: what the core sees of a request, and what a refused caller is told.

No framework and no I/O. The doors make an `HttpRequest` of what their server gives them and send an `Answer` as
it is; capture hands the very same `Answer` to an SDK as the provider's response.

Rule 1: a refusal speaks the caller's language. Where the route has the shape of a provider, the body is that
provider's error, so that its SDK raises its own RateLimitError; everywhere else it is RFC 9457.
Rule 2: a refusal is retried only where a few seconds help. Everything else says `x-should-retry: false`, since
an SDK that sleeps for a budget to come back keeps a worker of the app asleep with it.
Rule 3: whatever becomes a header value passes `header_value` first: ids and names may be any Unicode.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec
import orjson

from llm_guard_mw.arithmetic import utc
from llm_guard_mw.errors import IdentityError, StoreUnavailable
from llm_guard_mw.model import Decision, Refusal, Shortfall, Unit

Headers = tuple[tuple[bytes, bytes], ...]

#: Waiting this long is worth an SDK's retry; openai and anthropic would sleep for up to 60 s otherwise.
PATIENCE_SECONDS = 5

#: The largest Integer of RFC 9651.
STRUCTURED_INTEGER_MAX = 999_999_999_999_999

NANOS_PER_MICRO = 1000

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class HttpRequest:
    """A request as the core sees it.

    `headers` have lower-cased names, in the order they came. `path` is what is left below the app's root path.
    `peer` is what the server says of the other end of the connection: None for a Unix socket, port 0 where the
    server itself replaced the address (`identity` does not believe those). A door that is told no port says -1.
    `surroundings` is the live ASGI scope or WSGI environ, not a copy: an app that authenticates its callers
    itself writes there who they are.
    """

    __slots__ = ("_first", "body", "body_complete", "headers", "method", "path", "peer", "query", "surroundings")

    def __init__(
        self,
        method: str,
        path: str,
        query: bytes = b"",
        headers: Headers = (),
        peer: tuple[str, int] | None = None,
        body: bytes = b"",
        body_complete: bool = True,
        surroundings: Mapping[str, Any] = _NOTHING,
    ) -> None:
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers
        self.peer = peer
        self.body = body
        self.body_complete = body_complete
        self.surroundings = surroundings
        self._first = dict(reversed(headers))  # a dozen look-ups follow

    def __repr__(self) -> str:
        """Without the caller's credential and words, which stand in all the other fields."""
        return f"HttpRequest({self.method!r}, {self.path!r}, peer={self.peer!r})"

    def header(self, name: bytes) -> bytes | None:
        """The value of a header, or None. Of several the first: who must not be fooled asks `header_values`."""
        return self._first.get(name)

    def header_values(self, name: bytes) -> tuple[bytes, ...]:
        """All values of a header, in the order they came."""
        if name not in self._first:
            return ()
        return tuple([value for candidate, value in self.headers if candidate == name])


class Answer(msgspec.Struct, frozen=True, gc=False):
    """A complete response, ready to be sent through any door or handed to an SDK."""

    status: int
    headers: Headers
    body: bytes


# ---------------------------------------------------------------- refusals


def refusal_answer(refusal: Refusal, *, headers: Headers = ()) -> Answer:
    """The response to a refused request: 429, or 401 where the identity stayed unknown.

    `headers` are added as they are, for instance those of `ratelimit_headers`.
    """
    if refusal.shortfalls:
        return _answer(_told_of_shortfalls(refusal), refusal.api, headers)
    code = refusal.code or ("unauthenticated" if refusal.status == 401 else "rate_limited")
    return _answer(_Told(refusal.status, code, describe_refusal(refusal), refusal.call_id), refusal.api, headers)


def identity_answer(error: IdentityError, *, api: str | None = None, call_id: str = "") -> Answer:
    """The response to a caller who is not known: 401, or 503 while the keys to judge by are still on their way."""
    if error.retry_after_seconds is not None:
        return _answer(
            _Told(503, "identity_unavailable", str(error), call_id, retry_after=error.retry_after_seconds), api
        )
    return _answer(_Told(401, "unauthenticated", str(error), call_id), api)


def unavailable_answer(error: StoreUnavailable, *, api: str | None = None, call_id: str = "") -> Answer:
    """The response while the store is away and `on_store_failure` says deny: 503 with Retry-After.

    The error's own text stays in the log: it may name hosts.
    """
    message = "Usage limits cannot be checked right now, so this request is not served. Try again shortly."
    return _answer(
        _Told(503, "store_unavailable", message, call_id, retry_after=max(1, error.retry_after_seconds)), api
    )


def describe_refusal(refusal: Refusal) -> str:
    """The refusal in a sentence: which limit, how much of it is left, when it comes back."""
    if refusal.message:
        return refusal.message
    if not refusal.shortfalls:
        return _NOBODY if refusal.status == 401 else "This request is refused."
    ranked = _ranked(refusal)
    deciding, others = ranked[0], ranked[1:]
    sentences = [_sentence(deciding, refusal.at)]
    if others:
        sentences.append("Also in the way: " + ", ".join(f'"{shortfall.limit}"' for shortfall in others) + ".")
    return " ".join(sentences)


@dataclass(frozen=True, slots=True)
class _Told:
    """What a caller is told, before it takes a provider's shape."""

    status: int
    code: str
    message: str
    call_id: str = ""
    limit: str | None = None
    reset_at: str | None = None
    retry_after: int | None = None
    policies: tuple[str, ...] = ()

    @property
    def worth_a_retry(self) -> bool:
        return self.retry_after is not None and self.retry_after <= PATIENCE_SECONDS

    @property
    def extras(self) -> dict[str, Any]:
        """The fields of ours that stand in every shape."""
        return {"reset_at": self.reset_at, "limit": self.limit, "violated-policies": self.policies}


_NOBODY = "This request needs an identity, and none of the configured sources gives one."


def _told_of_shortfalls(refusal: Refusal) -> _Told:
    deciding = _ranked(refusal)[0]
    wait_ms = _wait_ms(deciding, refusal.at)
    resets = _reset_at(deciding)
    return _Told(
        status=refusal.status,
        code=refusal.code or deciding.code,
        message=describe_refusal(refusal),
        call_id=refusal.call_id,
        limit=_encodable(deciding.limit),
        reset_at=rfc3339(resets) if resets is not None else None,
        retry_after=None if wait_ms is None else _whole_seconds(wait_ms),
        policies=tuple(_encodable(shortfall.name) for shortfall in refusal.shortfalls),
    )


def _ranked(refusal: Refusal) -> list[Shortfall]:
    """The shortfalls, the one that decides first: what never passes, then the longest wait."""

    def weight(shortfall: Shortfall) -> tuple[bool, float]:
        wait_ms = _wait_ms(shortfall, refusal.at)
        return shortfall.code == "never_fits", float("inf") if wait_ms is None else wait_ms

    return sorted(refusal.shortfalls, key=weight, reverse=True)


def _wait_ms(shortfall: Shortfall, now: int) -> int | None:
    """How long until the same request is worth another attempt; None: waiting does not help."""
    if shortfall.code == "never_fits":
        return None
    if shortfall.by_holds or shortfall.code == "concurrency":
        # Somebody else's call is in the way. When it ends is not known, only that it is soon.
        return 1000
    if shortfall.wait_ms is not None:
        return shortfall.wait_ms
    resets = _reset_at(shortfall)
    return None if resets is None else max(0, resets - now)


def _reset_at(shortfall: Shortfall) -> int | None:
    """When the window ends, where that helps. A claim that never fits is told no time: it would invite a retry."""
    if shortfall.code == "never_fits" or shortfall.reset_at is None or shortfall.reset_at >= _END_OF_CALENDAR:
        return None
    return shortfall.reset_at


#: The year 10000, in ms: no RFC 3339 beyond it, and whatever "resets" there never does.
_END_OF_CALENDAR = 253_402_300_800_000


def _sentence(shortfall: Shortfall, now: int) -> str:
    limit = f'The limit "{shortfall.limit}"'
    unit = unit_of(shortfall.limit)
    left, ceiling = amount_text(unit, shortfall.left), amount_text(unit, shortfall.ceiling)
    wait_ms = _wait_ms(shortfall, now)
    if shortfall.code == "never_fits":
        return f"{limit} can never grant a request of this size: it holds {ceiling} at most. Waiting does not help."
    if shortfall.code == "concurrency":
        return f"{limit} is reached: {left} left of {ceiling}. Try again when one of them has ended."
    if shortfall.by_holds:
        return f"{limit} is held by calls that are still running: {left} left of {ceiling}. Try again in a second."
    if shortfall.code == "rate_limited":
        again = f" Try again in {_whole_seconds(wait_ms)} s." if wait_ms is not None else ""
        return f"{limit} is reached: {left} left of {ceiling}.{again}"
    resets = _reset_at(shortfall)
    ends = f"It resets at {rfc3339(resets)}." if resets is not None else "It does not reset."
    return f"{limit} does not cover this request: {left} left of {ceiling}. {ends}"


def _whole_seconds(wait_ms: int) -> int:
    """Rounded up, and never 0: a retry that comes too early is refused again."""
    return max(1, -(-wait_ms // 1000))


def _answer(told: _Told, api: str | None, more: Headers = ()) -> Answer:
    shape = _SHAPES.get((api or "").partition(".")[0], _problem)
    content_type, document = shape(told)
    body = orjson.dumps(document)
    headers = [
        (b"content-type", content_type),
        (b"content-length", b"%d" % len(body)),
        *guard_headers(call_id=told.call_id, decision="reject"),
    ]
    if told.status == 401:
        # RFC 9110 asks for a challenge; Bearer is the one that makes no browser open a dialog.
        headers.append((b"www-authenticate", b"Bearer"))
    if told.retry_after is not None:
        headers.append((b"retry-after", b"%d" % told.retry_after))
    if not told.worth_a_retry:
        headers.append((b"x-should-retry", b"false"))
    return Answer(told.status, (*headers, *more), body)


# ---------------------------------------------------------------- shapes


def _openai(told: _Told) -> tuple[bytes, dict[str, Any]]:
    # Clients take `insufficient_quota` for what no retry can help, so what never fits is told under it as well.
    types = {401: "invalid_request_error", 503: "server_error"}
    rates = told.code in ("rate_limited", "concurrency")
    kind = types.get(told.status, "rate_limit_exceeded" if rates else "insufficient_quota")
    error = {"message": _encodable(told.message), "type": kind, "param": None, "code": told.code, **told.extras}
    return b"application/json", {"error": error}


def _anthropic(told: _Told) -> tuple[bytes, dict[str, Any]]:
    kind = {401: "authentication_error", 503: "overloaded_error"}.get(told.status, "rate_limit_error")
    error = {"type": kind, "message": _encodable(told.message), "code": told.code, **told.extras}
    return b"application/json", {"type": "error", "error": error, "request_id": _encodable(told.call_id) or None}


def _gemini(told: _Told) -> tuple[bytes, dict[str, Any]]:
    # Google's own `code` is the HTTP status, and typed clients read it as an integer: ours is called `reason`.
    status = {401: "UNAUTHENTICATED", 503: "UNAVAILABLE"}.get(told.status, "RESOURCE_EXHAUSTED")
    facts = {"code": told.code, "limit": told.limit, "reset_at": told.reset_at}
    details: list[dict[str, Any]] = [
        {
            "@type": "type.googleapis.com/google.rpc.ErrorInfo",
            "reason": told.code.upper(),
            "domain": "llm_guard_mw",
            "metadata": {name: value for name, value in facts.items() if value is not None},
        }
    ]
    if told.retry_after is not None:
        details.append(
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{told.retry_after}s"},
        )
    error = {
        "code": told.status,
        "message": _encodable(told.message),
        "status": status,
        "reason": told.code,
        "details": details,
        **told.extras,
    }
    return b"application/json", {"error": error}


def _problem(told: _Told) -> tuple[bytes, dict[str, Any]]:
    kind, title = {
        401: ("about:blank", "Unauthorized"),
        503: ("https://iana.org/assignments/http-problem-types#temporary-reduced-capacity", "Service unavailable"),
    }.get(told.status, ("https://iana.org/assignments/http-problem-types#quota-exceeded", "Quota exceeded"))
    document = {"type": kind, "title": title, "status": told.status, "detail": _encodable(told.message)}
    return b"application/problem+json", {**document, "code": told.code, **told.extras}


_SHAPES: dict[str, Callable[[_Told], tuple[bytes, dict[str, Any]]]] = {
    "openai": _openai,
    "anthropic": _anthropic,
    "gemini": _gemini,
}


# ---------------------------------------------------------------- headers of ours


def guard_headers(
    *, call_id: str, decision: Decision, model: str | None = None, cost_nanos: int | None = None
) -> Headers:
    """`X-LLM-Guard-*`: what was known when the headers went."""
    headers = []
    if call_id:
        headers.append((b"x-llm-guard-request-id", header_value(call_id)))
    told = decision.encode()
    if decision == "degrade" and model is not None:
        told += b";model=" + quote(model, safe="!#$&*+-.^_`|~:/@", errors="replace").encode()
    headers.append((b"x-llm-guard-decision", told))
    if cost_nanos is not None:
        headers.append((b"x-llm-guard-cost", _decimal_dollars(cost_nanos).encode()))
    return tuple(headers)


class Quota(NamedTuple):
    """One limit as the RateLimit fields tell it: amounts in the limit's unit, nano-dollars for money."""

    name: str
    unit: Unit
    quota: int
    window_seconds: int | None  # None: no window (totals, concurrency)
    remaining: int
    reset_seconds: float | None  # until there is more again; None: not known, or never


def ratelimit_headers(quotas: Iterable[Quota]) -> Headers:
    """`RateLimit-Policy` and `RateLimit` of the current IETF draft; nothing where there is no quota.

    Only requests and concurrent requests are registered units. Money goes as integer micro-dollars, tokens and
    credits as they are, each with a parameter of ours that names the unit.
    """
    policies, states = [], []
    for name, unit, quota, window_seconds, remaining, reset_seconds in quotas:
        state = f"{_structured_string(name)};r={_structured_integer(unit, remaining)}"
        if reset_seconds is not None:
            state += f";t={max(0, -int(-reset_seconds // 1))}"
        policies.append((name, unit, quota, window_seconds))
        states.append(state)
    if not policies:
        return ()
    return (
        (b"ratelimit-policy", _policies(tuple(policies))),
        (b"ratelimit", ", ".join(states).encode("ascii")),
    )


@lru_cache(maxsize=1024)  # the limits of a route: the same at every response
def _policies(policies: tuple[tuple[str, Unit, int, int | None], ...]) -> bytes:
    told = []
    for name, unit, quota, window_seconds in policies:
        policy = f"{_structured_string(name)};q={_structured_integer(unit, quota)}{_UNIT_PARAMETERS[unit]}"
        told.append(f"{policy};w={window_seconds}" if window_seconds else policy)
    return ", ".join(told).encode("ascii")


_UNIT_PARAMETERS = {
    Unit.REQUESTS: "",
    Unit.CONCURRENT: ';qu="concurrent-requests"',
    Unit.USD: ';llm-guard-unit="micro-usd"',
    Unit.TOKENS: ';llm-guard-unit="tokens"',
    Unit.INPUT_TOKENS: ';llm-guard-unit="input-tokens"',
    Unit.OUTPUT_TOKENS: ';llm-guard-unit="output-tokens"',
    Unit.CREDITS: ';llm-guard-unit="credits"',
}


@lru_cache(maxsize=1024)  # the names are those of the limits: few, and the same at every response
def _structured_string(text: str) -> str:
    printable = header_value(text).decode("ascii").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{printable}"'


def _structured_integer(unit: Unit, amount: int) -> int:
    whole = amount // NANOS_PER_MICRO if unit is Unit.USD else amount
    return min(max(0, whole), STRUCTURED_INTEGER_MAX)


# ---------------------------------------------------------------- values as text


def header_value(text: str) -> bytes:
    """Any text as a header value: printable ASCII stays, everything else and `%` is percent-encoded UTF-8.

    So no line break can end the header, no server stumbles over a byte it does not know, and two different
    texts never look the same.
    """
    if _PLAIN.fullmatch(text):
        return text.encode("ascii")
    return quote(text, safe=_PRINTABLE, errors="surrogatepass").encode("ascii")


_PRINTABLE = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) != "%")
_PLAIN = re.compile(r"[!-$&-~]*")


def rfc3339(at_ms: int) -> str:
    """Milliseconds since the epoch as RFC 3339 in UTC: 2026-12-01T00:00:00Z."""
    moment = utc(at_ms)
    return moment.isoformat(timespec="milliseconds" if at_ms % 1000 else "seconds").replace("+00:00", "Z")


def unit_of(notation: str) -> Unit:
    """The unit that a limit counts, read off its notation: "$2/day per user", "40k input tokens/minute per key"."""
    if notation.startswith("$"):
        return Unit.USD
    words = notation.partition("/")[0].split()[1:]
    for unit in (Unit.INPUT_TOKENS, Unit.OUTPUT_TOKENS):
        if words[:2] == unit.value.split("_"):
            return unit
    word = words[0] if words else ""
    named = {unit.value: unit for unit in (Unit.TOKENS, Unit.CREDITS, Unit.CONCURRENT)}
    return named.get(word, Unit.REQUESTS)


def amount_text(unit: Unit, amount: int) -> str:
    """An amount as a person says it: $1.25, 12,000 tokens, 3 requests."""
    if unit is Unit.USD:
        return dollars(amount)
    noun = _NOUNS[unit]
    return f"{amount:,} {noun.removesuffix('s') if amount == 1 else noun}"


_NOUNS = {
    Unit.TOKENS: "tokens",
    Unit.INPUT_TOKENS: "input tokens",
    Unit.OUTPUT_TOKENS: "output tokens",
    Unit.CREDITS: "credits",
    Unit.REQUESTS: "requests",
    Unit.CONCURRENT: "concurrent calls",
}


def dollars(nanos: int) -> str:
    """Nano-dollars for people: at least cents, more digits only below a dollar, and never rounded up."""
    if nanos >= 1_000_000_000:
        cents = nanos // 10_000_000
        return f"${cents // 100:,}.{cents % 100:02}"
    return f"${_decimal_dollars(nanos)}"


def _decimal_dollars(nanos: int) -> str:
    """Exact, with at least two decimals: 0.00, 0.000042, 12.50."""
    sign, nanos = ("-", -nanos) if nanos < 0 else ("", nanos)
    fraction = f"{nanos % 1_000_000_000:09}".rstrip("0").ljust(2, "0")
    return f"{sign}{nanos // 1_000_000_000}.{fraction}"


def _encodable(text: str) -> str:
    """Text that JSON can carry: a lone surrogate becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


# ---------------------------------------------------------------- header lists


def strip(headers: Iterable[tuple[bytes, bytes]], names: Collection[bytes]) -> Headers:
    """The headers without those of these (lower-case) names."""
    return tuple((name, value) for name, value in headers if name.lower() not in names)


def replace(headers: Iterable[tuple[bytes, bytes]], name: bytes, value: bytes) -> Headers:
    """The headers with exactly one of this (lower-case) name."""
    return (*strip(headers, (name,)), (name, value))


#: What speaks of the very bytes of a body, and is a lie once it was rewritten.
_BODY_FACTS = frozenset(
    {b"content-length", b"transfer-encoding", b"content-digest", b"repr-digest", b"digest", b"content-md5"}
)


def with_body_length(headers: Iterable[tuple[bytes, bytes]], length: int) -> Headers:
    """The headers for a body that was rewritten: its new length, and no digest of the old one."""
    return replace(strip(headers, _BODY_FACTS), b"content-length", b"%d" % length)
