"""Who is calling: the sources that are asked, in order, and what each of them proves.

Rule 1: the first source that answers wins. A credential that is present but not valid ends the search: it is an
IdentityError, never a reason to ask the next source.
Rule 2: headers name a caller only when a trusted proxy sent them. Trust is judged on the peer of the connection,
never on what a header says of it; identity headers from elsewhere are to be stripped, so that the app behind
cannot believe them either.
Rule 3: two callers never share a name by accident. Ids are bounded and otherwise kept as they are: no
normalisation, no trimming of letters, and a proven id cannot look like an anonymous one.
Rule 4: where the app authenticates its callers itself, nobody may be known yet when the request comes in. That is
`Late`, and the question is asked again (`settle_late`) at the first exchange.

    jwt:CLAIM         a claim of the verified bearer token
    scope:PATH        the ASGI scope or WSGI environ, by dots: scope:user.id
    session:KEY       scope["session"]         state:NAME    scope["state"]
    header:NAME       from trusted peers       cookie:NAME   as the client sends it
    module:callable   called with the HttpRequest, sync or async

The sync face and the async face drive one generator; they differ in how a callable is asked.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Literal, get_args
from uuid import UUID

import orjson
from msgspec.structs import replace

from llm_guard_mw.bearer import BearerReader, JWTRules, jwt_mistakes
from llm_guard_mw.errors import ConfigError, GuardError, IdentityError, Mistake
from llm_guard_mw.http import HttpRequest
from llm_guard_mw.logs import log
from llm_guard_mw.model import Principal, Tags

__all__ = [
    "Anonymous",
    "Identifier",
    "IdentityRules",
    "JWTRules",
    "Late",
    "Source",
    "identity_mistakes",
    "parse_proxy",
    "parse_source",
    "read_tags",
]

Anonymous = Literal["reject", "ip", "shared"]

#: The kinds that an app fills in while it handles the request.
SURROUNDING_KINDS = frozenset({"scope", "session", "state"})
KINDS = ("jwt", "scope", "session", "state", "header", "cookie")

ANONYMOUS_USER = "anonymous"
ADDRESS_PREFIX = "ip:"


@dataclass(frozen=True, slots=True)
class Source:
    """One place to ask. `kind` is one of KINDS, or "callable"; `name` is what to look for there."""

    kind: str
    name: str
    text: str  # as the configuration writes it

    @property
    def may_answer_late(self) -> bool:
        return self.kind in SURROUNDING_KINDS or self.kind == "callable"


@dataclass(frozen=True, slots=True)
class IdentityRules:
    """`[identity]`: where names come from, and what becomes of callers without one."""

    user: tuple[str, ...] = ("jwt:sub", "scope:user.id", "header:x-user-id")
    tenant: tuple[str, ...] = ("jwt:org", "header:x-tenant-id")
    tier: tuple[str, ...] = ("jwt:plan", "header:x-plan")
    trusted_proxies: tuple[str, ...] = ()  # addresses, networks, "unix"
    anonymous: Anonymous = "reject"
    jwt: JWTRules | None = None  # None: jwt: sources never answer
    max_id_bytes: int = 256


@dataclass(frozen=True, slots=True)
class Late:
    """Somebody is not known yet, but may be at the first exchange. `known` is what could be told so far."""

    reason: str
    known: Principal = field(default_factory=Principal)


def parse_source(text: str) -> Source:
    """A source from its notation; ValueError says which piece is wrong and what would be right."""
    kind, colon, name = text.partition(":")
    if not colon or not kind or not name:
        raise ValueError(f'"{text}" is no source: write KIND:NAME, for instance "jwt:sub", or "module:callable"')
    if kind == "header":
        if not _FIELD_NAME.fullmatch(name):
            raise ValueError(f'"{name}" in "{text}" is not the name of a header: write "header:x-user-id"')
        return Source(kind, name.lower(), text)
    if kind == "cookie":
        if not _FIELD_NAME.fullmatch(name):
            raise ValueError(f'"{name}" in "{text}" is not the name of a cookie: write "cookie:account"')
        return Source(kind, name, text)
    if kind in KINDS:
        if not all(name.split(".")) and kind != "jwt":
            raise ValueError(f'"{name}" in "{text}" has an empty step: write names joined by single dots')
        return Source(kind, name, text)
    if _DOTTED.fullmatch(kind) and _DOTTED.fullmatch(name):
        return Source("callable", name, text)
    known = ", ".join(KINDS)
    raise ValueError(f'"{kind}" in "{text}" is neither a kind of source ({known}) nor a module with a callable')


_FIELD_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def parse_proxy(text: str) -> IPv4Network | IPv6Network | None:
    """A trusted proxy from its notation: an address, a network, or "unix" (None)."""
    if text == "unix":
        return None
    try:
        return ip_network(text)
    except ValueError:
        pass
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f'"{text}" is neither an address, nor a network like "10.0.0.0/8", nor "unix"') from None
    raise ValueError(f'"{text}" is an address inside a network: write "{network}", or the address alone')


def identity_mistakes(rules: IdentityRules, where: str = "identity") -> list[Mistake]:
    """All that is wrong with the rules, as far as it can be told without importing or reading anything."""
    mistakes = []
    for role in ("user", "tenant", "tier"):
        texts: tuple[str, ...] = getattr(rules, role)
        for number, text in enumerate(texts):
            try:
                source = parse_source(text)
            except ValueError as error:
                mistakes.append(Mistake(f"{where}.{role}[{number}]", str(error), ""))
                continue
            defaults: tuple[str, ...] = getattr(_DEFAULTS, role)
            if source.kind == "jwt" and rules.jwt is None and texts != defaults:
                problem = f'"{text}" is asked for, but nothing says how tokens are judged'
                fix = "add [identity.jwt] with algorithms and one of key, jwks, jwks_file"
                mistakes.append(Mistake(f"{where}.{role}[{number}]", problem, fix))
    for number, text in enumerate(rules.trusted_proxies):
        try:
            parse_proxy(text)
        except ValueError as error:
            mistakes.append(Mistake(f"{where}.trusted_proxies[{number}]", str(error), ""))
    if rules.anonymous not in get_args(Anonymous):
        problem = f'"{rules.anonymous}" is no rule for callers without a name'
        mistakes.append(Mistake(f"{where}.anonymous", problem, '"reject", "ip" or "shared"'))
    if rules.jwt is not None:
        mistakes.extend(jwt_mistakes(rules.jwt, f"{where}.jwt"))
    return mistakes


_DEFAULTS = IdentityRules()


class Identifier:
    """Tells who is calling.

        identifier = Identifier(IdentityRules(user=("jwt:sub",), jwt=JWTRules(key=..., algorithms=("HS256",))))
        principal = identifier.identify(request)

    Made once, when the app's modules are imported: it looks up the callables that the rules name. `sync_only` is
    the promise of a door without an event loop; an async callable is then a mistake at once, not at a request.
    """

    def __init__(
        self, rules: IdentityRules, *, sync_only: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        mistakes = identity_mistakes(rules)
        if mistakes:
            raise ConfigError(mistakes)
        self._rules = rules
        self._user, self._tenant, self._tier = (
            tuple(source for source in map(parse_source, texts) if source.kind != "jwt" or rules.jwt is not None)
            for texts in (rules.user, rules.tenant, rules.tier)
        )
        sources = (*self._user, *self._tenant, *self._tier)
        self._callables = _resolve_callables(sources)
        if sync_only:
            self.refuse_async()
        self._surroundings_asked = any(source.kind in SURROUNDING_KINDS for source in sources)
        #: The names of all headers that pose as identity, with dashes.
        self.identity_headers = frozenset(
            source.name.encode().replace(b"_", b"-") for source in sources if source.kind == "header"
        )
        self._proxies = _Proxies(rules.trusted_proxies)
        self._bearer = None if rules.jwt is None else BearerReader(rules.jwt, clock=clock)
        self._peer_matters = bool(rules.trusted_proxies) or rules.anonymous == "ip"
        self._said: set[str] = set()

    # ------------------------------------------------------------ the two faces

    def identify(self, request: HttpRequest) -> Principal | Late:
        """Who this is, or Late. IdentityError: nobody, or a credential that is not valid."""
        return self._drive(self._inquire(request)) if self._callables else self._read(request)

    async def aidentify(self, request: HttpRequest) -> Principal | Late:
        """`identify`, where callables may be async."""
        return await self._adrive(self._inquire(request)) if self._callables else self._read(request)

    def settle_late(self, request: HttpRequest) -> Principal:
        """Ask again, at the first exchange of a call that was Late. Now it is somebody, anonymous, or nobody."""
        return _settled(self._drive(self._inquire(request, last_time=True)))

    async def asettle_late(self, request: HttpRequest) -> Principal:
        """`settle_late`, where callables may be async."""
        return _settled(await self._adrive(self._inquire(request, last_time=True)))

    def _drive(self, inquiry: _Inquiry) -> Principal | Late:
        try:
            question = next(inquiry)
            while True:
                question = inquiry.send(self._ask(*question))
        except StopIteration as done:
            return _outcome(done)

    async def _adrive(self, inquiry: _Inquiry) -> Principal | Late:
        try:
            question = next(inquiry)
            while True:
                question = inquiry.send(await self._aask(*question))
        except StopIteration as done:
            return _outcome(done)

    def _ask(self, source: Source, request: HttpRequest) -> object:
        try:
            answer = self._callables[source.text](request)
        except Exception as error:  # the app's own code: whatever it raises, nobody is let in
            raise self._failed(source, error) from error
        if inspect.isawaitable(answer):
            if inspect.iscoroutine(answer):
                answer.close()
            raise _async_in_sync(source)
        return answer

    async def _aask(self, source: Source, request: HttpRequest) -> object:
        try:
            answer = self._callables[source.text](request)
            return await answer if inspect.isawaitable(answer) else answer
        except Exception as error:  # as above
            raise self._failed(source, error) from error

    def _failed(self, source: Source, error: Exception) -> GuardError:
        if isinstance(error, GuardError):
            return error  # the callable says itself what is the matter
        log.warning("identity_source_failed", source=source.text, error=type(error).__name__)
        return IdentityError(f"{source.text}: could not be asked", retry_after_seconds=1)

    # ------------------------------------------------------------ what the doors ask besides

    def trusted(self, request: HttpRequest) -> bool:
        """Whether the peer is one of `trusted_proxies`, so that its headers and tags count."""
        if not self._peer_matters:
            return False
        if _rewritten(request):
            self._say_once(
                "peer_address_rewritten",
                fix="the ASGI server replaced the peer's address from X-Forwarded-For, which is not believed: "
                "run it without that (uvicorn --no-proxy-headers) and name the proxy in trusted_proxies",
            )
            return False
        return self._proxies.trusts_peer(request)

    def headers_to_strip(self, request: HttpRequest) -> frozenset[bytes]:
        """The names of this request's headers that pose as identity; none from a trusted peer.

        `X_User_Id` is `X-User-Id` to every WSGI app and CGI script, so underscores are no way around.
        """
        if not self.identity_headers or self.trusted(request):
            return frozenset()
        return frozenset([name for name, _ in request.headers if name.replace(b"_", b"-") in self.identity_headers])

    def refuse_async(self) -> None:
        """A door without an event loop says so when it is made: ConfigError if a callable is async."""
        mistakes = [
            mistake
            for text, called in self._callables.items()
            if _is_async(called)
            for mistake in _async_in_sync(parse_source(text)).mistakes
        ]
        if mistakes:
            raise ConfigError(mistakes)

    def warm(self) -> None:
        """Begin to read the signing keys, so that the first request finds them."""
        if self._bearer is not None:
            self._bearer.warm()

    def close(self) -> None:
        """Stop reading signing keys."""
        if self._bearer is not None:
            self._bearer.close()

    # ------------------------------------------------------------ the inquiry

    def _read(self, request: HttpRequest) -> Principal | Late:
        """The whole inquiry where no callable has to be asked, as it is for most requests."""
        facts = _Facts(request)
        user, tenant, tier = [self._first_said(sources, facts) for sources in (self._user, self._tenant, self._tier)]
        return self._conclude(Principal(user, tenant, tier), request)

    def _first_said(self, sources: tuple[Source, ...], facts: _Facts) -> str | None:
        for source in sources:
            answer = self._look(source, facts)
            if answer is not None:
                return self._as_id(source, answer)
        return None

    def _inquire(self, request: HttpRequest, *, last_time: bool = False) -> _Inquiry:
        facts = _Facts(request)
        user = yield from self._first_answer(self._user, facts)
        tenant = yield from self._first_answer(self._tenant, facts)
        tier = yield from self._first_answer(self._tier, facts)
        return self._conclude(Principal(user, tenant, tier), request, last_time=last_time)

    def _conclude(self, known: Principal, request: HttpRequest, *, last_time: bool = False) -> Principal | Late:
        waiting = None if last_time else self._waiting_for(known)
        if waiting is not None:
            return Late(f"{waiting.text} may answer once the app has authenticated its caller", known)
        if known.user is not None or (not self._user and known.tenant is not None):
            return known
        return self._anonymous(known, request)

    def _first_answer(self, sources: tuple[Source, ...], facts: _Facts) -> Generator[_Question, object, str | None]:
        for source in sources:
            if source.kind == "callable":
                answer = yield source, facts.request
            else:
                answer = self._look(source, facts)
            if answer is not None:
                return self._as_id(source, answer)
        return None

    def _waiting_for(self, known: Principal) -> Source | None:
        """The source that may still say what is missing.

        For a user every late source is worth waiting for. Tenant and tier wait for what the app fills in, but not
        for a callable that had its say: for a known user "no tenant" is an answer.
        """
        if known.user is None:
            sources = self._user or (self._tenant if known.tenant is None else ())
            late = next((source for source in sources if source.may_answer_late), None)
            if late is not None or (self._user and self._rules.anonymous == "reject"):
                return late
        if not self._surroundings_asked:
            return None
        missing = [
            sources for name, sources in ((known.tenant, self._tenant), (known.tier, self._tier)) if name is None
        ]
        return next((source for sources in missing for source in sources if source.kind in SURROUNDING_KINDS), None)

    def _look(self, source: Source, facts: _Facts) -> object:
        """What one source says, unchecked. None: nothing."""
        if source.kind == "header":
            return self._header(source, facts)
        if source.kind == "jwt":
            return self._claim(source, facts)
        if source.kind == "cookie":
            return _cookie(source, facts.request)
        surroundings = facts.request.surroundings
        try:
            return _walk(surroundings if source.kind == "scope" else surroundings.get(source.kind), source.name)
        except Exception as error:  # lazy attributes of the app: a database that is away, an async-only ORM
            self._say_once("identity_source_failed", source=source.text, error=type(error).__name__)
            return None

    def _header(self, source: Source, facts: _Facts) -> object:
        values = facts.request.header_values(source.name.encode())
        if not values:
            return None
        if facts.trusted is None:
            facts.trusted = self.trusted(facts.request)
        if not facts.trusted:
            return None
        if len(set(values)) > 1:
            raise IdentityError(f"{source.text}: the header is there more than once, with different values")
        return values[0].strip()

    def _claim(self, source: Source, facts: _Facts) -> object:
        if self._bearer is not None and not facts.claims_read:
            try:
                facts.claims = self._bearer.claims(facts.request)
            except IdentityError as error:
                told = f"{source.text}: {error}"
                raise IdentityError(told, retry_after_seconds=error.retry_after_seconds) from None
            facts.claims_read = True
        return None if facts.claims is None else _walk(facts.claims, source.name)

    def _as_id(self, source: Source, answer: object) -> str:
        text = _text(source, answer)
        if not text:
            raise IdentityError(f"{source.text}: the id is empty")
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise IdentityError(f"{source.text}: the id is not valid Unicode") from None
        if size > self._rules.max_id_bytes:
            raise IdentityError(f"{source.text}: the id is longer than {self._rules.max_id_bytes} bytes")
        if "\0" in text:
            raise IdentityError(f"{source.text}: the id holds a NUL, which PostgreSQL cannot store")
        if self._poses_as_anonymous(text):
            raise IdentityError(f"{source.text}: the id looks like that of an anonymous caller")
        return text

    def _poses_as_anonymous(self, text: str) -> bool:
        if self._rules.anonymous == "ip":
            return text.startswith(ADDRESS_PREFIX)
        return self._rules.anonymous == "shared" and text == ANONYMOUS_USER

    def _anonymous(self, known: Principal, request: HttpRequest) -> Principal:
        if self._rules.anonymous == "shared":
            return replace(known, user=ANONYMOUS_USER, anonymous=True)
        if self._rules.anonymous == "ip":
            return replace(known, user=f"{ADDRESS_PREFIX}{self._address(request)}", anonymous=True)
        sources = self._user or self._tenant
        asked = ", ".join(source.text for source in sources) or "none is configured"
        ignored = "; identity headers count from trusted_proxies only" if self.headers_to_strip(request) else ""
        raise IdentityError(f"no source says who is calling (asked: {asked}{ignored})")

    def _address(self, request: HttpRequest) -> str:
        """Under which address an anonymous caller is counted; all whose address cannot be told share one."""
        if self.trusted(request):
            forwarded = self._proxies.client_of(request)
            if forwarded is not None:
                return _grouped(forwarded)
        elif _rewritten(request):
            return "unknown"
        return "unknown" if request.peer is None else _grouped(request.peer[0])

    def _say_once(self, event: str, **facts: str) -> None:
        """One warning for each fact of the installation, however many requests show it."""
        said = event + facts.get("source", "")
        if said not in self._said:
            self._said.add(said)
            log.warning(event, **facts)


@dataclass(slots=True)
class _Facts:
    """What one inquiry has found out already: user, tenant and tier often ask for the same."""

    request: HttpRequest
    trusted: bool | None = None
    claims: Mapping[str, Any] | None = None
    claims_read: bool = False


_Question = tuple[Source, HttpRequest]
_Inquiry = Generator[_Question, object, Principal | Late]


def _outcome(done: StopIteration) -> Principal | Late:
    outcome: Principal | Late = done.value
    return outcome


def _settled(outcome: Principal | Late) -> Principal:
    if isinstance(outcome, Late):
        raise AssertionError("the last time of asking is never late")
    return outcome


# ---------------------------------------------------------------- answers


def _walk(found: object, path: str) -> object:
    """What stands at a dotted path: keys of mappings, then attributes; None where a step leads nowhere.

    The keys of an environ or of a token's claims may have dots themselves ("https://example.com/org"), so the
    longest key that is there wins.
    """
    steps = path.split(".")
    while steps:
        if found is None or _unauthenticated(found):
            return None
        if not isinstance(found, Mapping):
            found = getattr(found, steps.pop(0), None)
            continue
        for taken in range(len(steps), 0, -1):
            key = ".".join(steps[:taken])
            if key in found:
                found, steps = found[key], steps[taken:]
                break
        else:
            return None
    return None if _unauthenticated(found) else found


def _unauthenticated(found: object) -> bool:
    """Starlette and Django put a user there for everybody, and one that says so for nobody."""
    return getattr(found, "is_authenticated", None) is False


def _text(source: Source, answer: object) -> str:
    if isinstance(answer, bytes):
        try:
            return answer.decode()
        except UnicodeDecodeError:
            raise IdentityError(f"{source.text}: the id is not valid UTF-8") from None
    if isinstance(answer, str):
        return str.__str__(answer)  # of an enum's member the value, not its name
    if isinstance(answer, int | UUID) and not isinstance(answer, bool):
        return str(answer)
    raise IdentityError(f"{source.text}: the id is a {type(answer).__name__}, not a text or a whole number")


def _cookie(source: Source, request: HttpRequest) -> object:
    found = set()
    for line in request.header_values(b"cookie"):
        for pair in line.split(b";"):
            name, equals, value = pair.strip().partition(b"=")
            if equals and name.decode("latin-1") == source.name:
                found.add(value.strip().removeprefix(b'"').removesuffix(b'"'))
    if len(found) > 1:
        # A sibling domain can set a second cookie of the same name; which one the app believes is chance.
        raise IdentityError(f"{source.text}: the cookie is there more than once, with different values")
    return found.pop() if found else None


# ---------------------------------------------------------------- callables


def _resolve_callables(sources: Iterable[Source]) -> dict[str, Callable[[HttpRequest], Any]]:
    found, mistakes = {}, []
    for source in sources:
        if source.kind != "callable" or source.text in found:
            continue
        try:
            found[source.text] = _resolve_callable(source)
        except ValueError as error:
            mistakes.append(Mistake("identity", f"{source.text}: {error}", "name a callable as module:callable"))
    if mistakes:
        raise ConfigError(mistakes)
    return found


def _resolve_callable(source: Source) -> Callable[[HttpRequest], Any]:
    module_name = source.text.partition(":")[0]
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # the import runs the app's code
        raise ValueError(f"the module cannot be imported ({type(error).__name__}: {error})") from error
    for step in source.name.split("."):
        try:
            found = getattr(found, step)
        except AttributeError:
            unfinished = getattr(getattr(sys.modules[module_name], "__spec__", None), "_initializing", False)
            why = "is not defined yet, the module is still being imported" if unfinished else "is not there"
            raise ValueError(f'"{step}" {why}') from None
    if not callable(found):
        raise ValueError(f"is a {type(found).__name__}, which cannot be called")
    called: Callable[[HttpRequest], Any] = found
    return called


def _is_async(called: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(type(called).__call__)


def _async_in_sync(source: Source) -> ConfigError:
    problem = f"{source.text} is async, and a sync door has no event loop to run it"
    return ConfigError([Mistake("identity", problem, "name a sync callable")])


# ---------------------------------------------------------------- peers


class _Proxies:
    """The peers whose word counts."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        parsed = [parse_proxy(text) for text in texts]
        networks = tuple(network for network in parsed if network is not None)
        self._unix = None in parsed

        @lru_cache(maxsize=4096)
        def trusts(host: str) -> bool:
            address = _address_of(host)
            return address is not None and any(address in network for network in networks)

        self._trusts = trusts

    def trusts_peer(self, request: HttpRequest) -> bool:
        if request.peer is not None:
            return self._trusts(request.peer[0])
        # No address at all is a Unix socket, unless the server says that it listens on a port.
        server = request.surroundings.get("server")
        return self._unix and (not server or server[1] is None)

    def client_of(self, request: HttpRequest) -> str | None:
        """The nearest address in X-Forwarded-For that is not a trusted proxy's; None where it names none.

        Read from the right: each proxy appends whom it saw, and what stands further left is the client's to
        invent.
        """
        nearest = None
        for entry in reversed(_forwarded_for(request)):
            host, _ = _split_port(entry)
            if _address_of(host) is None:
                break
            nearest = host
            if not self._trusts(host):
                break
        return nearest


