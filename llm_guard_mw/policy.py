"""Routes and limits: what is guarded, and which limits a call has to pass.

Rule 1. The first route in file order that matches guards the request.
Rule 2. Where a limit stands is what it counts: under a route that route's calls, elsewhere all of them.
Rule 3. Of several limits that share one balance exactly one applies to a call: one with a condition or of a tier
        before a plain one, else the lowest.

What a limit is stands in balances.py, how it is written in notation.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from types import MappingProxyType
from typing import Final, Literal

from llm_guard_mw.balances import NOTHING, Budgets, Limit, ScopeValues, encode
from llm_guard_mw.model import Principal, Tags
from llm_guard_mw.notation import Fault, NotationError, nearest, parse_limit, slugged

__all__ = [
    "Budgets", "CacheRule", "Fault", "Limit", "NotationError", "Policy", "Route", "ScopeValues", "compile_path",
    "encode", "parse_limit", "with_own_slugs",
]  # fmt: skip

StoreFailure = Literal["deny", "allow"]


_PARAMETER = re.compile(r"{([a-zA-Z_][a-zA-Z0-9_]*)(?::([a-zA-Z_][a-zA-Z0-9_]*))?}")
_CONVERTORS: Final = {
    "str": "[^/]+",
    "path": ".*",
    "int": "[0-9]+",
    "float": r"[0-9]+(\.[0-9]+)?",
    "uuid": "[0-9a-fA-F]{8}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{12}",
}
#: Values that only a pattern at least as wide would match.
_SAMPLES: Final = {
    "str": ("~é7", "x.y"),
    "path": ("~é7/x.y", ""),
    "int": ("90817263544",),
    "float": ("90817.26354", "90817263544"),
    "uuid": ("9b1deb4d-3b7d-4bad-9bdd-2b0d7b3dcb6d", "9b1deb4d3b7d4bad9bdd2b0d7b3dcb6d"),
}


def compile_path(path: str) -> re.Pattern[str]:
    """The pattern of a path in Starlette's syntax: `/users/{id:int}/files/{name:path}`. Raises ValueError.

    It matches what Starlette's own pattern matches, to the last detail (`$` also stands before a final newline):
    a path that the app serves and we do not know would not be guarded.
    """
    if not path.startswith("/"):
        raise ValueError(f'"{path}" does not begin with "/": write "/{path}"')
    pattern, at, seen = "^", 0, set()
    for match in _PARAMETER.finditer(path):
        name, convertor = match[1], match[2] or "str"
        if convertor not in _CONVERTORS:
            raise ValueError(
                f'unknown convertor "{convertor}" in "{match[0]}": {nearest(convertor, list(_CONVERTORS))}'
            )
        if name in seen:
            raise ValueError(f'"{path}" has two parameters called "{name}": give them different names')
        seen.add(name)
        pattern += _literal(path, path[at : match.start()]) + f"(?P<{name}>{_CONVERTORS[convertor]})"
        at = match.end()
    return re.compile(pattern + _literal(path, path[at:]) + "$")


def _shape(path: str) -> str:
    return _PARAMETER.sub("{}", path)


def _literal(path: str, text: str) -> str:
    # Starlette takes a stray brace as itself. In a guard's file it is a typing error that would leave a route open.
    if "{" in text or "}" in text:
        raise ValueError(f'"{path}" has a brace that belongs to no parameter: write "{{name}}" or "{{name:int}}"')
    if re.search(r"<[^>]*>", text):
        raise ValueError(
            f'"{path}" has a parameter in angle brackets: write "{{name}}", or "{{name:int}}" for <int:name>'
        )
    return re.escape(text)


@dataclass(frozen=True, slots=True)
class CacheRule:
    """Which answers a route keeps, and for whom."""

    ttl: int = 900  # seconds
    stale: int = 86_400  # seconds beyond the ttl in which a spent budget may still be answered with it
    scope: Literal["user", "tenant", "shared"] = "user"
    version: str = "1"


_route_keys = count()


@dataclass(frozen=True, slots=True)
class Route:
    """One guarded route of the app, as the file describes it, or `@guarded` at its view, or both."""

    path: str
    methods: frozenset[str] = frozenset({"POST"})
    name: str = ""  # default: the path
    feature: str | None = None
    api: str | None = None
    model: str | None = None  # a model's name, or "body:model"
    max_output_tokens: int | None = None
    max_input_tokens: int | None = None
    limits: tuple[Limit, ...] = ()
    degrade: tuple[str, ...] = ()  # of "cache", "model", in order
    cache: CacheRule | None = None
    usage: Literal["auto", "captured"] = "auto"
    on_store_failure: StoreFailure | None = None
    view: str | None = None  # "app.views:summarize", where that view is marked
    view_limits: tuple[Limit, ...] = ()  # what `@guarded` says there; of those on one balance the file's apply first
    pattern: re.Pattern[str] = field(init=False, compare=False, repr=False)
    #: Tells rules of one name apart: two apps of a process may each have a view at one path.
    key: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", compile_path(self.path))
        object.__setattr__(self, "key", next(_route_keys))
        if not self.name:
            object.__setattr__(self, "name", self.path)
        if "GET" in self.methods:  # Starlette answers HEAD with a GET route's handler
            object.__setattr__(self, "methods", self.methods | {"HEAD"})

    def matches(self, method: str, path: str) -> bool:
        return method in self.methods and self.pattern.match(path) is not None

    def same_place(self, other: Route) -> bool:
        """Whether both paths are written alike, whatever their parameters are called."""
        return _shape(self.path) == _shape(other.path)

    def covers(self, other: Route) -> bool:
        """Whether every path of `other` is one of this route, so far as some telling values can show."""
        return all(self.pattern.match(path) for path in other.samples())

    def samples(self) -> list[str]:
        """Paths of this route: one with the first value of each parameter's convertor, one with the last."""

        def filled(which: int) -> str:
            def sample(match: re.Match[str]) -> str:
                values = _SAMPLES[match[2] or "str"]
                return values[min(which, len(values) - 1)]

            return _PARAMETER.sub(sample, self.path)

        return [filled(0), filled(1)]


