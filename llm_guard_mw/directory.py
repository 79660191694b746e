"""The directory of a door: which rule guards a request. The file's, that of the view which will answer it, or both.

Rule 1. The file is asked as ever. Where no view is marked, nothing else happens.
Rule 2. Which view a request will reach is the framework's to say, so its own router is asked: no second reading of
        paths can drift from it and leave a view open. It is asked only below the literal beginning of a marked path.
Rule 3. A view has one place that its limits count in, however many paths lead to it: `route NAME`, where the name is
        `name=`, else its first path, in the syntax of the file. A [[routes]] of that path gives it its own name. So a
        limit that moves from the view into the file, or back, keeps what was used.
Rule 4. Frameworks are known by their shape; none is imported here.

docs/decisions/0010-limits-at-the-view.md says why.
"""

from __future__ import annotations

import functools
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol
from urllib.parse import quote

from llm_guard_mw.balances import Limit
from llm_guard_mw.errors import ConfigError
from llm_guard_mw.logs import log
from llm_guard_mw.policy import Policy, Route, compile_path
from llm_guard_mw.views import METHODS, Mark, marked, marks_of

# Apps, routers and views are Any: whatever the frameworks have.

_ALL: Final = frozenset(METHODS)
#: Where middleware keeps the app that it stands in front of.
_WRAPPED: Final = ("app", "wsgi_app", "application", "wrapped_app", "_app", "__wrapped__")


class Directory:
    """`policy` is what the file says, `app` whatever stands behind the door, or its router.

    Directory(policy, app).route("POST", "/summarize", scope)
    Directory(policy, DjangoRouter()).route("POST", "/summarize", request.META)
    """

    def __init__(self, policy: Policy, app: Any) -> None:
        self._policy = policy
        self._app = app
        self._lock = threading.Lock()
        self._views: _Views | None = None
        self._told: set[tuple[object, ...]] = set()

    def look(self, *, again: bool = False) -> None:
        """Read the app now, if anything is marked: what is wrong there should be heard of at the start.

        `again`: also if it seems to be as it was. A mounted app may have got routes, which its size does not show.
        """
        if again:
            self._views = None
        if marked:
            self._read()

    def route(self, method: str, path: str, surroundings: Mapping[str, Any]) -> Route | None:
        """The rule for a request; None where nothing guards it. `surroundings` is the ASGI scope, or the environ."""
        rule = self._policy.route(method, path)
        views = self._views
        if views is None or views.outdated:
            if not marked:
                return rule
            views = self._read()
        if not path.startswith(views.beginnings):
            return rule
        view = views.find(method, path, surroundings)
        return rule if view is None else views.joined(rule, view)

    def _read(self) -> _Views:
        with self._lock:
            if self._views is None or self._views.outdated:
                try:
                    views = _Views(self._policy, router_of(self._app))
                except ConfigError:
                    raise
                except (
                    Exception
                ):  # a URLconf that cannot be imported, a router of some other kind: the app has the word
                    log.exception("views_unreadable")
                    return _Views(self._policy, None)
                self._views = views
                self._tell(views)
            return self._views

    def _tell(self, views: _Views) -> None:
        """Say once what the code asks for, and what of it it does not get."""
        for each in views.rules():
            route = each.route
            limits = [limit.text for limit in route.view_limits]
            if self._new("view_guarded", route.view, route.path, route.methods):
                log.info("view_guarded", view=route.view, path=route.path, route=route.name, limits=limits)
            for what in each.overruled:
                if self._new("view_overruled", route.view, route.path, what):
                    log.warning("view_overruled", view=route.view, path=route.path, route=route.name, says=what)
        for mark in views.unseen():
            if self._new("view_not_found", mark.title, mark.where):
                log.warning("view_not_found", view=mark.title, where=mark.where, fix=UNSEEN)

    def _new(self, *what: object) -> bool:
        if what in self._told:
            return False
        self._told.add(what)
        return True


