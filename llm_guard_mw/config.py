"""The configuration: a TOML file and the environment, checked at once, made into frozen objects.

Rule 1. Everything wrong is reported together: where it stands, what stands there, what would be right.
Rule 2. A key that is not known is a mistake. So is a key of a later feature that is misshapen: files are written
        once, and what is written must hold when the feature comes.
Rule 3. Defaults stand in one place, the dataclasses that are built here.
Rule 4. No secret is shown in a message, and a secret that is named (`env:NAME`) must be there.

`LLM_GUARD_BUDGETS__HARD=1.1` in the environment wins over the file.
docs/reference/config.md describes every key.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import urlsplit

from llm_guard_mw.balances import Budgets, Limit
from llm_guard_mw.config_file import (
    DEFAULT_STORE,
    Document,
    File,
    IdentityTable,
    JWTTable,
    Place,
    RouteTable,
    UpstreamTable,
    default_of,
    known_keys,
    name_of,
    shown,
    undotted,
)
from llm_guard_mw.errors import ConfigError, Mistake
from llm_guard_mw.identity import IdentityRules, JWTRules, identity_mistakes
from llm_guard_mw.metering import API_NAMES, PROVIDER_NAMES
from llm_guard_mw.notation import NotationError, known_timezone, nearest, nearest_timezone, parse_limit
from llm_guard_mw.policy import CacheRule, Policy, Route, compile_path
from llm_guard_mw.pricing import ModelPrice, PriceBook, PriceRules
from llm_guard_mw.stores import redis_address

DEFAULT_PATH: Final = "llm_guard.toml"
_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "QUERY")
_RUNGS: Final = ("cache", "model")
#: The wire families that a route's own bodies may have.
APIS: Final = (*API_NAMES, "openai.moderations")
PROVIDERS: Final = (*PROVIDER_NAMES, "gemini", "openai-compatible")
_STORE_SCHEMES: Final = ("sqlite", *redis_address.SCHEMES)
_LATER_STORE_SCHEMES: Final = ("redis+cluster", "rediss+cluster")
_LEDGER_SCHEMES: Final = ("sqlite", "postgresql", "postgresql+psycopg")


# ---------------------------------------------------------------- what it gives


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where the gateway sends what comes in under `prefix`. Without a provider it is an app of one's own."""

    prefix: str
    url: str
    provider: str | None = None
    api_key: str | None = None  # "env:NAME" or "file:PATH", read by the gateway


@dataclass(frozen=True, slots=True)
class Alert:
    """Who is told when a budget warns."""

    to: str = field(repr=False)  # a webhook's address is as good as a key


@dataclass(frozen=True, slots=True)
class Config:
    """A checked configuration. Two of them say the same if their digests are equal.

    `warnings` are what is probably not meant, though it can be used.
    """

    store: str = field(default=DEFAULT_STORE, repr=False)  # a URL may hold a password
    ledger: str = field(default=DEFAULT_STORE, repr=False)
    policy: Policy = field(default_factory=Policy)
    identity: IdentityRules = field(default_factory=IdentityRules)
    prices: PriceRules = field(default_factory=PriceRules)
    upstreams: tuple[Upstream, ...] = ()
    alerts: tuple[Alert, ...] = ()
    warnings: tuple[Mistake, ...] = field(default=(), compare=False)
    source: str = field(default="configuration", compare=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        said = [
            getattr(self, name) for name in ("store", "ledger", "policy", "identity", "prices", "upstreams", "alerts")
        ]
        content = json.dumps(_canonical(said), sort_keys=True)
        object.__setattr__(self, "digest", hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest())


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any] = DEFAULT_PATH,
    *,
    environ: Mapping[str, str] | None = None,
    check: bool = False,
) -> Config:
    """The configuration in the file `source`, or in a mapping of the same shape, with the environment's overrides.

        load_config("llm_guard.toml")
        load_config({"limits": ["$5/day global"]})

    Raises ConfigError with every mistake. `check` also looks for models without a price, which takes longer; they
    are in `.warnings`.
    """
    environ = os.environ if environ is None else environ
    document = Document.of_mapping(source) if isinstance(source, Mapping) else Document.of_file(source)
    document.override(environ)
    file = document.read()
    loaded = _Build(document, file, environ).config()
    if document.mistakes:
        raise ConfigError(document.mistakes_in_order())
    if check:
        unpriced = _unpriced_models(document, loaded)
        loaded = Config(
            **{name: getattr(loaded, name) for name in _init_names(Config) if name != "warnings"},
            warnings=(*loaded.warnings, *unpriced),
        )
    return loaded


