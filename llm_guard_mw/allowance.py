"""What is left to a caller: each limit that counts for somebody, and how their balance of it stands.

For a page that shows people their own budget. It only reads: nothing is held, nothing counts as a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from decimal import Decimal

import msgspec

from llm_guard_mw.arithmetic import drain, utc, wait_ticks, window_at
from llm_guard_mw.balances import Limit, ScopeValues
from llm_guard_mw.model import Kind, Principal, Tags, Unit
from llm_guard_mw.policy import Policy
from llm_guard_mw.stores.protocol import BalanceState


class Allowance(msgspec.Struct, frozen=True, gc=False):
    """One limit, and what it leaves. Amounts are dollars (`Decimal`) where `unit` is "usd", else whole numbers.

    `held` is what calls under way may still use. A bucket has nothing left when calls overdrew it, and a budget too:
    `left` is never below 0.
    """

    limit: str  # as the configuration writes it: "$2/day per user"
    place: str  # whose calls it counts: "route chat", or "all"
    scope: tuple[str, ...]  # by whom it counts them: ("user",)
    unit: Unit
    amount: Decimal | int
    spent: Decimal | int
    held: Decimal | int
    left: Decimal | int
    resets_at: datetime | None  # UTC: a budget's next window, or when a bucket is full again; None: never, or it is

    @property
    def used_percent(self) -> int:
        """How much of it is spent or held, 0 to 100."""
        if not self.amount:
            return 100
        return int(100 - 100 * self.left / self.amount)


def limits_of(policy: Policy, who: Principal) -> dict[str, Limit]:
    """The limits that count for `who`, by balance, in the order of the file. Not concurrency: it is no amount.

    What a call says only when it comes (its session, its tags, a model of its own) chooses balances that nobody can
    name here: such limits are left out.
    """
    found: dict[str, Limit] = {}
    for route in policy.routes or (None,):
        feature = None if route is None else route.feature
        model = None if route is None or route.model == "body:model" else route.model
        values = policy.scope_values(route, who, Tags(), feature=feature, model=model)
        for limit in policy.limits_for(route, who, Tags(), feature=feature, model=model):
            if limit.kind is not Kind.CONCURRENT and _can_be_named(limit, values):
                found.setdefault(limit.balance(values), limit)
    return found


def _can_be_named(limit: Limit, values: ScopeValues) -> bool:
    return all(
        values.value(scope) is not None
        for scope in limit.scope
        if scope in ("key", "model", "workflow", "session") or scope.startswith("tag:")
    )


def allowances(limits: Mapping[str, Limit], states: Iterable[BalanceState], at: int) -> tuple[Allowance, ...]:
    """The limits with their balances as they stand `at` (ms). A balance that the store does not know is untouched."""
    known = {state.balance: state for state in states}
    return tuple([_allowance(limit, known.get(balance), at) for balance, limit in limits.items()])


def _allowance(limit: Limit, state: BalanceState | None, at: int) -> Allowance:
    spent, held, resets_at = _standing(limit, state, at)
    return Allowance(
        limit=limit.text,
        place=limit.place,
        scope=limit.scope,
        unit=limit.unit,
        amount=_readable(limit.unit, limit.full),
        spent=_readable(limit.unit, spent),
        held=_readable(limit.unit, held),
        left=_readable(limit.unit, max(0, limit.full - spent - held)),
        resets_at=resets_at,
    )


def _standing(limit: Limit, state: BalanceState | None, at: int) -> tuple[int, int, datetime | None]:
    if limit.period is not None:
        window = window_at(limit.period, limit.anchor, limit.timezone, at)
        if state is None or state.window_start < window.start:  # nobody has spent in this window
            return 0, 0, utc(window.end)
        return state.spent, state.held, utc(window.end)
    if state is None:
        return 0, 0, None
    if limit.kind is not Kind.BUCKET:
        return state.spent, state.held, None
    tick, period = limit.tick_ms, limit.period_ticks
    used, rem, stamp = drain(state.spent, state.rem, state.stamp // tick, at // tick, limit.amount, period)
    wait = wait_ticks(used, rem, limit.amount, period)
    return used, state.held, utc((stamp + wait) * tick) if wait else None


def _readable(unit: Unit, amount: int) -> Decimal | int:
    return Decimal(amount).scaleb(-9) if unit is Unit.USD else amount