#: What to do about a mark that no route leads to.
UNSEEN: Final = (
    "put @guarded right below the framework's own decorator, and give the door views=app where other middleware hides"
    " the app from it"
)


def survey(policy: Policy, app: Any) -> tuple[list[ViewRule], list[Mark]]:
    """All marked views of an app, as they are guarded with what the file says; and marks that no route leads to."""
    views = _Views(policy, router_of(app))
    return views.rules(), views.unseen()


@dataclass(frozen=True, slots=True)
class ViewRule:
    """A marked view: the rule for its requests, and what the file says instead of it."""

    route: Route
    overruled: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One route of an app: its path in the syntax of the file, and the view that it leads to."""

    path: str
    methods: frozenset[str]
    view: Any
    beginning: str = ""  # every path that it answers begins like this


class Router(Protocol):
    """What is asked of a framework."""

    def size(self) -> int:
        """Grows when the app gets another route; cheap."""

    def endpoints(self) -> Iterable[Endpoint]:
        """All routes, in the order in which the app has them."""

    def find(self, method: str, path: str, surroundings: Mapping[str, Any]) -> tuple[str, Any] | None:
        """The path (as `endpoints` has it) and the view that a request will reach."""


# ---------------------------------------------------------------- the marked views of an app


class _Views:
    """The marked views of an app, read once; read again when the app has more routes."""

    def __init__(self, policy: Policy, router: Router | None) -> None:
        self._policy = policy
        self._router = router
        self._size = router.size() if router is not None else 0
        self._places: dict[Mark, tuple[str, tuple[Limit, ...]]] = {}  # what each mark's limits count in, and they
        self._views: dict[tuple[str, tuple[Mark, ...]], Route] = {}
        self._joined: dict[tuple[int | None, int], Route] = {}
        views: dict[tuple[str, tuple[Mark, ...]], Endpoint] = {}
        for endpoint in router.endpoints() if router is not None else ():
            for method in sorted(endpoint.methods):
                if marks := marks_of(endpoint.view, method):
                    known = views.get((endpoint.path, marks), replace(endpoint, methods=frozenset()))
                    views[endpoint.path, marks] = replace(known, methods=known.methods | {method})
        self._name(views)
        for (_, marks), endpoint in views.items():
            self._add(marks, endpoint)
        self.beginnings = tuple({endpoint.beginning for endpoint in views.values()})

    @property
    def outdated(self) -> bool:
        return self._router is not None and self._router.size() != self._size

    def find(self, method: str, path: str, surroundings: Mapping[str, Any]) -> Route | None:
        assert self._router is not None  # noqa: S101 - without a router there are no beginnings
        try:
            found = self._router.find(method, path, surroundings)
        except Exception:  # the app's own router: it will fail the request in the same way, and no view will run
            log.exception("router_failed")
            return None
        if found is None:
            return None
        template, view = found
        marks = marks_of(view, method)
        if not marks:
            return None
        known = self._views.get((template, marks))
        if known is None:  # a path that came later than the rest, or that has another name in another language
            endpoint = Endpoint(template, frozenset({method}), view)
            self._name({(template, marks): endpoint})
            known = self._add(marks, endpoint)
        return known

    def joined(self, rule: Route | None, view: Route) -> Route:
        key = None if rule is None else rule.key, view.key
        joined = self._joined.get(key)
        if joined is None:
            joined = self._joined.setdefault(key, self._policy.joined(rule, view))
        return joined

    def rules(self) -> list[ViewRule]:
        found = []
        for view in list(self._views.values()):
            for rule, methods in self._rules_over(view):
                joined = replace(self.joined(rule, view), methods=methods)
                found.append(ViewRule(joined, tuple(_overruled(rule, view))))
        return found

    def unseen(self) -> list[Mark]:
        seen = {part for mark in self._places for part in mark.everything()}
        return [mark for mark in list(marked) if mark not in seen]

    # -- reading

    def _name(self, views: Mapping[tuple[str, tuple[Mark, ...]], Endpoint]) -> None:
        """Find the place of every mark that has none yet: see Rule 3."""
        first: dict[Mark, Endpoint] = {}
        for (path, marks), endpoint in views.items():
            for mark in marks:
                known = first.setdefault(mark, replace(endpoint, methods=frozenset()))
                if known.path == path:
                    first[mark] = replace(known, methods=known.methods | endpoint.methods)
        # Of several at one path, the one that is posted to has the path for its name, wherever it stands.
        for mark in sorted(first, key=lambda mark: ("POST" not in first[mark].methods, -len(first[mark].methods))):
            if mark not in self._places:
                name = self._name_of(mark, first[mark])
                limits = mark.limits_at(f"route {name}", timezone=self._policy.timezone, budgets=self._policy.budgets)
                self._places[mark] = name, limits

    def _name_of(self, mark: Mark, endpoint: Endpoint) -> str:
        taken = {name for name, _ in self._places.values()}
        here = Route(path=endpoint.path, methods=endpoint.methods)
        for rule in self._policy.routes:
            if rule.same_place(here) and rule.methods & here.methods and rule.name not in taken:
                return rule.name
        if mark.name is not None:
            return mark.name
        taken.update(rule.name for rule in self._policy.routes)
        methods = "/".join(sorted(endpoint.methods - {"HEAD"} or endpoint.methods))
        return endpoint.path if endpoint.path not in taken else f"{endpoint.path} {methods}"

    def _add(self, marks: tuple[Mark, ...], endpoint: Endpoint) -> Route:
        view = Route(
            path=endpoint.path,
            methods=endpoint.methods,
            name=self._places[marks[0]][0],
            feature=next((mark.feature for mark in reversed(marks) if mark.feature), None),
            model=next((mark.model for mark in reversed(marks) if mark.model), None),
            view=marks[-1].title,
            view_limits=tuple([limit for mark in marks for limit in self._places[mark][1]]),
        )
        self._views[endpoint.path, marks] = view
        return view

    def _rules_over(self, view: Route) -> list[tuple[Route | None, frozenset[str]]]:
        """The file's rules for a view's requests, as far as a sample of its path shows, each with its methods."""
        found: dict[int | None, tuple[Route | None, set[str]]] = {}
        sample = view.samples()[0]
        for method in sorted(view.methods):
            rule = self._policy.route(method, sample)
            found.setdefault(None if rule is None else rule.key, (rule, set()))[1].add(method)
        return [(rule, frozenset(methods)) for rule, methods in found.values()]


def _overruled(rule: Route | None, view: Route) -> Iterator[str]:
    """What the file says instead of the view."""
    if rule is None:
        return
    for key in ("feature", "model"):
        ours, theirs = getattr(rule, key), getattr(view, key)
        if ours is not None and theirs is not None and ours != theirs:
            yield f'{key} "{theirs}" gives way to "{ours}" of the file\'s route {rule.name}'
    for limit in view.view_limits:
        for other in rule.limits:
            same = (other.scope, other.counted) == (limit.scope, limit.counted)
            if same and other.text != limit.text and (not other.when or other.when == limit.when):
                yield f'"{limit.text}" gives way to "{other.text}" of the file\'s route {rule.name}'


def _template(path: str) -> str:
    """The path, if the file could say it; else one that stands for it. It names balances, and matches nothing."""
    path = "/" + path.lstrip("/")
    path = re.sub(r"{(\w+):(?!(?:str|path|int|float|uuid)})\w+}", r"{\1}", path)  # a convertor of the app's own
    try:
        compile_path(path)
    except ValueError:
        return quote(path, safe="/")
    return path


# ---------------------------------------------------------------- frameworks


def router_of(app: Any) -> Router | None:
    """The router of whatever app stands behind a door, however much middleware is between them."""
    for _ in range(64):
        if hasattr(app, "url_map") and hasattr(app, "view_functions"):
            return _Flask(app)
        if isinstance(app, DjangoRouter):
            return app
        if type(app).__module__.startswith("django.core.handlers"):
            return DjangoRouter()
        if isinstance(getattr(app, "routes", None), list):
            return _Starlette(app)
        if isinstance(app, functools.partial):
            app = app.func
            continue
        behind = getattr(app, "__self__", None)
        if behind is None:
            behind = next((inner for name in _WRAPPED if (inner := getattr(app, name, None)) is not None), None)
        if behind is None:
            return None
        app = behind
    return None


class _Starlette:
    """Starlette, FastAPI, and whatever else has `routes` that can say whether they match."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._same_for_all = all(map(_looks_at_the_path_alone, _leaves(app.routes)))
        self._found = functools.lru_cache(maxsize=1024)(self._find)

    def size(self) -> int:
        return len(self._app.routes)

    def endpoints(self) -> Iterable[Endpoint]:
        return self._endpoints(self._app.routes, "", known=True)

    def _endpoints(self, routes: Any, prefix: str, *, known: bool) -> Iterator[Endpoint]:
        for route in _leaves(routes):
            path = prefix + (getattr(route, "path", None) or "")
            ours = known and _is_known(route)
            if _is_mount(route):
                yield from self._endpoints(route.routes, path, known=ours)
            elif (view := getattr(route, "endpoint", None)) is not None and hasattr(route, "methods"):
                methods = _ALL if route.methods is None else frozenset(route.methods)
                beginning = path.partition("{")[0] if ours else ""
                yield Endpoint(_template(path), methods - {"OPTIONS"}, view, beginning)

    def find(self, method: str, path: str, surroundings: Mapping[str, Any]) -> tuple[str, Any] | None:
        if self._same_for_all:
            return self._found(method, path)
        return self._find(method, path, tuple(surroundings.get("headers", ())))

    def _find(self, method: str, path: str, headers: tuple[Any, ...] = ()) -> tuple[str, Any] | None:
        scope = {"type": "http", "method": method, "path": path, "root_path": "", "headers": list(headers)}
        routes, prefix = self._app.routes, ""
        while routes:
            for route in _leaves(routes):
                match, child = route.matches(scope)
                if match.name == "FULL":
                    break
            else:
                return None
            prefix += getattr(route, "path", None) or ""
            if not _is_mount(route):
                view = getattr(route, "endpoint", None)
                return None if view is None else (_template(prefix), view)
            scope |= child
            routes = route.routes
        return None