def sample_config() -> str:
    """What `llm-guard-mw init` writes: every key with its default, three of them at work."""
    return (resources.files("llm_guard_mw") / "sample.toml").read_text(encoding="utf-8")


def _init_names(of: type) -> list[str]:
    return [known.name for known in fields(of) if known.init]


# ---------------------------------------------------------------- the objects


class _Build:
    """Makes the frozen objects, and notes what cannot hold together."""

    def __init__(self, document: Document, file: File, environ: Mapping[str, str]) -> None:
        self._document = document
        self._mistake = document.mistake
        self._file = file
        self._environ = environ
        self._warnings: list[Mistake] = []

    def config(self) -> Config:
        file = self._file
        self._check_url("store", file.store, _STORE_SCHEMES, _LATER_STORE_SCHEMES)
        self._check_url("ledger", file.ledger, _LEDGER_SCHEMES, ())
        budgets = self._budgets()
        self._check_ladder()
        self._warn_of_what_comes_later()
        return Config(
            store=file.store,
            ledger=file.ledger,
            policy=self._policy(budgets),
            identity=self._identity(),
            prices=self._prices(),
            upstreams=tuple(self._upstreams()),
            alerts=tuple(self._alerts()),
            warnings=tuple(self._warnings),
            source=self._document.name,
        )

    def _warn(self, place: Place, problem: str, fix: str) -> None:
        self._warnings.append(self._document.noted(place, problem, fix))

    def _warn_of_what_comes_later(self) -> None:
        """Files are written once: what later versions will do is checked and kept, and does nothing yet."""
        places: list[Place] = [("routes", number, "degrade") for number, r in enumerate(self._file.routes) if r.degrade]
        places += [("routes", number, "cache") for number, r in enumerate(self._file.routes) if r.cache is not None]
        places += [("upstreams", number) for number in range(len(self._file.upstreams))]
        places += [("alerts", number) for number in range(len(self._file.alerts))]
        for place in places:
            key = place[-1] if isinstance(place[-1], str) else place[0]
            self._warn(place, f"{key} is understood, but does nothing in this version yet", "it may stay")

    # ------------------------------------------------------------ store and ledger

    def _check_url(self, key: str, url: str, schemes: Sequence[str], later: Sequence[str]) -> None:
        scheme, separator, rest = url.partition("://")
        scheme = scheme.lower()
        example = f'write "{DEFAULT_STORE}"'
        if separator and scheme in later:
            problem = f"{key} = {shown(url)} is not available yet: it comes with Redis Cluster"
            self._mistake((key,), problem, f'{example}, or "redis://…" of a single server, for now')
        elif not separator:
            self._mistake((key,), f"{key} = {shown(url)} is not a URL", f'{example}, with the path behind "///"')
        elif scheme not in schemes:
            fix = 'write "postgresql://…"' if scheme == "postgres" else nearest(scheme, schemes)
            self._mistake((key,), f'{key}: unknown scheme "{scheme}"', fix)
        elif scheme in redis_address.SCHEMES:
            try:
                redis_address.read_url(url)
            except ConfigError as error:
                problem = error.mistakes[0].problem.removeprefix("store: ")
                self._mistake((key,), f"{key}: {problem}", 'write "redis://user:password@host:6379/0"')
        elif scheme == "sqlite" and not (rest.startswith("/") and len(rest) > 1):
            fix = f'write three slashes: "sqlite:///{rest.lstrip("/") or "llm_guard.db"}"'
            self._mistake((key,), f"{key} = {shown(url)} names no file", fix)
        elif scheme == "sqlite" and rest.lstrip("/").startswith(":memory:"):
            problem = f"{key} = {shown(url)} would be lost with the process, and others could not see it"
            self._mistake((key,), problem, f"{example}, or a path of your own")

    # ------------------------------------------------------------ limits, routes, tiers

    def _budgets(self) -> Budgets:
        said = self._file.budgets
        budgets = Budgets(said.warning, said.critical, said.hard, said.overdraft)
        if budgets.hard < budgets.critical:
            key = "hard" if "hard" in said.model_fields_set else "critical"
            problem = f"hard = {float(budgets.hard):g} is below critical = {float(budgets.critical):g}"
            self._mistake(
                ("budgets", key), problem, "a budget is called critical before it ends: raise hard or lower critical"
            )
            return Budgets(said.warning, said.critical, said.critical, said.overdraft)
        return budgets

    def _policy(self, budgets: Budgets) -> Policy:
        file = self._file
        timezone = self._timezone()

        def limits(said: tuple[Any, ...], at: Place, where: str, tier: str | None = None) -> tuple[Limit, ...]:
            return tuple(self._limits(said, at, place=where, timezone=timezone, budgets=budgets, tier=tier))

        routes = []
        for number, route in enumerate(file.routes):
            built = self._route(number, route, limits)
            if built is not None:
                routes.append((number, built))
        self._check_routes(routes)
        return Policy(
            routes=tuple([route for _, route in routes]),
            limits=limits(file.limits, ("limits",), "all"),
            tiers=MappingProxyType(
                {name: limits(tier.limits, ("tiers", name, "limits"), "all", name) for name, tier in file.tiers.items()}
            ),
            models=MappingProxyType(dict(file.models)),
            timezone=timezone,
            lease_seconds=file.lease_seconds,
            mode=file.mode,
            inspect_bytes=file.inspect_bytes,
            default_output_tokens=file.default_output_tokens,
            min_output_tokens=file.min_output_tokens,
            strict=file.strict,
            unbounded=file.unbounded,
            journal_max=file.journal_max,
            retention_days=file.retention_days,
            new_scope_values=file.new_scope_values,
            on_store_failure=file.on_store_failure,
            unpriced=file.prices.unpriced,
        )

    def _timezone(self) -> str:
        name = self._file.timezone
        if known_timezone(name):
            return name
        self._mistake(("timezone",), f"unknown timezone {shown(name)}", nearest_timezone(name))
        return "UTC"

    def _limits(
        self,
        said: tuple[Any, ...],
        at: Place,
        *,
        place: str,
        timezone: str,
        budgets: Budgets,
        tier: str | None,
    ) -> Iterator[Limit]:
        plain: dict[tuple[object, ...], Limit] = {}
        for number, limit in enumerate(said):
            here = (*at, number)
            if not isinstance(limit, str | Mapping):
                fix = 'write "$2/day per user", or { limit = "$2/day per user", … }'
                self._mistake(here, f"{shown(limit)} is not a limit", fix)
                continue
            try:
                read = parse_limit(limit, place=place, timezone=timezone, budgets=budgets, tier=tier)
            except NotationError as error:
                for fault in error.faults:
                    below = (*here, fault.key) if fault.key and isinstance(limit, Mapping) else here
                    self._mistake(below, _quoting(limit, fault.problem), fault.fix)
                continue
            if not read.when and (other := plain.setdefault((read.scope, read.counted), read)) is not read:
                problem = f'"{read.text}" and "{other.text}" count the same: only the lower one applies'
                self._warn(here, problem, "keep one of them, or give one a condition")
            yield read

    def _route(self, number: int, said: RouteTable, limits: Callable[..., tuple[Limit, ...]]) -> Route | None:
        here: Place = ("routes", number)
        name = said.name or said.path or f"#{number}"
        read = limits(said.limits, (*here, "limits"), f"route {name}")
        self._check_methods(here, said)
        self._check_model(here, said)
        self._check_degrade(here, said)
        if said.api is not None and said.api not in APIS:
            self._mistake((*here, "api"), f"unknown api {shown(said.api)}", nearest(said.api, APIS))
        if said.path is None:
            if not self._document.took_out((*here, "path")):
                self._mistake(here, "the route has no path", 'add path = "/api/chat"')
            return None
        try:
            compile_path(said.path)
        except ValueError as error:
            problem, _, fix = str(error).partition(": ")
            self._mistake((*here, "path"), problem, fix)
            return None
        cache = said.cache
        return Route(
            path=said.path,
            methods=frozenset(method.upper() for method in said.methods),
            name=name,
            feature=said.feature,
            api=said.api,
            model=said.model,
            max_output_tokens=said.max_output_tokens,
            max_input_tokens=said.max_input_tokens,
            limits=read,
            degrade=said.degrade,
            cache=None if cache is None else CacheRule(cache.ttl, cache.stale, cache.scope, cache.version),
            usage=said.usage,
            on_store_failure=said.on_store_failure,
        )

    def _check_methods(self, here: Place, said: RouteTable) -> None:
        if not said.methods:
            self._mistake((*here, "methods"), "methods is empty", 'write ["POST"], or leave it out')
        for number, method in enumerate(said.methods):
            if method.upper() == "OPTIONS":
                self._mistake((*here, "methods", number), "OPTIONS is never guarded", "leave it out")
            elif method.upper() not in _METHODS:
                self._mistake((*here, "methods", number), f"unknown method {shown(method)}", nearest(method, _METHODS))

    def _check_model(self, here: Place, said: RouteTable) -> None:
        if said.model is not None and said.model.startswith("body:") and said.model != "body:model":
            problem = f"model = {shown(said.model)} cannot be read off a body"
            self._mistake((*here, "model"), problem, 'write "body:model", or the name of a model')

    def _check_degrade(self, here: Place, said: RouteTable) -> None:
        for number, rung in enumerate(said.degrade):
            if rung not in _RUNGS:
                self._mistake((*here, "degrade", number), f"unknown rung {shown(rung)}", nearest(rung, _RUNGS))
            elif rung in said.degrade[:number]:
                self._mistake((*here, "degrade", number), f"{shown(rung)} stands there twice", "keep the first one")
        if "model" in said.degrade:
            named = said.model is not None and not said.model.startswith("body:")
            if named and said.model not in self._file.models:
                problem = f'degrade has "model", but [models] names no cheaper one for {shown(said.model)}'
                fix = f'add {json.dumps(said.model)} = "…" under [models], or take "model" out'
                self._mistake((*here, "degrade"), problem, fix)
            elif not self._file.models:
                fix = 'add "gpt-4o" = "gpt-4o-mini" under [models], or take "model" out'
                self._mistake((*here, "degrade"), 'degrade has "model", but there is no [models]', fix)
        if "cache" in said.degrade and said.cache is None:
            self._warn(
                (*here, "degrade"), 'degrade has "cache", but the route keeps no answers', "add cache = { ttl = 900 }"
            )

    def _check_routes(self, routes: Sequence[tuple[int, Route]]) -> None:
        names: dict[str, int] = {}
        for index, (number, route) in enumerate(routes):
            here: Place = ("routes", number)
            first = names.setdefault(route.name, number)
            reached = {
                method
                for method in route.methods
                if not any(method in above.methods and above.covers(route) for _, above in routes[:index])
            }
            if route.methods and not reached:
                above_number, above = next(
                    (at, above) for at, above in routes[:index] if above.methods & route.methods and above.covers(route)
                )
                problem = f"{shown(route.path)} is never reached: routes[{above_number}] {shown(above.path)} takes it"
                fix = "remove one of them" if above.path == route.path else f"move it above routes[{above_number}]"
                self._mistake((*here, "path"), problem, fix)
            elif first != number:
                key = "name" if self._file.routes[number].name else "path"
                problem = f"routes[{first}] is called {shown(route.name)} as well, and names are what balances go by"
                self._mistake((*here, key), problem, f'add name = "{route.name}-{number}" or another of its own')

    def _check_ladder(self) -> None:
        ladder = self._file.models
        reported: set[str] = set()
        for start in ladder:
            steps = [start]
            while (below := ladder.get(steps[-1])) is not None and below not in steps:
                steps.append(below)
            if below == start and start not in reported:
                reported.update(steps)
                problem = f"the ladder goes in a circle: {' → '.join([*steps, start])}"
                self._mistake(
                    ("models", start), problem, "each step leads down to a cheaper model: take one of them out"
                )

    # ------------------------------------------------------------ identity

    def _identity(self) -> IdentityRules:
        said = self._file.identity
        rules = IdentityRules(
            user=said.user,
            tenant=said.tenant,
            tier=said.tier,
            trusted_proxies=said.trusted_proxies,
            anonymous=said.anonymous,
            jwt=None if said.jwt is None else self._jwt(said.jwt),
        )
        for mistake in identity_mistakes(rules):
            self._mistake(undotted(mistake.where), mistake.problem, mistake.fix)
        self._check_sources(said)
        return rules

    def _check_sources(self, said: IdentityTable) -> None:
        believed = bool(said.trusted_proxies)
        for role in ("user", "tenant", "tier"):
            sources: tuple[str, ...] = getattr(said, role)
            written = role in said.model_fields_set
            if written and sources == default_of(IdentityRules, role) and said.jwt is None:
                fix = "add [identity.jwt] with algorithms and one of key, jwks, jwks_file; or take the source out"
                self._mistake(
                    ("identity", role, 0), f'"{sources[0]}" is asked for, but there is no [identity.jwt]', fix
                )
            if written and sources and not believed and all(source.startswith("header:") for source in sources):
                problem = f"{role} comes from headers only, and nobody is trusted to send them"
                self._warn(("identity", role), problem, "name your proxies in trusted_proxies")
        everything = (*said.user, *said.tenant, *said.tier)
        if said.jwt is not None and not any(source.startswith("jwt:") for source in everything):
            self._warn(("identity", "jwt"), "no source reads tokens", 'add "jwt:sub" to user')

    def _jwt(self, said: JWTTable) -> JWTRules:
        here: Place = ("identity", "jwt")
        return JWTRules(
            algorithms=said.algorithms,
            key=None if said.key is None else self._secret((*here, "key"), said.key),
            jwks=said.jwks,
            jwks_file=None if said.jwks_file is None else self._file_beside((*here, "jwks_file"), said.jwks_file),
            audience=said.audience,
            issuer=said.issuer,
            leeway_seconds=said.leeway_seconds,
            require=said.require,
        )

    def _secret(self, place: Place, reference: str) -> str:
        """What `env:NAME` or `file:PATH` holds. A public key may stand in the file itself; a secret may not."""
        kind, _, name = reference.partition(":")
        if kind == "env" and name:
            value = self._environ.get(name, "")
            if not value:
                self._mistake(place, f"the environment has no {name}", f"set {name}, or name another variable")
            return value or "missing"
        if kind == "file" and name:
            path = self._file_beside(place, name)
            try:
                return Path(path).read_text(encoding="utf-8").strip() or "missing"
            except (OSError, ValueError):
                return "missing"  # noted by _file_beside
        if reference.lstrip().startswith("-----BEGIN PUBLIC KEY-----"):
            return reference
        problem = f"{name_of(place)} is written out, and keys do not belong in this file"
        self._mistake(place, problem, 'write "env:NAME" or "file:PATH"')
        return "missing"

    def _file_beside(self, place: Place, name: str) -> str:
        """The path of a file that the configuration names, relative to itself."""
        path = self._document.folder / name.removeprefix("file:")
        if not path.is_file() or not os.access(path, os.R_OK):
            self._mistake(
                place, f"there is no file {shown(str(path))} to read", "write its path, relative to this file"
            )
        return str(path)

    # ------------------------------------------------------------ prices, upstreams, alerts

    def _prices(self) -> PriceRules:
        models: dict[str, ModelPrice] = {}
        for name, price in self._file.prices.models.items():
            here: Place = ("prices", "models", name)
            missing = [key for key in ("input", "output") if getattr(price, key) is None]
            if price.input is None or price.output is None:
                if not any(self._document.took_out((*here, key)) for key in missing):
                    fix = f"add {' and '.join(f'{key} = …' for key in missing)} in USD per million tokens"
                    self._mistake(here, f"the price of {shown(name)} has no {' and no '.join(missing)}", fix)
                continue
            models[name] = ModelPrice(price.input, price.output, price.cached_input, price.cache_write, price.request)
        return PriceRules(unpriced=self._file.prices.unpriced, models=MappingProxyType(models))

    def _upstreams(self) -> Iterator[Upstream]:
        prefixes: dict[str, int] = {}
        for number, said in enumerate(self._file.upstreams):
            here: Place = ("upstreams", number)
            for key in ("prefix", "url"):
                if getattr(said, key) is None and not self._document.took_out((*here, key)):
                    example = '"/openai"' if key == "prefix" else '"https://api.openai.com"'
                    self._mistake(here, f"the upstream has no {key}", f"add {key} = {example}")
            if said.prefix is not None:
                if not said.prefix.startswith("/"):
                    problem = f'prefix = {shown(said.prefix)} does not begin with "/"'
                    self._mistake((*here, "prefix"), problem, f'write "/{said.prefix}"')
                elif (first := prefixes.setdefault(said.prefix.rstrip("/"), number)) != number:
                    problem = f"upstreams[{first}] has the prefix {shown(said.prefix)} as well"
                    self._mistake((*here, "prefix"), problem, "give each upstream a prefix of its own")
            if said.url is not None and not _is_web_address(said.url):
                problem = f"url = {shown(said.url)} is not a web address"
                self._mistake((*here, "url"), problem, 'write "https://api.openai.com"')
            if said.provider is not None and said.provider not in PROVIDERS:
                problem = f"unknown provider {shown(said.provider)}"
                fix = nearest(said.provider, PROVIDERS)
                self._mistake(
                    (*here, "provider"), problem, f'{fix} Any other that speaks like OpenAI is "openai-compatible"'
                )
            self._check_api_key(here, said)
            if said.prefix is not None and said.url is not None:
                yield Upstream(said.prefix, said.url, said.provider, said.api_key)

    def _check_api_key(self, here: Place, said: UpstreamTable) -> None:
        if said.api_key is None:
            return
        place = (*here, "api_key")
        kind, _, name = said.api_key.partition(":")
        if kind not in ("env", "file") or not name:
            problem = "api_key is written out, and keys do not belong in this file"
            self._mistake(place, problem, 'write "env:OPENAI_API_KEY" or "file:PATH"')
        elif said.provider is None:
            self._mistake(
                place, "api_key is for a provider, and none is named", 'add provider = "openai", or take it out'
            )
        elif kind == "env" and not self._environ.get(name):
            # Only the gateway needs it, and the app may share the file with a gateway elsewhere.
            self._warn(place, f"the environment has no {name}", f"set {name} where the gateway runs")

    def _alerts(self) -> Iterator[Alert]:
        for number, said in enumerate(self._file.alerts):
            here: Place = ("alerts", number)
            if said.to is None:
                if not self._document.took_out((*here, "to")):
                    self._mistake(here, "the alert goes nowhere", 'add to = "log"')
            elif not _is_receiver(said.to):
                fix = 'write "https://…", "slack:https://…", "log" or "module:callable"'
                self._mistake((*here, "to"), "to names no receiver", fix)
            else:
                yield Alert(said.to)


