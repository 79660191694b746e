"""The desk: what both faces of the guard share, and all of their work that needs no waiting.

It knows the rules, the prices and the calls and exchanges that this process holds open. The guard asks it
what to do, takes the one step that does I/O, and tells it what came of that.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
from msgspec.structs import replace

from llm_guard_mw import settlement
from llm_guard_mw.allowance import Allowance, allowances, limits_of
from llm_guard_mw.alone import Alone
from llm_guard_mw.balances import Limit, ScopeValues
from llm_guard_mw.call import Call, Exchange, Record, current_call, new_call_id, sayable
from llm_guard_mw.errors import GuardError, IdentityError, LimitExceeded, StoreUnavailable
from llm_guard_mw.estimate import describe
from llm_guard_mw.http import HttpRequest
from llm_guard_mw.identity import Identifier, Late, read_tags
from llm_guard_mw.logs import log, log_call
from llm_guard_mw.metering import BilledResponses
from llm_guard_mw.model import (
    Asked,
    EntryKind,
    Kind,
    Principal,
    Rates,
    Reading,
    Refusal,
    Shortfall,
    Tags,
    UsageEvent,
)
from llm_guard_mw.policy import Policy, Route
from llm_guard_mw.pricing import PriceBook, Unpriced
from llm_guard_mw.reservation import (
    Claim,
    Plan,
    Terms,
    claim_at_door,
    claim_of_charge,
    claim_of_request,
    plan,
    read,
    refuse_unbounded,
)
from llm_guard_mw.settlement import Closing, Ending
from llm_guard_mw.spool import Spool
from llm_guard_mw.stores.journal import encode_event
from llm_guard_mw.stores.protocol import BalanceState, ClockApart, Granted, ProcessStore, Refused, TooLate

#: Refusals that get an event of their own, per principal and second; the rest are summed into one.
REFUSAL_EVENTS_PER_SECOND = 3

#: Scope values of which this process remembers that the store has admitted them.
ADMITTED_MAX = 10_000

#: Callers of whom it remembers which balances they have.
TERMS_MAX = 10_000

#: What a new scope value beyond the day's bound counts as. A caller who says "*other" himself joins them.
OTHER = "*other"

#: The model that a name without a price counts as: names that nobody knows must not make balances without end.
UNKNOWN_MODEL = "*unknown"

#: How long an id may be that the app gives with `as_user`.
ID_BYTES_MAX = 256

#: Scopes that have a value even when nobody knows who is calling.
_NAMELESS = frozenset({"global", "feature", "model"})

_NAMED_TAGS = frozenset({"workflow_id", "session_id", "experiment", "variant"})

Stranger = tuple[str, str, str]  # (parent, scope, value)


@dataclass(frozen=True, slots=True)
class Unguarded:
    """The store is away, and nothing could be booked here; but while observing nobody is refused."""


class DoorEnding(msgspec.Struct, frozen=True, gc=False):
    """How a guarded request ended, as its door saw it.

    `status` is None when no answer began. `whole` says that the answer was passed on to its end. `reading` is
    what a meter read in the route's own answer.
    """

    status: int | None = None
    whole: bool = True
    reading: Reading | None = None


class Desk:
    """One a process, made by `process`; safe to use from many threads."""

    def __init__(
        self, policy: Policy, prices: PriceBook, identifier: Identifier, store: ProcessStore, spool: Spool
    ) -> None:
        self.policy = policy
        self.prices = prices
        self.identifier = identifier
        self.store = store
        self.async_store = store.async_face()
        self.spool = spool
        self._start_anew()
        _desks.add(self)

    def _start_anew(self) -> None:
        """What belongs to this process alone: a fork begins with nothing open."""
        self.open: dict[str, Exchange] = {}
        self.calls: dict[str, Call] = {}
        self.outbox: deque[Closing] = deque()
        self.alone = Alone(self.spool)
        #: What finalizers leave to be done: one may run in the middle of anything, and must do nothing itself.
        self.left_behind: deque[Callable[[], None]] = deque()
        self.billed = BilledResponses()
        self._admitted: OrderedDict[Stranger, None] = OrderedDict()
        self._known_terms: dict[tuple[object, ...], Terms] = {}
        self._refusals: dict[Principal, _RefusalCount] = {}
        self._lock = threading.Lock()

    # ------------------------------------------------------------ opening a call

    def start(self, request: HttpRequest, route: Route, who: Principal | Late) -> Call:
        """A call for this request; nothing is held yet."""
        trusted = self.identifier.trusted(request)
        said = read_tags(request, trusted=trusted)
        principal = who.known if isinstance(who, Late) else who
        if trusted and principal.tier is None and said.tier is not None:
            principal = replace(principal, tier=said.tier)
        # A trusted peer's word goes before the route's; anybody else's is for reports where the route says nothing.
        feature = (said.feature if trusted else None) or route.feature or said.feature
        return Call(
            id=new_call_id(),
            principal=principal,
            tags=said if said.feature == feature else replace(said, feature=feature),
            route=route,
            till=self,
            request=request,
            request_id=_request_id(request),
            identified=not isinstance(who, Late),
        )

    def start_block(self, principal: Principal, feature: str | None, tags: Mapping[str, str]) -> Call:
        """A call for work outside of a request. What the app itself says is believed."""
        outer = current_call()
        principal = replace(
            principal,
            user=_id("user", principal.user),
            tenant=_id("tenant", principal.tenant),
            tier=_id("tier", principal.tier),
        )
        tags = {sayable(name): sayable(value) for name, value in tags.items()}
        said = Tags(
            feature=_id("feature", feature),
            tier=principal.tier,
            workflow_id=tags.get("workflow_id"),
            session_id=tags.get("session_id"),
            experiment=tags.get("experiment"),
            variant=tags.get("variant"),
            free=tuple(sorted((name, value) for name, value in tags.items() if name not in _NAMED_TAGS)),
            trusted=True,
        )
        parent_id = outer.id if outer is not None else None
        return Call(id=new_call_id(), principal=principal, tags=said, route=None, till=self, parent_id=parent_id)

    def nobody(self, error: IdentityError, *, needed: bool = True) -> Late:
        """Nobody knows who is calling: an error, but not while observing, which refuses nobody."""
        if needed and not self.observing:
            raise error
        if needed:
            log.warning("would_refuse", code="unauthenticated", reason=str(error))
        return Late("nobody is known")

    def identified(self, call: Call, principal: Principal | Late) -> None:
        """A late source has answered: from now on the call has a name."""
        if isinstance(principal, Late):
            return
        with call.lock:
            call.principal = principal if principal.tier else replace(principal, tier=call.principal.tier)
            call.identified = True

    def plan_door(self, call: Call) -> Plan:
        """Exchange 0 of a call: what the request's own body lets expect."""
        asked = self._asked_at_door(call)
        claim = claim_at_door(self.policy, call, asked, self._rates_at_door(asked))
        return self._plan(call, claim)

    def plan_named(self, call: Call) -> Plan | None:
        """Exchange 0 once more, on the balances of a caller who is known only now. It has run: nothing refuses it."""
        door = call.door
        if not call.identified or door is None:
            return None
        again = self._plan(call, claim_at_door(self.policy, call, door.asked, door.rates), takes=door.id)
        return replace(again, wish=replace(again.wish, force=True))

    def named(self, call: Call, outcome: Exchange | Refusal | Unguarded) -> None:
        """From here on that one is exchange 0."""
        if isinstance(outcome, Exchange):
            before = call.door  # None: it was taken over
            if before is not None and outcome.alone:  # the store holds that one, and nobody could give it back
                self._drop(outcome)
                return
            if before is not None and before.alone:
                self._drop(before)
            self.open.pop(f"{call.id}/0", None)
            self.open[outcome.id] = call.door = outcome

    def opened(self, call: Call, outcome: Exchange | Refusal | Unguarded) -> Call | Refusal:
        """The call is open if its exchange 0 is."""
        if isinstance(outcome, Refusal):
            call.closed = True
            call.decision = "reject"
            log_call(call, outcome.status)
            return outcome
        if isinstance(outcome, Unguarded):
            call.unguarded = True
        else:
            call.door = outcome
            self.open[outcome.id] = outcome
        self.calls[call.id] = call
        return call

    def _asked_at_door(self, call: Call) -> Asked:
        request, route = call.request, call.route
        if request is None or route is None:
            return Asked(output=False)
        asked = describe(
            route.api,
            None,
            request.method,
            request.path,
            request.body,
            content_encoding=_text(request.header(b"content-encoding")),
            body_complete=request.body_complete,
            total_bytes=_number(request.header(b"content-length")),
        )
        # The app calls the provider, not the caller of the app: what its body refers to is no bound on anything.
        model = asked.model if route.model == "body:model" or (route.api and not route.model) else route.model
        return replace(asked, model=model, unbounded=None, opaque=())

    def _rates_at_door(self, asked: Asked) -> Rates:
        if asked.model is None:
            return Rates(None, asked.provider, 0, 0, self.prices.price_version)
        try:
            return self.prices.rates(asked.provider, asked.model, asked.service_tier, kinds=asked.kinds)
        except Unpriced:
            return Rates(asked.model, asked.provider, 0, 0, self.prices.price_version, flagged="unpriced")

    # ------------------------------------------------------------ opening an exchange

    def call_of_capture(self) -> Call:
        """The call that a captured request belongs to: the current one, or a new one of its own."""
        call = current_call()
        if call is None:
            call = Call(id=new_call_id(), principal=Principal(), tags=Tags(), route=None, till=self, identified=False)
        elif call.closed:
            call = Call(
                id=new_call_id(),
                principal=call.principal,
                tags=call.tags,
                route=call.route,
                till=self,
                request_id=call.request_id,
                parent_id=call.id,
                identified=call.identified,
            )
        else:
            call.captures += 1
            return call
        call.captures += 1
        call.detached = True
        self.calls[call.id] = call
        return call

    def plan_request(self, call: Call, asked: Asked) -> Plan | Refusal:
        """The exchange of a real request, as if exchange 0's money were gone."""
        limits = self._limits(call)
        refusal = refuse_unbounded(self.policy, call, asked, limits, self.store.clock())
        try:
            rates = self.prices.rates(asked.provider, asked.model, asked.service_tier, kinds=asked.kinds)
        except Unpriced as error:
            rates = Rates(asked.model, asked.provider, 0, 0, self.prices.price_version, flagged="unpriced")
            refusal = refusal or _unpriced(call, asked, str(error), limits, self.store.clock())
        if refusal is not None and not self.observing:
            return self._refused(call, refusal, call.next_number())
        call.would_refuse = refusal or call.would_refuse
        claim = claim_of_request(self.policy, call, asked, rates)
        door = call.door
        return self._plan(call, claim, takes=door.id if door is not None else None)

    def begun(self, call: Call, outcome: Exchange | Refusal | Unguarded) -> Exchange | Refusal | Unguarded:
        """Remember an exchange, so that its lease is renewed."""
        if isinstance(outcome, Exchange):
            if outcome.granted.took:
                self.open.pop(f"{call.id}/0", None)
            self.open[outcome.id] = outcome
        else:
            call.unguarded |= isinstance(outcome, Unguarded)
            self.settled(call)
        return outcome

    def not_opened(self, call: Call, error: BaseException) -> None:
        """It went wrong on the way to a grant: the door hears why, and a call that never opens is gone."""
        if isinstance(error, GuardError):
            call.failure = error
        if call.detached or call.id not in self.calls:
            call.closed = True
            self.calls.pop(call.id, None)
            self.store.close_call_soon(call.id, lambda _error: None)
            self._leave_alone(call)

    def _plan(self, call: Call, claim: Claim, takes: str | None = None) -> Plan:
        model = UNKNOWN_MODEL if claim.asked.model and claim.rates.flagged else claim.asked.model
        terms, now = self._terms(call, model), self.store.clock()
        return plan(self.policy, call, claim, terms, number=call.next_number(), takes=takes, now_ms=now)

    def read(self, wish: Plan, outcome: Granted | Refused | ClockApart | TooLate) -> Exchange | Refusal:
        if isinstance(outcome, Granted | Refused):
            answer = read(wish, outcome)
            return self._refused(wish.call, answer, wish.number) if isinstance(answer, Refusal) else answer
        raise StoreUnavailable("the store answered too late", asked=True)  # an earlier attempt may have been granted

    def undo(self, wish: Plan) -> None:
        """Give back what the store may have granted to somebody who did not wait for its answer."""
        self.settle_soon(settlement.undo(wish.wish.exchange, wish.call, wish.draft))
        _note_joined(wish)

    def without_store(self, wish: Plan, error: StoreUnavailable) -> Exchange | Refusal | Unguarded:
        """The store did not answer: the call is stopped, or guarded by this process alone. The rules say which."""
        call, alone, passes = wish.call, wish, self.lets_pass(wish.call.route)
        if error.asked:  # it may have granted it all the same, under this id: that is given back, and not used
            if passes:
                alone = self._plan(call, wish.claim, takes=wish.wish.takes)
                alone = replace(alone, wish=replace(alone.wish, force=wish.wish.force))
            _note_joined(wish)
            self.keep_for_later(settlement.undo(wish.wish.exchange, call, wish.draft), error)
        if not passes:
            raise error
        call.alone, joined = True, call.joined
        try:
            answer = self.read(alone, self.alone.reserve(alone.wish, error))
        except StoreUnavailable as full:
            if not self.observing:
                raise
            log.warning("unguarded", reason=str(full), call_id=call.id)
            return Unguarded()
        call.joined = joined  # what it has joined here, the store knows nothing of
        if isinstance(answer, Exchange):
            answer.alone = True
            if answer.granted.took:
                self.open.pop(alone.wish.takes or "", None)
        return answer

    def let_pass(self, call: Call, error: StoreUnavailable) -> None:
        """Whether a new scope value may have a balance was not told. The reserve will hear from the store as well."""
        if not self.lets_pass(call.route):
            raise error

    def lets_pass(self, route: Route | None) -> bool:
        """Whether what cannot be guarded passes: so says `on_store_failure`, and so it is while observing."""
        rule = (route.on_store_failure if route is not None else None) or self.policy.on_store_failure
        return rule == "allow" or self.observing

    @property
    def observing(self) -> bool:
        return self.policy.mode == "observe"

    @property
    def new_values_max(self) -> int:
        return self.policy.new_scope_values

    # ------------------------------------------------------------ limits, scopes, values

    def _terms(self, call: Call, model: str | None) -> Terms:
        """The limits of a call and their balances; remembered, since most callers come again."""
        route = None if call.route is None else call.route.key
        # What no limit asks for is no part of what is remembered: a session's id would be new in every call.
        tags = call.tags if call.tags.trusted and self.policy.asks_tags else call.tags.trusted
        caller = route, call.principal, tags, _feature(call), model, call.identified
        terms = self._known_terms.get(caller)
        if terms is None:
            limits = self._limits(call, model)
            values, stranger = self._values(call, model, limits)
            terms = Terms(limits, tuple([limit.balance(values) for limit in limits]))
            if not stranger:
                if len(self._known_terms) >= TERMS_MAX:
                    self._known_terms = {}
                self._known_terms[caller] = terms
        return terms

    def _limits(self, call: Call, model: str | None = None) -> tuple[Limit, ...]:
        limits = self.policy.limits_for(call.route, call.principal, call.tags, feature=_feature(call), model=model)
        if call.identified:
            return limits
        # Nobody is known (yet): what cannot be named is not counted, or all strangers would share one balance.
        return tuple([limit for limit in limits if _NAMELESS.issuperset(limit.scope)])

    def _values(self, call: Call, model: str | None, limits: Iterable[Limit]) -> tuple[ScopeValues, bool]:
        """What the call stands for, and whether it is a stranger: a value not admitted (yet) counts as `other`."""
        values = self.policy.scope_values(call.route, call.principal, call.tags, feature=_feature(call), model=model)
        stranger = False
        for parent, scope, value in _bounded_values(values, limits):
            if (parent, scope, value) not in self._admitted:
                values, stranger = _as_other(values, scope), True
        return values, stranger

    def limits_of(self, user: str | int | None, tenant: str | int | None, tier: str | None) -> dict[str, Limit]:
        """The limits that count for this caller, by balance. The app says who it is, as in `as_user`."""
        return limits_of(self.policy, Principal(_id("user", user), _id("tenant", tenant), _id("tier", tier)))

    def allowances(self, limits: Mapping[str, Limit], states: Iterable[BalanceState]) -> tuple[Allowance, ...]:
        return allowances(limits, states, self.store.clock())

    def strangers(self, call: Call) -> list[Stranger]:
        """Values that some limit counts by and that this process has not met: the store decides on their balance."""
        if not (call.tags.trusted and self.policy.asks_tags):
            return []
        # Whatever their conditions: some hold for a model, which only the exchange will name.
        limits = self.policy.candidates(call.route)
        if not call.identified:
            limits = tuple([limit for limit in limits if _NAMELESS.issuperset(limit.scope)])
        values = self.policy.scope_values(call.route, call.principal, call.tags, feature=_feature(call))
        return [stranger for stranger in _bounded_values(values, limits) if stranger not in self._admitted]

    def met(self, stranger: Stranger, admitted: bool) -> None:
        """What the store said of a stranger. A refused one is asked about again: tomorrow has room for more."""
        with self._lock:
            if admitted:
                self._admitted[stranger] = None
            while len(self._admitted) > ADMITTED_MAX:
                self._admitted.popitem(last=False)

    def today(self) -> int:
        """The day, counted from the epoch (UTC): new scope values are bounded by the day."""
        return self.store.clock() // 86_400_000

    # ------------------------------------------------------------ closing

    def finished(
        self, exchange: Exchange, reading: Reading | None, *, status: int | None, ending: Ending
    ) -> Closing | None:
        """What closes an exchange; None if it is closed already, or by the spool. An error of ours books the hold."""
        with exchange.call.lock:
            if exchange.closed:
                return None
            exchange.closed = True
        try:
            closing = settlement.close(exchange, self.prices, reading, status=status, ending=ending)
        except Exception:
            log.exception("metering_failed", call_id=exchange.call.id, attempt=exchange.number)
            closing = settlement.book_held(exchange, status=status, error_type="metering_failed")
        if reading is not None and reading.broken:
            log.warning("metering_broken", call_id=exchange.call.id, reason=reading.broken, basis=closing.event.basis)
        exchange.call.note_captured(
            reading.response_id if reading is not None else None, reading.usage if reading is not None else None
        )
        exchange.call.events.append(closing.event)
        self._book_what_waited(exchange.call)
        if exchange.alone:
            self._close_alone(closing)
            self.settled(exchange.call)
            return None
        return closing

    def _close_alone(self, closing: Closing) -> None:
        """It was granted here, so that the store hears of it by the spool."""
        with self.tolerant("spool"):
            self.alone.close(closing)
        self.let_go(closing)

    def _drop(self, exchange: Exchange) -> None:
        with self.tolerant("spool"):
            self.alone.drop(exchange.id)
        self.open.pop(exchange.id, None)

    def _leave_alone(self, call: Call) -> None:
        if call.alone:
            self.alone.close_call(call.id)

    def _in_flight(self, call: Call) -> bool:
        return any(exchange.call is call and not exchange.closed for exchange in list(self.open.values()))

    def _book_what_waited(self, call: Call) -> None:
        """Reports of a call that has closed waited for its last answer; what that was not is booked now."""
        with call.lock:
            if not call.closed or not call.records or self._in_flight(call):
                return
            records, call.records = call.records, []
        for record in records:
            if not call.was_captured(record):
                with self.tolerant("record"):
                    self.book(call, record)

    def settled(self, call: Call) -> None:
        """A call that a capture opened for itself ends with its exchange."""
        if call.detached and not call.closed:
            call.closed = True
            self.calls.pop(call.id, None)
            if call.joined:
                self.store.close_call_soon(call.id, lambda _error: None)
            self._leave_alone(call)
            log_call(call, None)

    def closings(self, call: Call, ending: DoorEnding) -> list[Closing]:
        """What is left to close when a call is over: exchange 0, and what the app recorded."""
        with call.lock:
            if call.closed:
                return []
            call.closed = True
            door, call.door = call.door, None
            records, call.records = call.records, []
            if records and door is None and self._in_flight(call):
                # An answer that is still read may be the one that was reported: its end will tell (`finished`).
                records, call.records = [], records
        records = [record for record in records if not call.was_captured(record)]
        closings = []
        if door is not None:
            closings.append(self._door_closing(call, door, records, ending))
        else:
            for record in records:
                with self.tolerant("record"):
                    closings.append(self._booking(call, record))
        call.events.extend(closing.event for closing in closings)
        if door is not None and door.alone:
            self._close_alone(closings.pop())
        return closings

    def _door_closing(self, call: Call, door: Exchange, records: list[Record], ending: DoorEnding) -> Closing:
        door.closed = True
        try:
            if records:
                return settlement.close_recorded(door, self.prices, records, status=ending.status)
            if call.captures or (call.route is not None and call.route.usage == "captured"):
                return settlement.release(door, status=ending.status)
            return self._close_uncaptured(call, door, ending)
        except Exception:
            log.exception("metering_failed", call_id=call.id, attempt=0)
            return settlement.book_held(door, status=ending.status, error_type="metering_failed")

    def _close_uncaptured(self, call: Call, door: Exchange, ending: DoorEnding) -> Closing:
        """Nothing was captured nor recorded: the route's own answer has to tell."""
        if call.route is None:  # an `as_user` block that asked for nothing
            return settlement.release(door)
        said = ending.reading is not None and ending.reading.usage is not None
        if ending.status is not None and not 200 <= ending.status < 300 and not said:
            return settlement.release(door, status=ending.status)
        if ending.status is None or not ending.whole:
            return settlement.close(door, self.prices, ending.reading, status=ending.status, ending="error")
        return settlement.close(door, self.prices, ending.reading, status=ending.status, ending="complete")

    def closed(self, call: Call, ending: DoorEnding) -> None:
        self.calls.pop(call.id, None)
        self._leave_alone(call)
        log_call(call, ending.status)

    # ------------------------------------------------------------ what the app reports and spends itself

    def book(self, call: Call, record: Record) -> None:
        """Usage that was reported after its call had closed."""
        closing = self._booking(call, record)
        call.events.append(closing.event)
        self.settle_soon(closing)

    def _booking(self, call: Call, record: Record) -> Closing:
        """Reserve and settle in one step: the money is spent already, so nothing can be refused."""
        usage = record.usage
        named = call.route.model if call.route is not None and call.route.model != "body:model" else None
        model = usage.model or named
        asked = Asked(provider=record.provider, model=model, output=True)
        cost = self.prices.cost(record.provider, model, usage)
        rates = Rates(model, record.provider, 0, 0, cost.price_version, flagged=cost.flagged)
        claim = Claim(asked, rates, usage.input_tokens or 0, usage.output_tokens or 0, 0, cap_is_ours=False)
        wish = self._plan(call, claim)
        return settlement.book(wish, usage, cost)

    def charge(self, call: Call, credits: int, provider: str | None) -> None:
        """Spend credits: reserved and settled as reserved. Raises LimitExceeded, and then nothing was spent."""
        claim = claim_of_charge(credits, provider, self.prices.price_version)
        wish = self._plan(call, claim)
        try:
            outcome = self.store.reserve(wish.wish)
            while isinstance(outcome, ClockApart):
                wish = wish.around(outcome.at)
                outcome = self.store.reserve(wish.wish)
            answer = self.read(wish, outcome)
        except StoreUnavailable as error:
            unheard = self.without_store(wish, error)
            if isinstance(unheard, Unguarded):
                return
            answer = unheard
        except BaseException:
            self.undo(wish)
            raise
        if isinstance(answer, Refusal):
            raise LimitExceeded(answer)
        closing = settlement.close_charge(answer)
        call.events.append(closing.event)
        if answer.alone:
            self._close_alone(closing)
        else:
            self.settle_soon(closing)

    # ------------------------------------------------------------ what waits for the store

    def settle_soon(self, closing: Closing) -> None:
        def done(error: BaseException | None) -> None:
            if error is not None:
                self.keep_for_later(closing, error)

        self.store.settle_soon(closing.settlement, done)
        self.let_go(closing)

    def let_go(self, closing: Closing) -> None:
        """The settlement is in the store's hands: until then the exchange counted as open, and was renewed."""
        self.open.pop(closing.settlement.exchange, None)

    def keep_for_later(self, closing: Closing, error: BaseException) -> None:
        """The store did not take it: it is tried again until it does (`keeper`). Settling twice changes nothing."""
        self.outbox.append(closing)
        log.warning("settle_postponed", call_id=closing.event.call_id, attempt=closing.event.attempt, reason=str(error))

    @contextmanager
    def tolerant(self, what: str) -> Iterator[None]:
        """An error here costs the caller nothing, nor what is done after it: the lease ends what was left open."""
        try:
            yield
        except GuardError as error:
            log.warning("store_away", step=what, reason=str(error))
        except Exception:
            log.exception("close_failed", step=what)

    # ------------------------------------------------------------ refusals in the books

    def _refused(self, call: Call, refusal: Refusal, number: int) -> Refusal:
        """Remember a refusal for the door, and give it an event, alone or summed with others."""
        call.refusal, call.failure = refusal, None
        with self._lock:
            count = self._refusals.setdefault(call.principal, _RefusalCount())
            alone = count.may_tell(time.monotonic())
            if not alone:
                count.summed += 1
                count.last = (call, refusal)
        if alone:
            self._tell_refusal(call, refusal, number, 1)
        return refusal

    def flush_refusals(self) -> None:
        """One event for all the refusals that were too many to have one each."""
        with self._lock:
            waiting = [(*count.last, count.summed) for count in self._refusals.values() if count.last is not None]
            self._refusals = {
                principal: count for principal, count in self._refusals.items() if count.is_busy(time.monotonic())
            }
            for count in self._refusals.values():
                count.summed, count.last = 0, None
        for call, refusal, summed in waiting:
            self._tell_refusal(call, refusal, call.next_number(), summed)

    def _tell_refusal(self, call: Call, refusal: Refusal, number: int, count: int) -> None:
        event = UsageEvent(
            call_id=call.id,
            attempt=number,
            kind=EntryKind.REFUSED,
            at=time.time_ns() // 1000,
            request_id=call.request_id or call.id,
            parent_call_id=call.parent_id,
            tenant=call.principal.tenant,
            user=call.principal.user,
            tier=call.principal.tier or call.tags.tier,
            key_id=call.principal.key_id,
            feature=call.feature,
            route=call.route.name if call.route is not None else None,
            workflow_id=call.tags.workflow_id,
            session_id=call.tags.session_id,
            experiment=call.tags.experiment,
            variant=call.tags.variant,
            tags=dict(call.tags.free),
            api=refusal.api,
            price_version=self.prices.price_version,
            status=refusal.status,
            success=False,
            error_type=refusal.code,
            decision="reject",
            count=count,
        )
        entry_id, payload = f"{call.id}/{number}/refused", encode_event(event)

        def done(error: BaseException | None) -> None:
            if error is not None and not self.alone.note_refusal(entry_id, payload):
                log.warning("refusal_not_recorded", reason=str(error))

        self.store.append_soon(entry_id, payload, done)


