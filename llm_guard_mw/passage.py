"""What a door does with an answer, whatever its kind: ours instead of the app's, our headers beside it, a meter on it.

No I/O and no protocol: the doors know how to send, this knows what.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable

from msgspec.structs import replace

from llm_guard_mw.call import Call
from llm_guard_mw.desk import Desk
from llm_guard_mw.errors import IdentityError, LimitExceeded, StoreUnavailable
from llm_guard_mw.http import (
    Answer,
    Headers,
    Quota,
    guard_headers,
    identity_answer,
    ratelimit_headers,
    refusal_answer,
    unavailable_answer,
)
from llm_guard_mw.logs import log
from llm_guard_mw.metering import BilledResponses, Meter, count_headers
from llm_guard_mw.model import Kind, Refusal
from llm_guard_mw.policy import Route

#: The status that an app gives when its own SDK call failed: behind it our refusal may stand.
FAILED = 500


def answer_to_refusal(call: Call, refusal: Refusal) -> Answer:
    """What a caller hears whose request was refused at the door."""
    return refusal_answer(refusal, headers=ratelimit_headers(_quotas(call)))


def answer_unopened(error: Exception, desk: Desk, route: Route, call_id: str) -> Answer | None:
    """What a caller hears whose call could not be opened; None: it passes unguarded. Ask while handling the error."""
    if isinstance(error, IdentityError):
        _tell_once_about_identity(str(error))
        return identity_answer(error, api=route.api)
    if isinstance(error, StoreUnavailable):
        log.warning("store_away", step="reserve", reason=str(error))
        return unavailable_answer(error, api=route.api, call_id=call_id)
    log.exception("door_failed", route=route.name)
    if desk.lets_pass(route):
        return None
    return unavailable_answer(StoreUnavailable("the guard failed before the grant"), api=route.api, call_id=call_id)


def answer_instead(call: Call, route: Route, error: Exception | None = None) -> Answer | None:
    """What a caller should hear instead of the app's failure, if that came of a refusal of ours."""
    failure = error if isinstance(error, LimitExceeded) else call.failure
    if isinstance(failure, IdentityError):
        return identity_answer(failure, api=route.api, call_id=call.id)
    if isinstance(failure, StoreUnavailable):
        return unavailable_answer(failure, api=route.api, call_id=call.id)
    refusal = failure.refusal if isinstance(failure, LimitExceeded) else call.refusal
    if refusal is None:
        return None
    # The route's own callers get the route's shape, whichever provider the app was talking to.
    return answer_to_refusal(call, replace(refusal, api=route.api))


def our_headers(call: Call) -> Headers:
    """What stands beside the app's own headers: what is known when they go."""
    headers = guard_headers(call_id=call.id, decision=call.decision, cost_nanos=call.cost_nanos)
    return headers + ratelimit_headers(_quotas(call))


def meter_for(
    call: Call, route: Route, status: int, headers: Iterable[tuple[bytes, bytes]], billed: BilledResponses
) -> Meter | None:
    """A meter on the route's own answer; what captures and `record` say comes before what it reads."""
    if call.captures or route.usage == "captured":
        return None
    named = {bytes(name).lower(): bytes(value) for name, value in headers}
    return Meter(
        route.api,
        content_type=_text(named.get(b"content-type")),
        content_encoding=_text(named.get(b"content-encoding")),
        status=status,
        headers=count_headers(route.api, named.items()),
        billed=billed,
    )


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")


def _quotas(call: Call) -> Iterable[Quota]:
    now = time.time_ns() // 1_000_000
    for limit, standing in list(call.standings.values()):  # a thread of the app may capture meanwhile
        ceiling = limit.full
        window = reset = None
        if limit.kind is Kind.BUCKET and limit.period_ms:
            window = max(1, limit.period_ms // 1000)
            reset = standing.spent * limit.period_ms / limit.amount / 1000
        elif limit.kind is Kind.CALENDAR and standing.window_end is not None:
            window = (standing.window_end - standing.window_start) // 1000
            reset = (standing.window_end - now) / 1000
        yield Quota(limit.slug, limit.unit, ceiling, window, ceiling - standing.spent - standing.held, reset)


@functools.cache
def _tell_once_about_identity(reason: str) -> None:
    """The first 401 of its kind is told aloud: whoever has just put the guard in looks for the reason."""
    log.warning("unauthenticated", reason=reason, fix='name a source under [identity], or set anonymous = "ip"')
