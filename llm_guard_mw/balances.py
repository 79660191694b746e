"""What a limit counts, and the name of the balance that it looks at.

Rule 1. A balance's name holds what the limit counts, never how much it allows: `subject|field`, where the
        subject is the scope with its values and the field is kind, unit, period, anchor, timezone and place.
        So an edit of an amount keeps what was spent. A changed name would reset everyone's limits; a golden
        test pins it.
Rule 2. Values are percent-encoded before they enter a name, and what is missing is `*none`, which no value
        encodes to. No id can collide with another, or leave its place.
Rule 3. Only trusted tags choose a balance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, cast
from urllib.parse import quote

import msgspec

from llm_guard_mw.arithmetic import Period
from llm_guard_mw.model import Kind, Principal, Tags, Unit

BUDGET_UNITS: Final = frozenset({Unit.USD, Unit.TOKENS, Unit.INPUT_TOKENS, Unit.OUTPUT_TOKENS, Unit.CREDITS})
#: The order in which the parts of a subject are written.
SCOPES: Final = ("global", "tenant", "user", "key", "tier", "feature", "model", "workflow", "session")
#: What a scope stands within: its parents are written before it, whether the limit names them or not.
_PARENTS: Final[Mapping[str, tuple[str, ...]]] = {
    "user": ("tenant",),
    "workflow": ("tenant",),
    "session": ("tenant", "user"),
    "tag": ("tenant",),
}
_DEFAULT_PARTS: Final = {
    "warning": Fraction(7, 10),
    "critical": Fraction(9, 10),
    "hard": Fraction(1),
    "overdraft": Fraction(1, 10),
}
NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})  # Any: empty mappings are of every type


def _nothing() -> Mapping[str, Any]:
    return NOTHING


# ---------------------------------------------------------------- names


def encode(value: str) -> str:
    """`value` with everything but `[A-Za-z0-9._-]` percent-encoded as UTF-8."""
    # quote() keeps "~" as well. Headers may carry bytes that are no characters: those arrive as lone surrogates.
    return quote(value, safe="", errors="surrogatepass").replace("~", "%7E")


class ScopeValues(msgspec.Struct, frozen=True, gc=False):
    """Who and what a call stands for, as far as it may choose balances."""

    user: str | None = None
    tenant: str | None = None
    feature: str | None = None
    model: str | None = None
    key: str | None = None
    tier: str | None = None
    workflow: str | None = None
    session: str | None = None
    tags: Mapping[str, str] = msgspec.field(default_factory=_nothing)

    @classmethod
    def of(
        cls, principal: Principal, tags: Tags, *, feature: str | None = None, model: str | None = None
    ) -> ScopeValues:
        """What the principal and the trusted part of `tags` stand for. A `feature` given here wins over the tag's."""
        if not tags.trusted:
            return cls(principal.user, principal.tenant, feature, model, principal.key_id, principal.tier)
        named = dict(tags.free)
        if tags.experiment is not None:
            named["experiment"] = tags.experiment
        if tags.variant is not None:
            named["variant"] = tags.variant
        return cls(
            principal.user,
            principal.tenant,
            feature if feature is not None else tags.feature,
            model,
            principal.key_id,
            # What a credential binds wins over what its holder says.
            principal.tier if principal.tier is not None else tags.tier,
            tags.workflow_id,
            tags.session_id,
            named,
        )

    def value(self, scope: str) -> str | None:
        """The value of `scope` ("user", "tag:team"), None where there is none."""
        return cast("str | None", getattr(self, scope)) if scope in SCOPES else self.tags.get(scope[4:])

    def part(self, scope: str) -> str:
        """One part of a subject: `user=alice`, `tag:team=*none`, `global`."""
        return scope if scope == "global" else _part(scope, self.value(scope))


@lru_cache(maxsize=8192)
def _part(scope: str, value: str | None) -> str:
    name = "tag:" + encode(scope[4:]) if scope.startswith("tag:") else scope
    return f"{name}=*none" if value is None else f"{name}={encode(value)}"


