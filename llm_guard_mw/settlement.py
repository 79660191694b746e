"""How an exchange ends: what it used, on what basis, what that costs, and what its event says.

The basis decides what may be given back (docs/explanation/accounting.md):

    exact     the provider's own numbers, or an error status without any (nothing was billed)
    counted   the text that was seen, with a margin: only if the answer ended, or we cancelled the upstream
              ourselves, and the model writes nothing that the caller cannot see
    held      everything else: the hold is booked as it stands
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import msgspec
from msgspec.structs import replace as amended

from llm_guard_mw.call import Call, Exchange, Record
from llm_guard_mw.estimate import count_text
from llm_guard_mw.model import Basis, Cost, EntryKind, Kind, Line, Reading, Unit, Usage, UsageEvent
from llm_guard_mw.pricing import PriceBook
from llm_guard_mw.reservation import Plan
from llm_guard_mw.stores.journal import encode_event
from llm_guard_mw.stores.protocol import LATE_SETTLE_MS, Moved, Settlement

#: How the bytes of an exchange ended. complete: the answer was read to its end · cut: the app stopped reading
#: (which cancels the upstream) · error: the connection was lost · not_sent: the bytes never left.
Ending = Literal["complete", "cut", "error", "not_sent"]


class Closing(msgspec.Struct, frozen=True, gc=False):
    """A settlement for the store, and the event it records."""

    settlement: Settlement
    event: UsageEvent


class _Verdict(msgspec.Struct, frozen=True, gc=False):
    basis: Basis
    usage: Usage | None
    cost: Cost


def close(
    exchange: Exchange, prices: PriceBook, reading: Reading | None, *, status: int | None, ending: Ending
) -> Closing:
    """The end of an exchange whose bytes have left, or were about to."""
    if ending == "not_sent":
        return release(exchange, error_type="not_sent")
    verdict = _verdict(exchange, prices, reading, status, ending)
    failed = (status is not None and status >= 400) or ending == "error" or bool(reading and reading.error)
    error_type = _error_type(reading, status, ending)
    return _closing(exchange, verdict, status=status, success=not failed, error_type=error_type)


def close_recorded(exchange: Exchange, prices: PriceBook, records: Sequence[Record], *, status: int | None) -> Closing:
    """Exchange 0 of a call whose app reported the usage itself: the sum of what it reported, each at its price."""
    usage = sum_usages(record.usage for record in records)
    costs = [_cost_of_record(exchange, prices, record) for record in records]
    nanos = [cost.nanos for cost in costs if cost.nanos is not None]
    flagged = next((cost.flagged for cost in costs if cost.flagged), None)
    cost = Cost(sum(nanos) if len(nanos) == len(costs) else None, costs[0].price_version, flagged)
    return _closing(exchange, _Verdict(Basis.EXACT, usage, cost), status=status, success=True, error_type=None)


def _cost_of_record(exchange: Exchange, prices: PriceBook, record: Record) -> Cost:
    model = record.usage.model or exchange.asked.model
    return prices.cost(record.provider or exchange.provider, model, record.usage, requested_model=exchange.asked.model)


def close_charge(exchange: Exchange) -> Closing:
    """A charge is settled as it was reserved."""
    verdict = _Verdict(Basis.EXACT, None, Cost(0, exchange.rates.price_version))
    return _closing(exchange, verdict, status=None, success=True, error_type=None)


def release(exchange: Exchange, *, error_type: str | None = None, status: int | None = None) -> Closing:
    """Nothing was sent: the hold goes back, the requests that were spent stay spent."""
    verdict = _Verdict(Basis.EXACT, None, Cost(0, exchange.rates.price_version))
    return _closing(
        exchange,
        verdict,
        status=status,
        success=error_type is None,
        error_type=error_type,
        kind=EntryKind.RELEASE,
    )


def book_held(exchange: Exchange, *, status: int | None, error_type: str | None) -> Closing:
    """Nobody can say what happened: the hold is booked."""
    return _closing(exchange, _held(exchange), status=status, success=False, error_type=error_type)


def sum_usages(usages: Iterable[Usage]) -> Usage:
    """One Usage of many; what none of them said stays None. The model is the last one named."""
    total = Usage()
    for usage in usages:
        parts = dict(total.parts)
        for name, count in usage.parts.items():
            parts[name] = parts.get(name, 0) + count
        total = Usage(
            input_tokens=_plus(total.input_tokens, usage.input_tokens),
            output_tokens=_plus(total.output_tokens, usage.output_tokens),
            cached_input_tokens=_plus(total.cached_input_tokens, usage.cached_input_tokens),
            cache_write_tokens=_plus(total.cache_write_tokens, usage.cache_write_tokens),
            reasoning_tokens=_plus(total.reasoning_tokens, usage.reasoning_tokens),
            audio_input_tokens=_plus(total.audio_input_tokens, usage.audio_input_tokens),
            audio_output_tokens=_plus(total.audio_output_tokens, usage.audio_output_tokens),
            model=usage.model or total.model,
            exact=total.exact and usage.exact,
            parts=parts,
        )
    return total


def _plus(a: int | None, b: int | None) -> int | None:
    return a if b is None else b if a is None else a + b


# ---------------------------------------------------------------- the verdict


def _verdict(
    exchange: Exchange, prices: PriceBook, reading: Reading | None, status: int | None, ending: Ending
) -> _Verdict:
    usage = reading.usage if reading is not None else None
    complete = ending == "complete"
    if reading is not None and reading.free and complete:  # only counted, or a fetch of what was metered before
        return _Verdict(Basis.EXACT, None, Cost(0, exchange.rates.price_version))
    if usage is not None and usage.exact:  # the running counts of a stream that broke off are not
        return _Verdict(Basis.EXACT, usage, _cost(exchange, prices, usage, reading))
    if usage is None and complete and status is not None and status >= 400:
        return _Verdict(Basis.EXACT, None, Cost(0, exchange.rates.price_version))
    if reading is not None and _may_count(exchange, reading, ending):
        counted = _counted(exchange, reading)
        return _Verdict(Basis.COUNTED, counted, _cost(exchange, prices, counted, reading))
    return _held(exchange)


def _may_count(exchange: Exchange, reading: Reading, ending: Ending) -> bool:
    hidden = exchange.rates.hidden_output or exchange.asked.thinks
    if reading.broken or reading.text is None or hidden:
        return False
    return ending == "cut" or (ending == "complete" and reading.ended)


def _counted(exchange: Exchange, reading: Reading) -> Usage:
    """What the text says, never less than what a broken-off stream said itself."""
    said = reading.usage or Usage()
    model = said.model or exchange.asked.model
    output = max(count_text(reading.text or "", model), said.output_tokens or 0)
    input_tokens = said.input_tokens if said.input_tokens is not None else exchange.draft.estimated_input_tokens
    return replace(said, input_tokens=input_tokens, output_tokens=output, exact=False, model=said.model)


def _cost(exchange: Exchange, prices: PriceBook, usage: Usage, reading: Reading | None) -> Cost:
    tier = (reading.service_tier if reading is not None else None) or exchange.asked.service_tier
    return prices.cost(
        exchange.provider,
        usage.model or exchange.asked.model,
        usage,
        service_tier=tier,
        requested_model=exchange.asked.model,
    )


def _held(exchange: Exchange) -> _Verdict:
    draft = exchange.draft
    usage = Usage(input_tokens=None, output_tokens=None, exact=False)
    return _Verdict(Basis.HELD, usage, Cost(held_nanos(exchange), draft.price_version, exchange.rates.flagged))


def held_nanos(exchange: Exchange) -> int | None:
    """The price of the hold: what is booked if nothing better is ever known."""
    rates, draft = exchange.rates, exchange.draft
    if rates.flagged == "unpriced" or (exchange.asked.model is None and exchange.credits is None):
        return None
    fixed = (draft.estimated_input_tokens or 0) * rates.input_nanos + rates.request_nanos
    return fixed + (draft.estimated_output_tokens or 0) * rates.output_nanos


def _error_type(reading: Reading | None, status: int | None, ending: Ending) -> str | None:
    if ending == "error":
        return "connection_lost"
    if status is not None and status >= 400:
        return f"status_{status}"
    if reading is not None and reading.error:
        return "error_in_answer"
    return "cut" if ending == "cut" else None


# ---------------------------------------------------------------- the closing


def _closing(
    exchange: Exchange,
    verdict: _Verdict,
    *,
    status: int | None,
    success: bool,
    error_type: str | None,
    kind: EntryKind = EntryKind.SETTLE,
) -> Closing:
    now = time.monotonic()
    usage = verdict.usage or Usage(input_tokens=None, output_tokens=None)
    event = amended(
        exchange.draft,
        kind=kind,
        at=time.time_ns() // 1000,
        tags=dict(exchange.call.tags.free),
        model=usage.model or exchange.draft.model,
        **_tokens_of(usage),
        cost_nanos=verdict.cost.nanos,
        price_version=verdict.cost.price_version,
        basis=verdict.basis,
        exact=verdict.basis is Basis.EXACT and usage.exact and verdict.cost.flagged is None,
        duration_ms=round((now - exchange.started) * 1000),
        first_token_ms=(
            None if exchange.first_byte is None else round((exchange.first_byte - exchange.started) * 1000)
        ),
        status=status,
        success=success,
        error_type=error_type,
        decision=exchange.decision,
        degraded=exchange.degraded,
    )
    released = kind is EntryKind.RELEASE
    moved = tuple([Moved(line, _actual(line, verdict, usage, exchange, released)) for line in exchange.granted.lines])
    payload = encode_event(event, held_nanos=held_nanos(exchange), held_credits=exchange.credits)
    settlement = Settlement(exchange.id, exchange.call.id, kind, exchange.lease_end, moved, payload)
    return Closing(settlement, event)


def _tokens_of(usage: Usage) -> dict[str, int | None]:
    """The fields that an event and a usage have in common."""
    return {
        "input_tokens": usage.input_tokens,
        "cached_input_tokens": usage.cached_input_tokens,
        "cache_write_tokens": usage.cache_write_tokens,
        "output_tokens": usage.output_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "audio_input_tokens": usage.audio_input_tokens,
        "audio_output_tokens": usage.audio_output_tokens,
    }


def _actual(line: Line, verdict: _Verdict, usage: Usage, exchange: Exchange, released: bool) -> int:
    """What really went, in the line's unit. Requests stay spent; what nobody said is booked as held."""
    if line.spent:
        return line.amount
    if released:
        return 0
    if line.unit is Unit.CREDITS:
        return exchange.credits or 0
    if verdict.basis is Basis.HELD:
        return line.amount
    if line.unit is Unit.USD:
        return verdict.cost.nanos or 0
    if verdict.usage is None:  # an error that billed nothing
        return 0
    return _tokens(line, usage)


