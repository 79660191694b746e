"""From what is asked to what is held: the pure half of a reserve.

`plan` turns a request into a wish for the store, `read` turns the store's answer into an Exchange or a Refusal.
Between the two lies the one step that does I/O, which `guard` takes.

Where the input claim comes from: the upper estimate of the body; what the body only refers to claims the
route's `max_input_tokens`, or under `strict` the model's context window. Where the output cap comes from: the
caller, else the route, else the model's maximum (at the door: `default_output_tokens`, since the real request
is still to come).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from llm_guard_mw.arithmetic import Period, next_window, wait_ticks, window_at
from llm_guard_mw.balances import Limit
from llm_guard_mw.call import Call, Exchange
from llm_guard_mw.http import describe_refusal
from llm_guard_mw.model import (
    Asked,
    Demand,
    EntryKind,
    Kind,
    Offer,
    Rates,
    Refusal,
    RefusalCode,
    Shortfall,
    Unit,
    UsageEvent,
    Window,
)
from llm_guard_mw.policy import Policy
from llm_guard_mw.stores.journal import Estimate, encode_draft
from llm_guard_mw.stores.protocol import Granted, Refused, Reserve, Standing

#: A reserve that reaches the store later than this is refused there: its caller has given up.
NOT_AFTER_MS = 2000

#: What a model may write when nobody knows its maximum.
UNKNOWN_MAX_OUTPUT = 16_384

#: Others' holds, or a running call, may be gone in a moment: what `Retry-After` says then.
SOON_MS = 1000


class Claim(msgspec.Struct, frozen=True, gc=False):
    """What one exchange will use at most."""

    asked: Asked
    rates: Rates
    input_tokens: int
    cap: int  # output tokens of one choice
    at_least: int
    cap_is_ours: bool  # the caller named none: it has to be written into the request
    credits: int | None = None
    known: bool = True  # False: at the door of a route that names no model, so that no price can be told

    def per_unit(self, unit: Unit) -> tuple[int, int]:
        """The claim in `unit`: (fixed, per output token of the cap)."""
        choices = self.asked.choices
        if unit is Unit.USD:
            if not self.known:
                return 1, 0  # a spent budget still refuses; the real request brings the real claim
            fixed = self.input_tokens * self.rates.input_nanos + self.rates.request_nanos
            return fixed, self.rates.output_nanos * choices
        if unit is Unit.TOKENS:
            return self.input_tokens, choices
        if unit is Unit.INPUT_TOKENS:
            return self.input_tokens, 0
        if unit is Unit.OUTPUT_TOKENS:
            return 0, choices
        if unit is Unit.CREDITS:
            return self.credits or 0, 0
        return 1, 0


class Terms(msgspec.Struct, frozen=True, gc=False):
    """Which limits count for a call, and the balances they look at: the same for all calls of one caller."""

    limits: tuple[Limit, ...]
    balances: tuple[str, ...]


class Plan(msgspec.Struct, frozen=True):
    """A wish on its way to the store, and what is needed to read the answer."""

    wish: Reserve
    call: Call
    number: int
    claim: Claim
    limits: tuple[Limit, ...]
    draft: UsageEvent
    started: float

    def around(self, at: int) -> Plan:
        """The same wish with calendar windows around the store's time."""
        offers = tuple(
            replace(
                offer,
                demands=tuple(
                    replace(demand, windows=_windows(limit, at)) if demand.windows else demand
                    for limit, demand in zip(self.limits, offer.demands, strict=True)
                ),
            )
            for offer in self.wish.offers
        )
        return replace(self, wish=replace(self.wish, offers=offers, not_after=at + NOT_AFTER_MS))


# ---------------------------------------------------------------- plan


