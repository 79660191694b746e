"""The guard: the straight path of a guarded call. START READING HERE.

    call_for  a door asks who is calling, and what counts                            identity, policy
    enter     the call is opened: hold exchange 0                                    reservation.plan, store, read
    begin     a capture opens an exchange: it takes exchange 0 over, or stands alone  the same
    finish    the exchange's bytes have ended: what it used, settle                   settlement.close, store
    close     the call is over: exchange 0, what the app recorded, concurrency

`Guard` and `AsyncGuard` are twins: they differ in `await` alone, and a test holds them to it. All that needs
no I/O is done by the `Desk` they share.

Rule 1. Nothing is sent before its hold is granted; what cannot be held is refused.
Rule 2. After the grant the caller's traffic comes first: a settlement that fails is kept and tried again, and
        no error of ours reaches the app.
Rule 3. Every exchange that was granted is closed, whatever happens to the task that opened it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Any

from llm_guard_mw.allowance import Allowance
from llm_guard_mw.call import Call, Exchange, current_call, enter, leave
from llm_guard_mw.desk import Desk, DoorEnding, Unguarded
from llm_guard_mw.errors import GuardError, IdentityError, LimitExceeded, StoreUnavailable
from llm_guard_mw.http import HttpRequest
from llm_guard_mw.identity import Late
from llm_guard_mw.logs import log
from llm_guard_mw.model import Asked, Principal, Reading, Refusal
from llm_guard_mw.policy import Route
from llm_guard_mw.reservation import Plan
from llm_guard_mw.settlement import Closing, Ending
from llm_guard_mw.stores.protocol import ClockApart


class _Face:
    """What has no twin: it waits for nothing."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def as_user(
        self,
        *,
        user: str | None = None,
        tenant: str | None = None,
        tier: str | None = None,
        feature: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> UserBlock:
        """Guard work outside of a request: `with guard.as_user(user="ada", feature="digest"):`, or `async with`.

        Raises LimitExceeded on entry when a limit leaves nothing.
        """
        return UserBlock(self.desk, Principal(user=user, tenant=tenant, tier=tier), feature, tags or {})


class Guard(_Face):
    """The sync face: WSGI doors, sync SDK clients, scripts."""

    def __init__(self, desk: Desk) -> None:
        super().__init__(desk)
        self.store = desk.store

    def call_for(self, request: HttpRequest, route: Route) -> Call:
        """The call that a request to a guarded route makes; nothing is held yet. Raises IdentityError."""
        try:
            who = self.desk.identifier.identify(request)
        except IdentityError as error:
            who = self.desk.nobody(error)
        return self.desk.start(request, route, who)

    def ask_now(self, call: Call) -> None:
        """Who is calling, asked while the app's framework still knows. Nobody acts on it before the first exchange."""
        if not call.identified and call.request is not None:
            with suppress(GuardError):  # whoever needs to know asks once more, and hears of it then
                call.answered = self.desk.identifier.settle_late(call.request)

    def enter(self, call: Call) -> Call | Refusal:
        """Hold exchange 0 of a call. Raises StoreUnavailable."""
        try:
            self._admit(call)
            return self.desk.opened(call, self._reserve(self.desk.plan_door(call)))
        except BaseException as error:
            self.desk.not_opened(call, error)
            raise

    def begin(self, asked: Asked) -> Exchange | Refusal | Unguarded:
        """Open an exchange for a real request to a provider, within the current call if there is one."""
        call = self.desk.call_of_capture()
        try:
            if not call.identified and call.request is not None:
                self._identify(call, call.request)
            self._admit(call)
            plan = self.desk.plan_request(call, asked)
            return self.desk.begun(call, plan if isinstance(plan, Refusal) else self._reserve(plan))
        except BaseException as error:
            self.desk.not_opened(call, error)
            raise

    def finish(self, exchange: Exchange, reading: Reading | None, *, status: int | None, ending: Ending) -> None:
        """The exchange's bytes have ended. Closing twice changes nothing; no error comes out."""
        closing = self.desk.finished(exchange, reading, status=status, ending=ending)
        if closing is not None:
            self._settle(closing)
            self.desk.settled(exchange.call)

    def close(self, call: Call, ending: DoorEnding) -> None:
        """The call is over, after its background tasks."""
        if not call.identified and call.request is not None:
            with self.desk.tolerant("name"):
                self._name(call, call.request)
        for closing in self.desk.closings(call, ending):
            self._settle(closing)
        if call.joined:
            with self.desk.tolerant("close_call"):
                self.store.close_call(call.id)
        self.desk.closed(call, ending)

    def allowances(
        self, *, user: str | int | None = None, tenant: str | int | None = None, tier: str | None = None
    ) -> tuple[Allowance, ...]:
        """What is left to this caller of each limit, and when there is more. Raises StoreUnavailable."""
        limits = self.desk.limits_of(user, tenant, tier)
        return self.desk.allowances(limits, self.store.peek(tuple(limits)))

    def _identify(self, call: Call, request: HttpRequest, *, needed: bool = True) -> None:
        """A late source has its say, at the first exchange."""
        try:
            who: Principal | Late = call.answered or self.desk.identifier.settle_late(request)
        except IdentityError as error:
            who = self.desk.nobody(error, needed=needed)
        self.desk.identified(call, who)

    def _name(self, call: Call, request: HttpRequest) -> None:
        """Nothing was captured, so nobody was asked who is calling; what the call used is somebody's all the same."""
        self._identify(call, request, needed=False)
        plan = self.desk.plan_named(call)
        if plan is not None:
            self.desk.named(call, self._reserve(plan))

    def _admit(self, call: Call) -> None:
        for stranger in self.desk.strangers(call):
            try:
                self.desk.met(stranger, self.store.admit(*stranger, self.desk.today(), self.desk.new_values_max))
            except StoreUnavailable as error:
                self.desk.let_pass(call, error)

    def _reserve(self, plan: Plan) -> Exchange | Refusal | Unguarded:
        try:
            outcome = self.store.reserve(plan.wish)
            while isinstance(outcome, ClockApart):
                plan = plan.around(outcome.at)
                outcome = self.store.reserve(plan.wish)
            return self.desk.read(plan, outcome)
        except StoreUnavailable as error:
            return self.desk.without_store(plan, error)
        except BaseException:  # whoever goes away while the store is asked (a cancelled task) takes the hold with it
            self.desk.undo(plan)
            raise

    def _settle(self, closing: Closing) -> None:
        try:
            self.store.settle(closing.settlement)
        except Exception as error:  # the store's, or of a number that no store can hold: the others settle all the same
            self.desk.keep_for_later(closing, error)
        finally:
            self.desk.let_go(closing)