def _rewritten(request: HttpRequest) -> bool:
    """Whether the server put an address of X-Forwarded-For where the peer's should be.

    Servers do it with port 0, or, where the entry names a port, with that one: then the very pair stands in
    the header. No proxy ever writes its own address and port there, so the pair gives it away.
    """
    if request.peer is None:
        return False
    if request.peer[1] == 0:
        return True
    if request.header(b"x-forwarded-for") is None:
        return False
    return any(_split_port(entry) == tuple(request.peer) for entry in _forwarded_for(request))


def _forwarded_for(request: HttpRequest) -> list[str]:
    values = request.header_values(b"x-forwarded-for")
    return [entry.strip() for entry in b",".join(values).decode("latin-1").split(",") if entry.strip()]


def _split_port(entry: str) -> tuple[str, int | None]:
    """`1.2.3.4:80`, `[::1]:80` and bare addresses as (host, port)."""
    host, colon, port = entry.rpartition(":")
    if colon and (host.count(":") == 0 or host.startswith("[")):
        try:
            return host.strip("[] "), int(port)
        except ValueError:
            pass
    return entry.strip("[] "), None


@lru_cache(maxsize=4096)
def _address_of(host: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _grouped(host: str) -> str:
    """The address that an anonymous caller stands for: of IPv6 the /64, since one household has all of it."""
    address = _address_of(host)
    if isinstance(address, IPv6Address):
        return str(IPv6Network((int(address) >> 64 << 64, 64)))
    return str(address) if address is not None else host


# ---------------------------------------------------------------- tags

TAGS_BYTES_MAX = 4096
TAGS_MAX = 16
TAG_VALUE_BYTES_MAX = 256

_TAG_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

#: The names that are understood, and what they are called here. `user_tier` is the contract's word for `tier`.
_KNOWN_TAGS = ("feature", "workflow_id", "session_id", "experiment", "variant")


def read_tags(request: HttpRequest, *, trusted: bool) -> Tags:
    """`X-Metering-Tags`: the names under which a call is reported.

    Never an error: what cannot be used is left out, and one log line says why (not what: values are the
    caller's).
    """
    values = request.header_values(b"x-metering-tags")
    if not values:
        return Tags(trusted=trusted)
    tags, dropped = _usable_tags(values)
    if dropped:
        tell = log.warning if trusted else log.debug  # whoever is not trusted must not fill the log
        tell("metering_tags_dropped", reasons=sorted(dropped))
    user_tier, tier = tags.pop("user_tier", None), tags.pop("tier", None)
    known = {name: tags.pop(name, None) for name in _KNOWN_TAGS}
    return Tags(tier=user_tier or tier, free=tuple(sorted(tags.items())), trusted=trusted, **known)


def _usable_tags(values: tuple[bytes, ...]) -> tuple[dict[str, str], set[str]]:
    if len(values) > 1:
        return {}, {"the header is there more than once"}
    if len(values[0]) > TAGS_BYTES_MAX:
        return {}, {f"the header is larger than {TAGS_BYTES_MAX} bytes"}
    try:
        document = orjson.loads(values[0])
    except orjson.JSONDecodeError:
        return {}, {"the header is not JSON"}
    if not isinstance(document, dict):
        return {}, {"the header is not a JSON object"}
    tags: dict[str, str] = {}
    dropped = set()
    for name, value in document.items():
        problem = _tag_problem(name, value)
        if problem is None and len(tags) == TAGS_MAX:
            problem = f"there are more than {TAGS_MAX} tags"
        if problem is None:
            tags[name] = value
        else:
            dropped.add(problem)
    return tags, dropped


def _tag_problem(name: str, value: object) -> str | None:
    if not _TAG_NAME.fullmatch(name):
        return "a name is not 1 to 64 of A-Z a-z 0-9 _ . -"
    if not isinstance(value, str):
        return "a value is not a string"
    if not value or "\0" in value:
        return "a value is empty or holds a NUL"
    if len(value.encode()) > TAG_VALUE_BYTES_MAX:
        return f"a value is longer than {TAG_VALUE_BYTES_MAX} bytes"
    return None