def claim_at_door(policy: Policy, call: Call, asked: Asked, rates: Rates) -> Claim:
    """Exchange 0: the text estimate of the request's body, plus the output cap; never the context window."""
    route = call.route
    input_tokens = asked.input_tokens
    if route is not None and route.max_input_tokens is not None:
        input_tokens = min(input_tokens, route.max_input_tokens)
    cap = asked.cap or (route.max_output_tokens if route is not None else None) or policy.default_output_tokens
    if not asked.output:
        cap = 0
    return Claim(
        asked=asked,
        rates=rates,
        input_tokens=input_tokens,
        cap=cap,
        at_least=_at_least(policy, asked, rates, cap),
        cap_is_ours=False,
        known=asked.model is not None,
    )


def claim_of_request(policy: Policy, call: Call, asked: Asked, rates: Rates) -> Claim:
    """A real request to a provider: its own cap, or one that is written into it."""
    route = call.route
    input_tokens = asked.input_tokens
    if asked.opaque:
        bound = route.max_input_tokens if route is not None else None
        if bound is None and policy.strict:
            bound = rates.context_window
        input_tokens = max(input_tokens, bound or 0)
    ours = route.max_output_tokens if route is not None and asked.cappable else None
    cap = asked.cap or ours or rates.max_output or UNKNOWN_MAX_OUTPUT
    if not asked.output:
        cap = 0
    return Claim(
        asked=asked,
        rates=rates,
        input_tokens=_within_window(input_tokens, asked, rates),
        cap=cap,
        at_least=_at_least(policy, asked, rates, cap),
        cap_is_ours=asked.cap is None and asked.output and asked.cappable,
    )


def claim_of_charge(credits: int, provider: str | None, price_version: str) -> Claim:
    """Credits for an API that is no model's."""
    rates = Rates(None, provider, 0, 0, price_version)
    return Claim(Asked(provider=provider, output=False), rates, 0, 0, 0, cap_is_ours=False, credits=credits)


def _within_window(input_tokens: int, asked: Asked, rates: Rates) -> int:
    """A provider refuses a prompt that is longer than its context window, whatever our estimate says.

    But embeddings and completions take many prompts in one request, and Anthropic's window grows by a header.
    """
    several = not asked.output or asked.api in ("openai.completions", "anthropic.messages")
    return input_tokens if several or rates.context_window is None else min(input_tokens, rates.context_window)


def _at_least(policy: Policy, asked: Asked, rates: Rates, cap: int) -> int:
    """How far the store may lower the cap near the end of a budget.

    Not at all where output is hidden, which would be cut off unseen, nor where no lower cap can be written.
    """
    if rates.hidden_output or asked.thinks or not asked.cappable:
        return cap
    return min(cap, policy.min_output_tokens)


def plan(
    policy: Policy,
    call: Call,
    claim: Claim,
    terms: Terms,
    *,
    number: int,
    takes: str | None = None,
    now_ms: int,
) -> Plan:
    """The wish for one exchange: one offer, with a demand for each limit that this exchange counts against."""
    counted: list[Limit] = []
    demands: list[Demand] = []
    charge = claim.credits is not None
    for limit, balance in zip(terms.limits, terms.balances, strict=True):
        unit = limit.unit
        if unit is Unit.REQUESTS or unit is Unit.CONCURRENT:
            if balance in call.claimed:
                continue
        elif charge is not (unit is Unit.CREDITS):
            continue
        fixed, per_output = claim.per_unit(unit)
        counted.append(limit)
        demands.append(_demand(limit, balance, fixed, per_output, now_ms))
    asked = claim.asked
    draft = _draft(call, claim, number)
    offer = Offer("allow", asked.model, tuple(demands), claim.cap, claim.at_least)
    fixed, per_output = claim.per_unit(Unit.USD)
    estimate = Estimate(
        "allow",
        asked.model,
        claim.input_tokens,
        None if claim.rates.flagged == "unpriced" or not claim.known else fixed,
        per_output,
        claim.rates.price_version,
        asked.choices,
    )
    wish = Reserve(
        exchange=f"{call.id}/{number}",
        call=call.id,
        offers=(offer,),
        lease_ms=policy.lease_seconds * 1000,
        draft=encode_draft(draft, (estimate,)),
        takes=takes,
        not_after=now_ms + NOT_AFTER_MS,
        force=policy.mode == "observe",
    )
    return Plan(wish, call, number, claim, tuple(counted), draft, time.monotonic())