@dataclass(slots=True)
class _RefusalCount:
    """How many refusals of one principal had an event of their own this second, and the rest."""

    second: int = 0
    told: int = 0
    summed: int = 0
    last: tuple[Call, Refusal] | None = None

    def may_tell(self, now: float) -> bool:
        if int(now) != self.second:
            self.second, self.told = int(now), 0
        self.told += 1
        return self.told <= REFUSAL_EVENTS_PER_SECOND

    def is_busy(self, now: float) -> bool:
        return int(now) - self.second <= 1


def _note_joined(wish: Plan) -> None:
    """Nobody heard what became of it: whoever closes the call frees what it may have joined."""
    wish.call.joined |= any(demand.kind is Kind.CONCURRENT for demand in wish.wish.offers[0].demands)


def _feature(call: Call) -> str | None:
    """The feature that may choose balances: a trusted peer's word, else the route's."""
    return call.tags.feature if call.tags.trusted or call.route is None else call.route.feature


def _bounded_values(values: ScopeValues, limits: Iterable[Limit]) -> list[Stranger]:
    """Values that whoever sets tags may invent, and that some limit gives a balance: (parent, scope, value)."""
    found: dict[Stranger, None] = {}
    for limit in limits:
        for scope in limit.scope:
            if scope in ("workflow", "session") or scope.startswith("tag:"):
                value = values.value(scope)
                if value is not None:
                    found[_parent(values, scope), scope, value] = None
    return list(found)


