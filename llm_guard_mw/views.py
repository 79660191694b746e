"""`@guarded`: limits, a feature and a model written at the view that they are for.

    @app.post("/summarize")
    @guarded("5 requests/minute per user", "$1/day per user", feature="summarizer", model="gpt-4o")
    def summarize(): ...

Rule 1. The view is marked and given back as it is: its signature, its being sync, async or a class stay what they
        were, and a call of it costs nothing more. directory.py finds the marks, before a request reaches its view.
Rule 2. What cannot be read is an error where it is written, when the module is imported.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Final, TypeVar
from weakref import WeakSet

from llm_guard_mw.balances import Budgets, Limit
from llm_guard_mw.errors import ConfigError, Mistake
from llm_guard_mw.notation import NotationError, nearest, parse_limit

#: The attribute that a marked view has.
MARK: Final = "__llm_guard__"
METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "QUERY")
#: What the file says is not known yet when a view is marked: only what contradicts itself is wrong then.
_ANY_BUDGETS: Final = Budgets(critical=Fraction(0), hard=Fraction(10))

View = TypeVar("View", bound=Callable[..., Any])  # whatever a framework takes for a view: functions and classes


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Mark:
    """What `@guarded` says about one view. Two marks are two views, whatever they say."""

    limits: tuple[str | Mapping[str, Any], ...] = ()  # Any: the table form, foreign until it is read
    feature: str | None = None
    model: str | None = None
    name: str | None = None
    methods: frozenset[str] | None = None  # None: all that the view answers
    where: str = ""  # "views.py:14"
    title: str = ""  # "app.views:summarize"
    parts: tuple[Mark, ...] = ()  # of a view that is marked more than once

    def guards(self, method: str) -> bool:
        """Whether a request of this method counts. OPTIONS never does: a browser asks it before the request itself."""
        return method != "OPTIONS" and (self.methods is None or method in self.methods)

    def everything(self) -> Iterator[Mark]:
        """This mark, and those that it was put together from."""
        yield self
        for part in self.parts:
            yield from part.everything()

    def limits_at(self, place: str, *, timezone: str, budgets: Budgets) -> tuple[Limit, ...]:
        """The limits, read for where they count. Raises ConfigError."""
        limits, mistakes = _read(self.limits, self.where, place=place, timezone=timezone, budgets=budgets)
        if mistakes:
            raise ConfigError(mistakes)
        return limits


#: Every mark whose view is still there: so that one which no route leads to can be told.
marked: Final[WeakSet[Mark]] = WeakSet()


def guarded(
    *limits: str | Mapping[str, Any],
    feature: str | None = None,
    model: str | None = None,
    name: str | None = None,
    methods: str | Iterable[str] | None = None,
) -> Callable[[View], View]:
    """Guard a view of Flask, Django, Starlette or FastAPI: its requests count against `limits`.

        @app.post("/summarize")
        @guarded("5 requests/minute per user", "$1/day per user", feature="summarizer", model="gpt-4o")

    Each limit is a text or a table, as under [[routes]] in the configuration file, where `feature`, `model`, `name`
    and `methods` mean the same. It stands below the framework's own decorator, and above all others. Raises
    ConfigError with everything that is wrong.
    """
    caller = sys._getframe(1)
    where = f"{caller.f_code.co_filename}:{caller.f_lineno}"
    said = (methods,) if isinstance(methods, str) else None if methods is None else tuple(methods)
    mistakes = [*_read(limits, where, budgets=_ANY_BUDGETS)[1], *_other_mistakes(where, feature, model, name, said)]
    if mistakes:
        raise ConfigError(mistakes)
    wanted = None if said is None else frozenset(method.upper() for method in said)
    if wanted and "GET" in wanted:  # whoever answers GET answers HEAD with it
        wanted |= {"HEAD"}
    mark = Mark(limits, feature, model, name, wanted, where)

    def put_on(view: View) -> View:
        own = replace(mark, title=title_of(view))
        earlier = vars(view).get(MARK) if hasattr(view, "__dict__") else None
        if isinstance(earlier, Mark):
            _refuse_contradiction(own, earlier)
            own = _together(own, earlier)
        try:
            setattr(view, MARK, own)
        except (AttributeError, TypeError) as error:
            problem = f"{type(view).__name__} {own.title} cannot be marked"
            raise ConfigError([Mistake(where, problem, "put @guarded on a function or a class")]) from error
        if not isinstance(view, functools.partial):  # Django's method_decorator makes one for every request
            marked.add(own)
        return view

    return put_on


def marks_of(view: Any, method: str) -> tuple[Mark, ...]:  # Any: whatever a framework has for a view
    """What `@guarded` says about requests of `method` to a view; of class-based views, the class, then its handler."""
    kind = view if isinstance(view, type) else getattr(view, "view_class", None)
    marks = [] if kind is view else [_mark(view)]
    if isinstance(kind, type):
        handler = getattr(kind, method.lower(), None)
        if handler is None and method == "HEAD":
            handler = getattr(kind, "get", None)
        marks += [_mark(kind), _mark(handler)]
    return tuple(dict.fromkeys([mark for mark in marks if mark is not None and mark.guards(method)]))


def _together(outer: Mark, inner: Mark) -> Mark:
    """Two marks on one view as one."""
    methods = outer.methods & inner.methods if outer.methods and inner.methods else outer.methods or inner.methods
    return Mark(
        limits=(*outer.limits, *inner.limits),
        feature=inner.feature or outer.feature,
        model=inner.model or outer.model,
        name=inner.name or outer.name,
        methods=methods,
        where=outer.where,
        title=inner.title,
        parts=(outer, inner),
    )


def title_of(view: Any) -> str:  # Any: as above
    """`app.views:summarize`: where a reader finds the view."""
    while isinstance(view, functools.partial):
        view = view.func
    view = getattr(view, "view_class", view)
    named = view if hasattr(view, "__qualname__") else type(view)
    return f"{getattr(named, '__module__', '?')}:{named.__qualname__}"


def _mark(view: Any) -> Mark | None:
    """The mark on a view, also behind decorators that do no more than point to what they wrap."""
    for _ in range(32):
        found = getattr(view, MARK, None)
        if isinstance(found, Mark):
            return found
        view = view.func if isinstance(view, functools.partial) else getattr(view, "__wrapped__", None)
        if view is None:
            return None
    return None


# ---------------------------------------------------------------- what is written


def _read(
    said: Iterable[Any],  # Any: whatever somebody wrote
    where: str,
    *,
    place: str = "all",
    timezone: str = "UTC",
    budgets: Budgets,
) -> tuple[tuple[Limit, ...], list[Mistake]]:
    limits: list[Limit] = []
    mistakes: list[Mistake] = []
    for number, limit in enumerate(said):
        here = f"{where} @guarded limit {number + 1}"
        if not isinstance(limit, str | Mapping):
            fix = 'write @guarded("$2/day per user"), or @guarded({"limit": "$2/day per user", …})'
            problem = "@guarded has no parentheses" if callable(limit) else f"{limit!r} is not a limit"
            mistakes.append(Mistake(here, problem, fix))
            continue
        try:
            limits.append(parse_limit(limit, place=place, timezone=timezone, budgets=budgets))
        except NotationError as error:
            mistakes += [Mistake(here, fault.problem, fault.fix) for fault in error.faults]
    return tuple(limits), mistakes


def _other_mistakes(
    where: str, feature: object, model: object, name: object, methods: tuple[object, ...] | None
) -> Iterable[Mistake]:
    here = f"{where} @guarded"
    for key, value in (("feature", feature), ("model", model), ("name", name)):
        if value is not None and not (isinstance(value, str) and value):
            yield Mistake(here, f"{key} = {value!r} is no name", "write a text, or leave it out")
    if isinstance(model, str) and model.startswith("body:") and model != "body:model":
        yield Mistake(here, f'model = "{model}" cannot be read off a body', 'write "body:model", or a model\'s name')
    if methods is not None and not methods:
        yield Mistake(here, "methods is empty", 'write methods=["POST"], or leave it out')
    for method in methods or ():
        if not isinstance(method, str) or method.upper() not in METHODS:
            options = "OPTIONS is never guarded: leave it out" if method == "OPTIONS" else nearest(str(method), METHODS)
            yield Mistake(here, f"unknown method {method!r}", options)


def _refuse_contradiction(own: Mark, earlier: Mark) -> None:
    mistakes = [
        Mistake(f"{own.where} @guarded", f'{key} = "{one}", and {earlier.where} says "{other}"', "keep one of them")
        for key in ("feature", "model", "name")
        if (one := getattr(own, key)) and (other := getattr(earlier, key)) and one != other
    ]
    if mistakes:
        raise ConfigError(mistakes)