def _demand(limit: Limit, balance: str, fixed: int, per_output: int, now_ms: int) -> Demand:
    kind = limit.kind
    if kind is Kind.BUCKET:
        return Demand(
            balance,
            kind,
            limit.unit,
            limit.full,
            fixed,
            per_output,
            rate=limit.amount,
            period=limit.period_ticks,
            tick=limit.tick_ms,
        )
    if kind is Kind.CALENDAR:
        return Demand(balance, kind, limit.unit, limit.full, fixed, per_output, windows=_windows(limit, now_ms))
    return Demand(balance, kind, limit.unit, limit.full, fixed, per_output)


#: The present and the next window of each kind of calendar that the limits have: they are the same all day.
_present: dict[tuple[Period, int, str], tuple[Window, Window]] = {}


def _windows(limit: Limit, at: int) -> tuple[Window, Window]:
    assert limit.period is not None  # noqa: S101 - calendar limits have one, for the type checker
    calendar = limit.period, limit.anchor, limit.timezone
    windows = _present.get(calendar)
    if windows is None or not windows[0].start <= at < windows[0].end:
        present = window_at(*calendar, at)
        windows = _present[calendar] = present, next_window(*calendar, present)
    return windows


def _draft(call: Call, claim: Claim, number: int) -> UsageEvent:
    """The event as far as it is known before the bytes leave; all that an abandoned exchange will have."""
    principal, tags, asked = call.principal, call.tags, claim.asked
    return UsageEvent(
        call_id=call.id,
        attempt=number,
        kind=EntryKind.SETTLE,
        at=time.time_ns() // 1000,
        request_id=call.request_id or call.id,
        parent_call_id=call.parent_id,
        tenant=principal.tenant,
        user=principal.user,
        tier=principal.tier or tags.tier,
        key_id=principal.key_id,
        feature=call.feature,
        route=call.route.name if call.route is not None else None,
        workflow_id=tags.workflow_id,
        session_id=tags.session_id,
        experiment=tags.experiment,
        variant=tags.variant,
        tags=dict(tags.free),
        provider=asked.provider,
        api=asked.api,
        requested_model=asked.model,
        model=asked.model,
        estimated_input_tokens=claim.input_tokens if claim.credits is None else None,
        estimated_output_tokens=claim.cap * asked.choices if claim.credits is None else None,
        credits=claim.credits,
        price_version=claim.rates.price_version,
        decision="allow",
    )


# ---------------------------------------------------------------- read


def read(plan: Plan, outcome: Granted | Refused) -> Exchange | Refusal:
    """What the store's answer means for the caller; what was learnt about balances is noted on the call."""
    if isinstance(outcome, Refused):
        refusal = _refusal(plan, outcome.standings[0], outcome.short[0], outcome.at)
        _note_standings(plan, outcome.standings[0])
        return refusal
    return _granted(plan, outcome)


def _granted(plan: Plan, granted: Granted) -> Exchange:
    call, claim = plan.call, plan.claim
    _note_standings(plan, granted.standings)
    offer = plan.wish.offers[granted.offer]
    with call.lock:
        for limit, demand in zip(plan.limits, offer.demands, strict=True):
            if limit.unit is Unit.REQUESTS:
                call.claimed.add(demand.balance)
            elif limit.unit is Unit.CONCURRENT:
                call.claimed.add(demand.balance)
                call.joined = True
        if granted.took:
            call.door = None
    if granted.short:
        call.would_refuse = _refusal(plan, granted.standings, granted.short, granted.at)
    lowered = granted.cap != claim.cap
    return Exchange(
        id=plan.wish.exchange,
        call=call,
        number=plan.number,
        asked=claim.asked,
        limits=plan.limits,
        granted=granted,
        rates=claim.rates,
        draft=plan.draft
        if not lowered
        else replace(plan.draft, estimated_output_tokens=_estimated_output(plan, granted)),
        started=plan.started,
        lease_end=granted.lease_end,
        decision=offer.decision,
        cap=granted.cap if claim.asked.output and (claim.cap_is_ours or lowered) else None,
        ask_usage=not claim.asked.includes_usage,
        credits=claim.credits,
    )