class AsyncGuard(_Face):
    """The async face: ASGI doors and async SDK clients."""

    def __init__(self, desk: Desk) -> None:
        super().__init__(desk)
        self.store = desk.async_store

    async def call_for(self, request: HttpRequest, route: Route) -> Call:
        """The call that a request to a guarded route makes; nothing is held yet. Raises IdentityError."""
        try:
            who = await self.desk.identifier.aidentify(request)
        except IdentityError as error:
            who = self.desk.nobody(error)
        return self.desk.start(request, route, who)

    async def ask_now(self, call: Call) -> None:
        """Who is calling, asked while the app's framework still knows. Nobody acts on it before the first exchange."""
        if not call.identified and call.request is not None:
            with suppress(GuardError):  # whoever needs to know asks once more, and hears of it then
                call.answered = await self.desk.identifier.asettle_late(call.request)

    async def enter(self, call: Call) -> Call | Refusal:
        """Hold exchange 0 of a call. Raises StoreUnavailable."""
        try:
            await self._admit(call)
            return self.desk.opened(call, await self._reserve(self.desk.plan_door(call)))
        except BaseException as error:
            self.desk.not_opened(call, error)
            raise

    async def begin(self, asked: Asked) -> Exchange | Refusal | Unguarded:
        """Open an exchange for a real request to a provider, within the current call if there is one."""
        call = self.desk.call_of_capture()
        try:
            if not call.identified and call.request is not None:
                await self._identify(call, call.request)
            await self._admit(call)
            plan = self.desk.plan_request(call, asked)
            return self.desk.begun(call, plan if isinstance(plan, Refusal) else await self._reserve(plan))
        except BaseException as error:
            self.desk.not_opened(call, error)
            raise

    async def finish(self, exchange: Exchange, reading: Reading | None, *, status: int | None, ending: Ending) -> None:
        """The exchange's bytes have ended. Closing twice changes nothing; no error comes out."""
        closing = self.desk.finished(exchange, reading, status=status, ending=ending)
        if closing is not None:
            await self._settle(closing)
            self.desk.settled(exchange.call)

    async def close(self, call: Call, ending: DoorEnding) -> None:
        """The call is over, after its background tasks."""
        if not call.identified and call.request is not None:
            with self.desk.tolerant("name"):
                await self._name(call, call.request)
        for closing in self.desk.closings(call, ending):
            await self._settle(closing)
        if call.joined:
            with self.desk.tolerant("close_call"):
                await self.store.close_call(call.id)
        self.desk.closed(call, ending)

    async def allowances(
        self, *, user: str | int | None = None, tenant: str | int | None = None, tier: str | None = None
    ) -> tuple[Allowance, ...]:
        """What is left to this caller of each limit, and when there is more. Raises StoreUnavailable."""
        limits = self.desk.limits_of(user, tenant, tier)
        return self.desk.allowances(limits, await self.store.peek(tuple(limits)))

    async def _identify(self, call: Call, request: HttpRequest, *, needed: bool = True) -> None:
        """A late source has its say, at the first exchange."""
        try:
            who: Principal | Late = call.answered or await self.desk.identifier.asettle_late(request)
        except IdentityError as error:
            who = self.desk.nobody(error, needed=needed)
        self.desk.identified(call, who)

    async def _name(self, call: Call, request: HttpRequest) -> None:
        """Nothing was captured, so nobody was asked who is calling; what the call used is somebody's all the same."""
        await self._identify(call, request, needed=False)
        plan = self.desk.plan_named(call)
        if plan is not None:
            self.desk.named(call, await self._reserve(plan))

    async def _admit(self, call: Call) -> None:
        for stranger in self.desk.strangers(call):
            try:
                self.desk.met(stranger, await self.store.admit(*stranger, self.desk.today(), self.desk.new_values_max))
            except StoreUnavailable as error:
                self.desk.let_pass(call, error)

    async def _reserve(self, plan: Plan) -> Exchange | Refusal | Unguarded:
        try:
            outcome = await self.store.reserve(plan.wish)
            while isinstance(outcome, ClockApart):
                plan = plan.around(outcome.at)
                outcome = await self.store.reserve(plan.wish)
            return self.desk.read(plan, outcome)
        except StoreUnavailable as error:
            return self.desk.without_store(plan, error)
        except BaseException:  # whoever goes away while the store is asked (a cancelled task) takes the hold with it
            self.desk.undo(plan)
            raise

    async def _settle(self, closing: Closing) -> None:
        try:
            await self.store.settle(closing.settlement)
        except Exception as error:  # the store's, or of a number that no store can hold: the others settle all the same
            self.desk.keep_for_later(closing, error)
        finally:
            self.desk.let_go(closing)