# ---------------------------------------------------------------- the policy


@dataclass(frozen=True, slots=True)
class Policy:
    """What is guarded, and how: everything a decision needs besides the balances.

    policy.route("POST", "/api/chat")
    policy.limits_for(route, principal, tags)
    """

    routes: tuple[Route, ...] = ()
    limits: tuple[Limit, ...] = ()
    tiers: Mapping[str, tuple[Limit, ...]] = field(default_factory=lambda: NOTHING, hash=False)
    models: Mapping[str, str] = field(default_factory=lambda: NOTHING, hash=False)  # the ladder down
    timezone: str = "UTC"
    lease_seconds: int = 120
    mode: Literal["enforce", "observe"] = "enforce"
    inspect_bytes: int = 1_048_576
    default_output_tokens: int = 256
    min_output_tokens: int = 256
    strict: bool = False
    unbounded: Literal["deny", "allow"] = "deny"
    journal_max: int = 1_000_000
    retention_days: int = 90
    new_scope_values: int = 1000
    on_store_failure: StoreFailure = "deny"
    unpriced: Literal["ceiling", "deny", "allow"] = "ceiling"
    budgets: Budgets = field(default_factory=Budgets)  # what a limit at a view says nothing about
    _table: _RouteTable = field(init=False, compare=False, repr=False)
    _plans: _Plans = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        limits, taken = with_own_slugs(self.limits, frozenset())
        tiers = {}
        for tier, under in self.tiers.items():
            tiers[tier], taken = with_own_slugs(under, taken)
        routes = tuple([replace(route, limits=with_own_slugs(route.limits, taken)[0]) for route in self.routes])
        everywhere = [*limits, *[limit for under in tiers.values() for limit in under]]
        object.__setattr__(self, "limits", limits)
        object.__setattr__(self, "tiers", MappingProxyType(tiers))
        object.__setattr__(self, "routes", routes)
        object.__setattr__(self, "_plans", _Plans(everywhere, taken, routes))
        object.__setattr__(self, "_table", _RouteTable(routes))

    @property
    def asks_tags(self) -> bool:
        """Whether any limit looks at a tag beyond feature and tier: at a workflow, a session, a variant, a free tag."""
        return self._plans.asks_tags

    def route(self, method: str, path: str) -> Route | None:
        """The first route in file order that guards `method` and `path`, None if none does."""
        return self._table.find(method, path)

    def joined(self, rule: Route | None, view: Route) -> Route:
        """One rule of the file's `rule` for a request and of what `@guarded` says at its `view`.

        What the file says wins. The limits of both count; of those on one balance, the file's where one applies.
        """
        if rule is not None:
            view = replace(
                rule,
                path=view.path,
                methods=rule.methods & view.methods,
                name=rule.name if rule.same_place(view) else view.name,
                feature=view.feature if rule.feature is None else rule.feature,
                model=view.model if rule.model is None else rule.model,
                view=view.view,
                view_limits=view.view_limits,
            )
        return self._plans.added(view)

    def scope_values(
        self,
        route: Route | None,
        principal: Principal,
        tags: Tags,
        *,
        feature: str | None = None,
        model: str | None = None,
    ) -> ScopeValues:
        """What the call stands for. `feature` wins over the route's, which wins over a trusted tag's."""
        if feature is None and route is not None:
            feature = route.feature
        return ScopeValues.of(principal, tags, feature=feature, model=model)

    def candidates(self, route: Route | None) -> tuple[Limit, ...]:
        """All limits that may count for some call of a route, whatever their conditions."""
        return self._plans.of(route).candidates

    def limits_for(
        self,
        route: Route | None,
        principal: Principal,
        tags: Tags,
        *,
        feature: str | None = None,
        model: str | None = None,
        key_limits: Sequence[Limit] = (),
    ) -> tuple[Limit, ...]:
        """All limits that count for this call: its route's, those over all calls, its tier's, and its key's.

        Of several that share a balance the first of these applies: one with a condition or under a tier, then the
        lowest.
        """
        plan = self._plans.of(route)
        if plan.always is not None and not key_limits:
            return plan.always
        if feature is None and route is not None:
            feature = route.feature
        chosen = plan.choose(principal, tags, feature, model)
        if not key_limits:
            return chosen
        return chosen + _Plan(key_limits).choose(principal, tags, feature, model)