def _estimated_output(plan: Plan, granted: Granted) -> int | None:
    return None if plan.claim.credits is not None else granted.cap * plan.claim.asked.choices


def _note_standings(plan: Plan, standings: Sequence[Standing]) -> None:
    for limit, standing in zip(plan.limits, standings, strict=True):
        plan.call.standings[limit.slug] = (limit, standing)


def _refusal(plan: Plan, standings: Sequence[Standing], short: Sequence[int], at: int) -> Refusal:
    offer = plan.wish.offers[0]
    shortfalls = tuple(
        _shortfall(plan.limits[index], offer.demands[index], offer.at_least, standings[index], at) for index in short
    )
    # What can never fit is told first, then what takes longest.
    refusal = Refusal(
        shortfalls=tuple(sorted(shortfalls, key=_urgency)),
        at=at,
        call_id=plan.call.id,
        api=plan.claim.asked.api or (plan.call.route.api if plan.call.route is not None else None),
    )
    return replace(refusal, code=refusal.shortfalls[0].code, message=describe_refusal(refusal))


#: What can never fit is told first, then what takes longest.
_URGENCY: dict[RefusalCode, int] = {"never_fits": 0, "budget_spent": 1, "rate_limited": 2, "concurrency": 3}


def _urgency(shortfall: Shortfall) -> tuple[int, int]:
    return _URGENCY[shortfall.code], -(shortfall.wait_ms or 0)


def _shortfall(limit: Limit, demand: Demand, at_least: int, standing: Standing, at: int) -> Shortfall:
    claim = demand.fixed + demand.per_output * at_least
    by_holds = standing.spent + claim <= demand.ceiling
    code: RefusalCode
    reset_at: int | None = None
    wait_ms: int | None = None
    if limit.kind is Kind.CONCURRENT:
        code, wait_ms = "concurrency", SOON_MS
    elif claim > demand.ceiling:
        code = "never_fits"
    else:
        code = "budget_spent" if limit.is_budget else "rate_limited"
        if standing.window_end is not None:
            reset_at = standing.window_end
            wait_ms = standing.window_end - at
        elif limit.kind is Kind.BUCKET:
            over = standing.spent + standing.held + claim - demand.ceiling
            wait_ms = wait_ticks(over, standing.rem, demand.rate, demand.period) * demand.tick
            reset_at = at + wait_ms
        if by_holds:
            wait_ms = SOON_MS
    return Shortfall(
        limit=limit.text,
        name=limit.slug,
        code=code,
        ceiling=demand.ceiling,
        left=max(0, demand.ceiling - standing.spent - standing.held),
        wait_ms=wait_ms,
        reset_at=reset_at,
        by_holds=by_holds,
    )


def refuse_unbounded(policy: Policy, call: Call, asked: Asked, limits: Sequence[Limit], at: int) -> Refusal | None:
    """A request that no bound can be told of, under a budget that is enforced: refused unless the policy allows it."""
    budgets = [limit for limit in limits if limit.is_budget]
    if asked.unbounded is None or policy.unbounded == "allow" or not budgets:
        return None
    limit = budgets[0]
    ceiling = limit.ceiling()
    return Refusal(
        shortfalls=(Shortfall(limit.text, limit.slug, "never_fits", ceiling, ceiling),),
        at=at,
        call_id=call.id,
        api=asked.api,
        code="never_fits",
        message=f"What a {asked.unbounded} request costs cannot be bounded, so the limit {limit.text!r} refuses it.",
    )