def _parent(values: ScopeValues, scope: str) -> str:
    """Whose new values are counted together: a session's user's, else the tenant's."""
    tenant = values.part("tenant")
    return f"{tenant}&{values.part('user')}" if scope == "session" else tenant


def _as_other(values: ScopeValues, scope: str) -> ScopeValues:
    if scope.startswith("tag:"):
        return replace(values, tags={**values.tags, scope[4:]: OTHER})
    return replace(values, workflow=OTHER) if scope == "workflow" else replace(values, session=OTHER)


def _unpriced(call: Call, asked: Asked, message: str, limits: Iterable[Limit], at: int) -> Refusal:
    """`unpriced = "deny"`: a model without a price cannot be held against any budget."""
    shortfalls = tuple(Shortfall(x.text, x.slug, "never_fits", x.ceiling(), 0) for x in limits)
    return Refusal(shortfalls[:1], at, call_id=call.id, api=asked.api, code="never_fits", message=message)


def _request_id(request: HttpRequest) -> str | None:
    value = _text(request.header(b"x-request-id"))
    return value if value is not None and 0 < len(value) <= 128 and value.isprintable() else None


def _id(role: str, value: object) -> str | None:
    """An id that the app gives itself, bounded like those of callers; a whole number (a primary key) is one too."""
    if value is None:
        return None
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not 0 < len(sayable(text).encode()) <= ID_BYTES_MAX or "\0" in text:
        raise ValueError(
            f"{role}={value!r:.80}: a text of 1 to {ID_BYTES_MAX} bytes, or a whole number, would be right"
        )
    return sayable(text)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")


def _number(value: bytes | None) -> int | None:
    return int(value) if value is not None and value.isdigit() and len(value) < 16 else None


_desks: weakref.WeakSet[Desk] = weakref.WeakSet()


def _after_fork() -> None:
    for desk in _desks:
        desk._start_anew()


os.register_at_fork(after_in_child=_after_fork)