class _Plans:
    """The plan of each route, and of what belongs to none. Rules of views come when their app is looked at."""

    def __init__(self, everywhere: Sequence[Limit], taken: frozenset[str], routes: Iterable[Route]) -> None:
        self._everywhere = everywhere
        self._taken = taken
        self._none = _Plan(everywhere)
        self._of: dict[int, _Plan] = {}
        self.asks_tags = any(map(_asks_tags, everywhere))
        for route in routes:
            self._add(route)

    def of(self, route: Route | None) -> _Plan:
        if route is None:
            return self._none
        return self._of.get(route.key) or self._add(route)

    def added(self, route: Route) -> Route:
        """A rule that is no part of the file, with slugs that nobody else has."""
        limits, _ = with_own_slugs([*route.limits, *route.view_limits], self._taken)
        own = len(route.limits)
        route = replace(route, limits=limits[:own], view_limits=limits[own:])
        self._add(route)
        return route

    def _add(self, route: Route) -> _Plan:
        plan = _Plan([*route.limits, *self._everywhere], route.view_limits)
        self.asks_tags |= any(map(_asks_tags, (*route.limits, *route.view_limits)))
        self._of[route.key] = plan
        return plan


class _Plan:
    """The limits that may count for a route, sorted once: each balance with its candidates, best first.

    Those of a view come behind the file's: they apply where none of the file does.
    """

    #: More kinds of callers than this are sorted out anew each time.
    _KINDS_MAX = 4096

    def __init__(self, limits: Iterable[Limit], of_view: Iterable[Limit] = ()) -> None:
        ranked: dict[tuple[tuple[str, ...], str], list[tuple[bool, Limit]]] = {}
        for behind, limit in [*[(False, limit) for limit in limits], *[(True, limit) for limit in of_view]]:
            ranked.setdefault((limit.scope, limit.counted), []).append((behind, limit))
        groups = [sorted(group, key=lambda one: (one[0], _precedence(one[1]))) for group in ranked.values()]
        self._groups = tuple([tuple([limit for _, limit in group]) for group in groups])
        self.candidates = tuple([limit for group in self._groups for limit in group])
        asked: dict[str, set[str]] = {}
        for group in self._groups:
            for limit in group:
                for key, wanted in limit.conditions:
                    asked.setdefault(key, set()).update(wanted)
        self._asked = tuple(asked.items())
        self._kinds: dict[tuple[str | None, ...], tuple[Limit, ...]] = {}
        #: What counts for every caller, where no limit has a condition.
        self.always = None if asked else tuple([group[0] for group in self._groups])

    def choose(self, principal: Principal, tags: Tags, feature: str | None, model: str | None) -> tuple[Limit, ...]:
        # Two callers who look alike to every condition get the same limits.
        facts = [(_fact(key, principal, tags, feature, model), wanted) for key, wanted in self._asked]
        kind = tuple([value if value in wanted else None for value, wanted in facts])
        chosen = self._kinds.get(kind)
        if chosen is None:
            known = dict(zip([key for key, _ in self._asked], kind, strict=True))
            found = [_first_that_holds(group, known) for group in self._groups]
            chosen = tuple([limit for limit in found if limit is not None])
            if len(self._kinds) < self._KINDS_MAX:
                self._kinds[kind] = chosen
        return chosen