def _leaves(routes: Any) -> Iterator[Any]:
    """The routes themselves, also of routers that FastAPI includes without copying them."""
    for route in routes:
        inside = getattr(route, "effective_route_contexts", None)
        if inside is None:
            yield route
        else:
            for context in inside():
                yield getattr(context, "starlette_route", None) or context


def _is_mount(route: Any) -> bool:
    return isinstance(getattr(route, "routes", None), list)


def _looks_at_the_path_alone(route: Any) -> bool:
    """Whether nothing but method and path decides: not so for hosts, and for routes of the app's own making."""
    if _is_mount(route) and not all(map(_looks_at_the_path_alone, _leaves(route.routes))):
        return False
    return _is_known(route) and type(route).__name__ != "Host"


def _is_known(route: Any) -> bool:
    """Whether it is known how this route matches: one of the app's own may take /Chat for /chat."""
    matches = getattr(type(route), "matches", None)
    return getattr(matches, "__module__", "").partition(".")[0] in ("starlette", "fastapi")


class _Flask:
    """Flask, and Quart: Werkzeug's map of URLs, with a view for each endpoint."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._by_host = app.url_map.host_matching or getattr(app, "subdomain_matching", False)
        self._found = functools.lru_cache(maxsize=1024)(self._find)

    def size(self) -> int:
        return len(self._app.view_functions)

    def endpoints(self) -> Iterator[Endpoint]:
        for rule in self._app.url_map.iter_rules():
            view = self._app.view_functions.get(rule.endpoint)
            if view is not None and not rule.websocket:
                methods = _ALL if rule.methods is None else frozenset(rule.methods)
                # A rule may be taken with a slash at its end or without; one of the app's own, in any way.
                known = type(rule).__module__.startswith("werkzeug.")
                beginning = rule.rule.partition("<")[0].rstrip("/") if known else ""
                yield Endpoint(_from_angles(rule.rule), methods - {"OPTIONS"}, view, beginning)

    def find(self, method: str, path: str, surroundings: Mapping[str, Any]) -> tuple[str, Any] | None:
        if not self._by_host:
            return self._found(method, path)
        server = None if self._app.url_map.host_matching else self._app.config["SERVER_NAME"]
        return self._match(self._app.url_map.bind_to_environ(surroundings, server_name=server), method, path)

    def _find(self, method: str, path: str) -> tuple[str, Any] | None:
        urls = self._app.url_map
        return self._match(urls.bind("localhost", subdomain=urls.default_subdomain or ""), method, path)

    def _match(self, adapter: Any, method: str, path: str) -> tuple[str, Any] | None:
        try:
            rule, _ = adapter.match(path, method=method, return_rule=True)
        except Exception as answer:
            # Werkzeug's way to say 404, 405, 308: no view runs.
            if hasattr(answer, "get_response"):
                return None
            raise
        return _from_angles(rule.rule), self._app.view_functions.get(rule.endpoint)


class DjangoRouter:
    """Django's URLconf. It says nothing of methods: a view answers all of them, or refuses some itself."""

    def size(self) -> int:
        return 0

    def endpoints(self) -> Iterator[Endpoint]:
        return self._endpoints(self._urls().get_resolver().url_patterns, "", "/", literal=True)

    def _endpoints(self, patterns: Any, prefix: str, beginning: str, *, literal: bool) -> Iterator[Endpoint]:
        for pattern in patterns:
            written = str(pattern.pattern)
            # What an expression begins with, or a language in front, is not looked into.
            plain = literal and type(pattern.pattern).__name__ == "RoutePattern"
            begins = beginning + written.partition("<")[0] if plain else beginning
            inner = getattr(pattern, "url_patterns", None)
            if inner is not None:
                yield from self._endpoints(inner, prefix + written, begins, literal=plain and "<" not in written)
            else:
                yield Endpoint(_from_angles(prefix + written), _ALL, pattern.callback, begins)

    def find(self, method: str, path: str, surroundings: Mapping[str, Any]) -> tuple[str, Any] | None:
        urls = self._urls()
        try:
            match = urls.resolve(path)
        except urls.Resolver404:
            return None
        return _from_angles(match.route), match.func

    def _urls(self) -> Any:
        return sys.modules["django.urls"]  # a handler of Django's has imported it


@functools.lru_cache(maxsize=4096)
def _from_angles(path: str) -> str:
    """`/users/<int:id>`, or a regular expression of Django's, in the syntax of the file."""
    path = re.sub(r"\(\?P<(\w+)>(?:[^()]|\([^()]*\))*\)", r"<\1>", path)  # named groups, one level deep
    path = re.sub(r"(^|/)\^|\\Z|\$$", r"\1", path).replace("\\", "")
    return _template(re.sub(r"<(?:(\w+)(?:\([^)]*\))?:)?(\w+)>", _parameter, path))


def _parameter(match: re.Match[str]) -> str:
    known = match[1] if match[1] in ("path", "int", "float", "uuid") else None
    return f"{{{match[2]}:{known}}}" if known else f"{{{match[2]}}}"


__all__ = ["UNSEEN", "Directory", "DjangoRouter", "ViewRule", "router_of", "survey"]