# ---------------------------------------------------------------- a limit


@dataclass(frozen=True, slots=True)
class Budgets:
    """Where a budget warns and ends, as parts of its amount."""

    warning: Fraction = _DEFAULT_PARTS["warning"]
    critical: Fraction = _DEFAULT_PARTS["critical"]
    hard: Fraction = _DEFAULT_PARTS["hard"]
    overdraft: Fraction = _DEFAULT_PARTS["overdraft"]


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit, read. `amount` and `capacity` are in its unit (nano-dollars for USD).

    `scope` is in canonical order and leaves out what another part of it implies: `tenant+user` is `("user",)`.
    """

    text: str
    slug: str
    kind: Kind
    unit: Unit
    amount: int
    capacity: int
    scope: tuple[str, ...]
    place: str = "all"  # "route NAME", "all", "key ID"
    period_ms: int | None = None  # buckets
    tick_ms: int = 1
    period: Period | None = None  # calendar budgets
    anchor: int = 0
    timezone: str = ""
    when: Mapping[str, tuple[str, ...]] = field(default_factory=_nothing, hash=False)
    tier: str | None = None  # the [tiers.X] it stands under
    warning: Fraction = _DEFAULT_PARTS["warning"]
    critical: Fraction = _DEFAULT_PARTS["critical"]
    hard: Fraction = _DEFAULT_PARTS["hard"]
    overdraft: Fraction = _DEFAULT_PARTS["overdraft"]
    counted: str = field(init=False, compare=False, repr=False)
    subject_scopes: tuple[str, ...] = field(init=False, compare=False, repr=False)
    full: int = field(init=False, compare=False, repr=False)  # the ceiling of full service
    period_ticks: int = field(init=False, compare=False, repr=False)  # a bucket's period, in `tick_ms`; else 0
    conditions: tuple[tuple[str, frozenset[str]], ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        written = self.period or ("total" if self.kind is Kind.TOTAL else str(self.period_ms or ""))
        parts = (self.kind, self.unit, written, str(self.anchor), self.timezone, self.place)
        object.__setattr__(self, "counted", ":".join([encode(str(part)) for part in parts]))
        object.__setattr__(self, "subject_scopes", _with_parents(self.scope))
        conditions = [(key, frozenset(values)) for key, values in self.when.items()]
        if self.tier is not None:
            conditions.append(("tier", frozenset({self.tier})))
        object.__setattr__(self, "conditions", tuple(conditions))
        object.__setattr__(self, "full", self.ceiling())
        object.__setattr__(self, "period_ticks", 0 if self.period_ms is None else self.period_ms // self.tick_ms)

    @property
    def is_budget(self) -> bool:
        """Calendar or total, in something that a cheaper answer can save."""
        return self.kind in (Kind.CALENDAR, Kind.TOTAL) and self.unit in BUDGET_UNITS

    def ceiling(self, degraded: bool = False) -> int:
        """What `spent + held` may reach: by full service, or by a cheaper model (`degraded`)."""
        if not self.is_budget:
            return self.capacity
        part = self.hard + self.overdraft if degraded else self.hard
        return self.amount * part.numerator // part.denominator

    def balance(self, values: ScopeValues) -> str:
        """The name of the balance that this limit looks at for a call of `values`."""
        return "&".join([values.part(scope) for scope in self.subject_scopes]) + "|" + self.counted


def _with_parents(scope: tuple[str, ...]) -> tuple[str, ...]:
    parts = {above for part in scope for above in _PARENTS.get(part.partition(":")[0], ())}
    return tuple(sorted(parts | set(scope), key=_scope_order))


def without_implied(scope: Iterable[str]) -> tuple[str, ...]:
    implied = {above for part in scope for above in _PARENTS.get(part.partition(":")[0], ())}
    return tuple(sorted(set(scope) - implied, key=_scope_order))


def _scope_order(scope: str) -> tuple[int, str]:
    return (SCOPES.index(scope), "") if scope in SCOPES else (len(SCOPES), scope)