def _asks_tags(limit: Limit) -> bool:
    asked = {*limit.scope, *[key for key, _ in limit.conditions]}
    return not asked <= {"global", "tenant", "user", "key", "tier", "feature", "model"}


def _fact(key: str, principal: Principal, tags: Tags, feature: str | None, model: str | None) -> str | None:
    """What a condition on `key` looks at. Untrusted tags say nothing here, as in ScopeValues.of."""
    if key == "user":
        return principal.user
    if key == "tenant":
        return principal.tenant
    if key == "model":
        return model
    if key == "tier":
        return principal.tier if principal.tier is not None or not tags.trusted else tags.tier
    if key == "feature":
        return feature if feature is not None or not tags.trusted else tags.feature
    if not tags.trusted:
        return None
    name = key.removeprefix("tag:")
    if name == "experiment":
        return tags.experiment
    return tags.variant if name == "variant" else dict(tags.free).get(name)


def _first_that_holds(group: tuple[Limit, ...], facts: Mapping[str, str | None]) -> Limit | None:
    for limit in group:
        if all(facts[key] in wanted for key, wanted in limit.conditions):
            return limit
    return None


def _precedence(limit: Limit) -> tuple[bool, int, int]:
    return not limit.conditions, limit.ceiling() if limit.is_budget else limit.amount, limit.capacity


class _RouteTable:
    """Routes by method and path: plain paths in one look-up, patterns one after the other."""

    def __init__(self, routes: tuple[Route, ...]) -> None:
        self._routes = routes
        self._plain: dict[tuple[str, str], int] = {}
        self._patterns: list[tuple[int, Route]] = []
        for number, route in enumerate(routes):
            if "{" in route.path:
                self._patterns.append((number, route))
                continue
            for method in route.methods:
                self._plain.setdefault((method, route.path), number)

    def find(self, method: str, path: str) -> Route | None:
        plain = self._plain.get((method, path))
        if plain is None and path.endswith("\n"):  # `$` stands before a final newline too, in Starlette as in ours
            plain = self._plain.get((method, path[:-1]))
        for number, route in self._patterns:
            if plain is not None and number > plain:
                break
            if route.matches(method, path):
                return route
        return None if plain is None else self._routes[plain]


def with_own_slugs(limits: Iterable[Limit], taken: frozenset[str]) -> tuple[tuple[Limit, ...], frozenset[str]]:
    """The limits with slugs that nobody else has: a second "usd-day-user" says where it stands, or gets a number."""
    named: list[Limit] = []
    names = set(taken)
    for limit in limits:
        place = limit.place if limit.tier is None else f"tier {limit.tier}"
        wished = [limit.slug, f"{limit.slug}-{slugged(place)}"]
        numbered = (f"{limit.slug}-{number}" for number in range(2, len(names) + 3))
        slug = next(name for name in (*wished, *numbered) if name not in names)
        names.add(slug)
        named.append(limit if slug == limit.slug else replace(limit, slug=slug))
    return tuple(named), frozenset(names)