class UserBlock:
    """A call opened by the app itself, as a context manager of both kinds. It gives the Call."""

    def __init__(self, desk: Desk, principal: Principal, feature: str | None, tags: Mapping[str, str]) -> None:
        self.desk = desk
        self.wanted = principal, feature, tags

    def __enter__(self) -> Call:
        call = self.desk.start_block(*self.wanted)
        return self._entered(Guard(self.desk).enter(call))

    def __exit__(self, *raised: object) -> None:
        self._left(raised)
        Guard(self.desk).close(self.call, DoorEnding())

    async def __aenter__(self) -> Call:
        call = self.desk.start_block(*self.wanted)
        return self._entered(await AsyncGuard(self.desk).enter(call))

    async def __aexit__(self, *raised: object) -> None:
        self._left(raised)
        await to_its_end(AsyncGuard(self.desk).close(self.call, DoorEnding()))

    def _entered(self, outcome: Call | Refusal) -> Call:
        self.outer = current_call()
        if isinstance(outcome, Refusal):
            self._tell_outer(outcome)
            raise LimitExceeded(outcome)
        self.call = outcome
        self.token = enter(outcome)
        return outcome

    def _left(self, raised: tuple[object, ...]) -> None:
        leave(self.token)
        if raised[0] is not None:
            self._tell_outer(self.call.refusal)

    def _tell_outer(self, refusal: Refusal | None) -> None:
        """A door around this block may see no more than the 500 that a framework makes of the exception."""
        if self.outer is not None and refusal is not None:
            self.outer.refusal = refusal


async def to_its_end(closing: Coroutine[Any, Any, None]) -> None:
    """Close, whatever becomes of the task that closes: a cancellation is passed on, and the closing goes on.

    What is cancelled by a scope (anyio's) is cancelled again at each of its awaits, so nothing may be left to them.
    An error of ours ends in the log: the caller has its answer.
    """
    task = asyncio.ensure_future(closing)
    _closing.add(task)
    task.add_done_callback(_closed)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        if not task.done():
            await asyncio.wait({task})
        raise
    except Exception:  # noqa: S110 - `_closed` has logged it
        pass


#: A loop itself holds no reference to its tasks.
_closing: set[asyncio.Task[None]] = set()


def _closed(task: asyncio.Task[None]) -> None:
    _closing.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("close_failed", exc_info=error)