def _tokens(line: Line, usage: Usage) -> int:
    if line.unit is Unit.INPUT_TOKENS:
        return line.amount if usage.input_tokens is None else usage.input_tokens
    if line.unit is Unit.OUTPUT_TOKENS:
        return usage.output_tokens or 0
    if usage.input_tokens is None and usage.output_tokens is None:
        return line.amount
    return (usage.input_tokens or 0) + (usage.output_tokens or 0)


def undo(exchange_id: str, call: Call, draft: UsageEvent) -> Closing:
    """Give back whatever a reserve may have been granted whose caller is gone."""
    event = amended(
        draft,
        kind=EntryKind.RELEASE,
        at=time.time_ns() // 1000,
        estimated_output_tokens=None,
        cost_nanos=0,
        basis=Basis.EXACT,
        success=False,
        error_type="cancelled",
    )
    settlement = Settlement(exchange_id, call.id, EntryKind.RELEASE, _never_late(), (), encode_event(event))
    return Closing(settlement, event)


def book(plan: Plan, usage: Usage, cost: Cost) -> Closing:
    """Usage without a hold, heard of after the fact: reserved and settled in one step."""
    draft = plan.draft
    event = amended(
        draft,
        model=usage.model or draft.model,
        **_tokens_of(usage),
        estimated_input_tokens=None,
        estimated_output_tokens=None,
        cost_nanos=cost.nanos,
        price_version=cost.price_version,
        basis=Basis.EXACT,
        exact=usage.exact and cost.flagged is None,
        success=True,
    )
    moved = []
    for demand in plan.wish.offers[0].demands:
        if demand.kind is Kind.CONCURRENT:
            continue
        start = demand.windows[0].start if demand.windows else 0
        line = Line(demand.balance, demand.kind, demand.unit, start, 0, demand.spent_at_reserve)
        moved.append(Moved(line, _booked(line, usage, cost)))
    settlement = Settlement(
        plan.wish.exchange,
        plan.call.id,
        EntryKind.SETTLE,
        _never_late(),
        tuple(moved),
        encode_event(event),
        fresh=True,
    )
    return Closing(settlement, event)


def _booked(line: Line, usage: Usage, cost: Cost) -> int:
    if line.unit is Unit.REQUESTS:
        return 1
    return cost.nanos or 0 if line.unit is Unit.USD else _tokens(line, usage)


def _never_late() -> int:
    """A lease end for what has none: as far off as a settlement may be tried again."""
    return time.time_ns() // 1_000_000 + LATE_SETTLE_MS