def _quoting(limit: object, problem: str) -> str:
    """The problem, with the limit it is about where it does not quote it whole."""
    text = limit.get("limit") if isinstance(limit, Mapping) else limit
    return problem if not isinstance(text, str) or f'"{text}"' in problem else f'{problem} in "{text}"'


def _is_web_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return False


def _is_receiver(text: str) -> bool:
    if text == "log" or _is_web_address(text):
        return True
    if text.startswith("slack:"):
        return _is_web_address(text.removeprefix("slack:"))
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", text) is not None


def _unpriced_models(document: Document, config: Config) -> Iterator[Mistake]:
    """A warning for every model that is named and has no price."""
    book = PriceBook(config.prices)
    named: dict[str, Place] = {}
    for number, route in enumerate(document.raw.get("routes", ())):
        model = route.get("model")
        if isinstance(model, str) and not model.startswith("body:"):
            named.setdefault(model, ("routes", number, "model"))
    for model, below in config.policy.models.items():
        named.setdefault(model, ("models", model))
        named.setdefault(below, ("models", model))
    for model, place in named.items():
        if not book.known(model):
            what = {
                "ceiling": "the dearest price stands in",
                "deny": "calls are refused",
                "allow": "its cost is unknown",
            }
            problem = f"no price is known for {shown(model)}: {what[config.prices.unpriced]}"
            yield document.noted(place, problem, f"add [prices.models.{json.dumps(model)}] with input and output")


def _canonical(value: Any) -> Any:  # Any: whatever a configuration is made of
    if is_dataclass(value) and not isinstance(value, type):
        return {known.name: _canonical(getattr(value, known.name)) for known in fields(value) if known.compare}
    if isinstance(value, Mapping):
        # In order: the ladder's and the tiers' order decides nothing, but pairs would lose other keys than texts.
        return sorted([[_canonical(key), _canonical(item)] for key, item in value.items()], key=repr)
    if isinstance(value, frozenset):
        return sorted(_canonical(item) for item in value)
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Decimal | Fraction):
        return str(Fraction(value))  # 1.0 and 1.00 are one number
    return value


__all__ = ["Alert", "Config", "Upstream", "known_keys", "load_config", "sample_config"]
