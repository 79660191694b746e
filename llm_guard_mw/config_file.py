"""A configuration as it was written: its shape, where each piece stands, and what is wrong with it.

The shape is checked by pydantic, table by table. What does not fit is noted with its line and taken out, so that
the rest can be checked too. Defaults stand in the dataclasses that are built from here, and nowhere else.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from llm_guard_mw import toml_lines
from llm_guard_mw.balances import Budgets
from llm_guard_mw.errors import ConfigError, Mistake
from llm_guard_mw.identity import IdentityRules, JWTRules
from llm_guard_mw.notation import as_part, nearest
from llm_guard_mw.policy import CacheRule, Policy, Route
from llm_guard_mw.pricing import PriceRules

DEFAULT_STORE: Final = "sqlite:///llm_guard.db"
ENVIRONMENT_PREFIX: Final = "LLM_GUARD_"
#: Variables of this package that are no part of the configuration.
_OTHER_VARIABLES: Final = frozenset(
    {
        "LLM_GUARD_CONFIG",
        "LLM_GUARD_CORPUS",
        "LLM_GUARD_HYPOTHESIS",
        "LLM_GUARD_KEY_SECRET",
        "LLM_GUARD_SPOOL",
        "LLM_GUARD_VOCAB",
    }
)
#: Values that are never shown.
_SECRET_KEYS: Final = frozenset({"key", "api_key", "to"})

Place = toml_lines.Path


# ---------------------------------------------------------------- the shape


def default_of(of: type, name: str) -> Any:  # Any: each field has a type of its own
    (known,) = (known for known in fields(of) if known.name == name)
    return known.default


def _wrong(problem: str, fix: str) -> PydanticCustomError:
    # The sentence goes in as context: braces in a template would be read as names.
    return PydanticCustomError("llm_guard", "{problem}", {"problem": problem, "fix": fix})


def _one_or_many(value: object) -> object:
    """A list, or a single text for a list of one."""
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str) else value


def _part(value: object) -> Fraction:
    part = as_part(value)
    if part is None or part > 10:
        raise _wrong(f"{shown(value)} is no part of an amount", "write 0.9 for 90 %; 10 is the most")
    return part


def _positive_part(value: object) -> Fraction:
    part = _part(value)
    if part == 0:
        raise _wrong("0 would be reached before anything is spent", "write a part above 0, such as 0.9")
    return part


def _dollars(value: object) -> Decimal:
    exact = as_part(value)
    if exact is None or exact > 10**9:
        raise _wrong(f"{shown(value)} is no price", "write US dollars per million tokens, such as 2.5")
    return Decimal(repr(value)) if isinstance(value, float) else Decimal(str(value))


_Text = Annotated[str, Field(min_length=1)]
_Texts = Annotated[tuple[_Text, ...], BeforeValidator(_one_or_many)]
_Count = Annotated[int, Field(ge=1, le=2**53 - 1)]
_Part = Annotated[Fraction, PlainValidator(_part)]
_PositivePart = Annotated[Fraction, PlainValidator(_positive_part)]
_Dollars = Annotated[Decimal, PlainValidator(_dollars)]
#: Limits are read by the notation, which explains them better.
_Limits = Annotated[tuple[Any, ...], BeforeValidator(_one_or_many)]
_Failure = Literal["deny", "allow"]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class JWTTable(_Table):
    algorithms: _Texts = default_of(JWTRules, "algorithms")
    key: _Text | None = None
    jwks: _Text | None = None
    jwks_file: _Text | None = None
    audience: _Texts = ()
    issuer: _Text | None = None
    leeway_seconds: Annotated[int, Field(ge=0, le=86_400)] = default_of(JWTRules, "leeway_seconds")
    require: _Texts = ()


class IdentityTable(_Table):
    user: _Texts = default_of(IdentityRules, "user")
    tenant: _Texts = default_of(IdentityRules, "tenant")
    tier: _Texts = default_of(IdentityRules, "tier")
    trusted_proxies: _Texts = ()
    anonymous: Literal["reject", "ip", "shared"] = default_of(IdentityRules, "anonymous")
    jwt: JWTTable | None = None


class _Budgets(_Table):
    warning: _PositivePart = default_of(Budgets, "warning")
    critical: _PositivePart = default_of(Budgets, "critical")
    hard: _PositivePart = default_of(Budgets, "hard")
    overdraft: _Part = default_of(Budgets, "overdraft")


class _Price(_Table):
    input: _Dollars | None = None
    output: _Dollars | None = None
    cached_input: _Dollars | None = None
    cache_write: _Dollars | None = None
    request: _Dollars | None = None


class _Prices(_Table):
    unpriced: Literal["ceiling", "deny", "allow"] = default_of(PriceRules, "unpriced")
    models: dict[str, _Price] = {}


class _Cache(_Table):
    ttl: _Count = default_of(CacheRule, "ttl")
    stale: Annotated[int, Field(ge=0, le=2**31)] = default_of(CacheRule, "stale")
    scope: Literal["user", "tenant", "shared"] = default_of(CacheRule, "scope")
    version: _Text = default_of(CacheRule, "version")


class RouteTable(_Table):
    path: str | None = None
    methods: _Texts = ("POST",)
    name: _Text | None = None
    feature: _Text | None = None
    api: _Text | None = None
    model: _Text | None = None
    max_output_tokens: _Count | None = None
    max_input_tokens: _Count | None = None
    limits: _Limits = ()
    degrade: _Texts = ()
    cache: _Cache | None = None
    usage: Literal["auto", "captured"] = default_of(Route, "usage")
    on_store_failure: _Failure | None = None


class _Tier(_Table):
    limits: _Limits = ()


class UpstreamTable(_Table):
    prefix: str | None = None
    url: _Text | None = None
    provider: _Text | None = None
    api_key: _Text | None = None


class _Alert(_Table):
    to: _Text | None = None


class File(_Table):
    store: _Text = DEFAULT_STORE
    ledger: _Text = DEFAULT_STORE
    timezone: _Text = default_of(Policy, "timezone")
    lease_seconds: Annotated[int, Field(ge=1, le=86_400)] = default_of(Policy, "lease_seconds")
    mode: Literal["enforce", "observe"] = default_of(Policy, "mode")
    inspect_bytes: Annotated[int, Field(ge=1024, le=2**30)] = default_of(Policy, "inspect_bytes")
    default_output_tokens: _Count = default_of(Policy, "default_output_tokens")
    min_output_tokens: _Count = default_of(Policy, "min_output_tokens")
    strict: bool = default_of(Policy, "strict")
    unbounded: Literal["deny", "allow"] = default_of(Policy, "unbounded")
    journal_max: _Count = default_of(Policy, "journal_max")
    retention_days: _Count = default_of(Policy, "retention_days")
    new_scope_values: _Count = default_of(Policy, "new_scope_values")
    on_store_failure: _Failure = default_of(Policy, "on_store_failure")
    limits: _Limits = ()
    identity: IdentityTable = IdentityTable()
    budgets: _Budgets = _Budgets()
    models: dict[str, _Text] = {}
    prices: _Prices = _Prices()
    routes: tuple[RouteTable, ...] = ()
    tiers: dict[str, _Tier] = {}
    upstreams: tuple[UpstreamTable, ...] = ()
    alerts: tuple[_Alert, ...] = ()


def known_keys() -> dict[str, object]:
    """Every key with its default, as `budgets.hard` or `routes[].name`. The reference is held against it."""
    return dict(_walk(File, ""))


def _walk(table: type[_Table], prefix: str) -> Iterator[tuple[str, object]]:
    for name, known in table.model_fields.items():
        inner = _SUBTABLES.get((table, name))
        if inner is None:
            yield prefix + name, known.default
        else:
            below, many = inner
            yield from _walk(below, f"{prefix}{name}{many}.")


#: The tables below each table, and what stands for their names: "[]" for a list of them, ".NAME" for any name.
_SUBTABLES: Final[Mapping[tuple[type[_Table], str], tuple[type[_Table], str]]] = {
    (File, "identity"): (IdentityTable, ""),
    (IdentityTable, "jwt"): (JWTTable, ""),
    (File, "budgets"): (_Budgets, ""),
    (File, "prices"): (_Prices, ""),
    (_Prices, "models"): (_Price, ".NAME"),
    (File, "routes"): (RouteTable, "[]"),
    (RouteTable, "cache"): (_Cache, ""),
    (File, "tiers"): (_Tier, ".NAME"),
    (File, "upstreams"): (UpstreamTable, "[]"),
    (File, "alerts"): (_Alert, "[]"),
}


# ---------------------------------------------------------------- the document


class Document:
    """What was written, where each piece of it stands, and what is wrong with it."""

    def __init__(self, name: str, raw: dict[str, Any], lines: toml_lines.TomlLines | None, folder: Path) -> None:
        self.name = name
        self.folder = folder  # what `file:` is relative to
        self.raw = raw
        self._lines = lines
        self._variables: dict[Place, str] = {}  # what the environment said, and under which name
        self._found: list[tuple[int, Mistake]] = []
        self._taken_out: set[Place] = set()

    @classmethod
    def of_mapping(cls, source: Mapping[str, Any]) -> Document:
        return cls("configuration", _plain(source), None, Path())

    @classmethod
    def of_file(cls, source: str | os.PathLike[str]) -> Document:
        name = os.fspath(source)
        path = Path(name)
        try:
            # Editors on Windows like to begin a file with a byte order mark.
            text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        except FileNotFoundError as error:
            fix = "`llm-guard-mw init` writes one to start with; or name another file"
            raise ConfigError([Mistake(name, "there is no such file", fix)]) from error
        except OSError as error:
            raise ConfigError(
                [Mistake(name, f"cannot be read: {error.strerror}", "give the path of a file")]
            ) from error
        except UnicodeDecodeError as error:
            line = 1 + error.object.count(b"\n", 0, error.start)
            raise ConfigError([Mistake(f"{name}:{line}", "is not UTF-8", "save the file as UTF-8")]) from error
        try:
            # The digits as they are written: a price of 0.1 is not the double next to it.
            raw = tomllib.loads(text, parse_float=Decimal)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ConfigError([_syntax_mistake(name, text, str(error))]) from error
        return cls(name, raw, toml_lines.TomlLines(text), path.parent)

    # ------------------------------------------------------------ the environment

    def override(self, environ: Mapping[str, str]) -> None:
        """Put in what the environment says: `LLM_GUARD_BUDGETS__HARD=1.1`, `LLM_GUARD_ROUTES__0__MODEL=gpt-4o`."""
        for variable in sorted(environ):
            if variable.startswith(ENVIRONMENT_PREFIX) and variable not in _OTHER_VARIABLES:
                names = variable.removeprefix(ENVIRONMENT_PREFIX).split("__")
                self._put(variable, names, _parsed(environ[variable]))

    def _put(self, variable: str, names: list[str], value: object) -> None:
        here: Any = self.raw  # Any: whatever the file holds there
        place: Place = ()
        for number, name in enumerate(names):
            last = number == len(names) - 1
            key: str | int
            if isinstance(here, list):
                if not name.isdigit() or int(name) >= len(here):
                    fix = f"write a number from 0 to {len(here) - 1}" if here else "write the list itself"
                    self._found.append((_LAST, Mistake(variable, f'"{name}" is no item of {_dotted(place)}', fix)))
                    return
                key = int(name)
            elif isinstance(here, dict):
                # Shells write names in capitals; a tier "Pro" is meant by PRO.
                key = next((known for known in here if known.lower() == name.lower()), name.lower())
            else:
                problem = f"{_dotted(place)} is {shown(here, place)}, and has nothing below it"
                self._found.append((_LAST, Mistake(variable, problem, f"set {_variable(place)} instead")))
                return
            place = (*place, key)
            if last:
                here[key] = value
                self._variables[place] = variable
            elif isinstance(here, dict):
                if key not in here:
                    here[key] = {}
                    self._variables[place] = variable
                here = here[key]
            else:
                here = here[key]

    # ------------------------------------------------------------ mistakes

    @property
    def mistakes(self) -> bool:
        return bool(self._found)

    def mistakes_in_order(self) -> list[Mistake]:
        """As they stand in the file, then those of the environment."""
        found = sorted(self._found, key=lambda pair: pair[0])
        return list(dict.fromkeys(mistake for _, mistake in found))

    def mistake(self, place: Place, problem: str, fix: str) -> None:
        self._found.append((self._line(place), self.noted(place, problem, fix)))

    def noted(self, place: Place, problem: str, fix: str) -> Mistake:
        """A mistake or a warning, with where it stands."""
        variable = self._variable_of(place)
        if variable is not None:
            return Mistake(variable, problem, fix)
        if self._lines is None:
            return Mistake(f"{self.name} {_dotted(place)}".strip(), problem, fix)
        return Mistake(f"{self.name}:{self._lines.line(place)} {_dotted(place)}".strip(), problem, fix)

    def _line(self, place: Place) -> int:
        if self._variable_of(place) is not None or self._lines is None:
            return _LAST
        return self._lines.line(place)

    def _variable_of(self, place: Place) -> str | None:
        for end in range(len(place), 0, -1):
            if (variable := self._variables.get(place[:end])) is not None:
                return variable
        return None

    # ------------------------------------------------------------ reading

    def read(self) -> File:
        """The document in its shape. What does not fit is noted and taken out, so that the rest can be checked."""
        while True:
            try:
                return File.model_validate(_with_tuples(self.raw))
            except ValidationError as error:
                for detail in error.errors(include_url=False):
                    place = _place_of(detail["loc"])
                    self.mistake(place, *self._explained(detail, place))
                    self._taken_out.add(place)
                    _take_out(self.raw, place)

    def took_out(self, place: Place) -> bool:
        """Whether something stood at `place` that was reported and taken out."""
        return place in self._taken_out

    def _explained(self, detail: ErrorDetails, place: Place) -> tuple[str, str]:
        kind, context = detail["type"], detail.get("ctx", {})
        value = shown(detail["input"], place)
        if kind == "llm_guard":
            return f"{name_of(place)}: {context['problem']}", context["fix"]
        if kind == "extra_forbidden":
            return f'unknown key "{place[-1]}"', _nearest_key(place)
        if kind == "literal_error":
            options = re.findall(r"'([^']*)'", context["expected"])
            listed = ", ".join(f'"{option}"' for option in options)
            close = nearest(str(detail["input"]), options)
            fix = f"{close} It is one of {listed}" if close.startswith("did") else f"write one of {listed}"
            return f"{name_of(place)} = {value} is not known", fix
        if kind in ("greater_than_equal", "less_than_equal"):
            bound = "at least" if "ge" in context else "at most"
            return (
                f"{name_of(place)} = {value} is out of bounds",
                f"write {bound} {context.get('ge', context.get('le'))}",
            )
        if kind == "string_too_short":
            return f"{name_of(place)} is empty", "write a text, or leave the key out"
        wanted = next((fix for begin, fix in _SHAPES.items() if kind.startswith(begin)), "")
        if kind == "string_type" and self._variable_of(place) is not None:
            wanted = f"write a text: put it in quotes of its own, '\"{detail['input']}\"'"
        return f"{name_of(place)} = {value} has the wrong type", wanted or str(detail["msg"])


_LAST: Final = 2**31
_SHAPES: Final = {
    "string": 'write a text in quotes: "…"',
    "int": "write a whole number, such as 120",
    "bool": "write true or false",
    "tuple": 'write a list: ["…"]',
    "dict": "write a table",
    "model": "write a table",
}


def _parsed(text: str) -> object:
    """A value from the environment: as TOML if it is one (`1.1`, `true`, `["a"]`), else the text itself."""
    try:
        values = tomllib.loads(f"value = {text}", parse_float=Decimal)
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    return values["value"] if list(values) == ["value"] else text


def _plain(value: Any) -> Any:
    """A copy in dicts and lists, which the overrides may change."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _with_tuples(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The raw document, with its lists of tables as the tuples that the shape has."""
    return {key: tuple(item) if isinstance(item, list) else item for key, item in raw.items()}


def _place_of(loc: tuple[int | str, ...]) -> Place:
    return tuple(part for part in loc if part != "[key]")


def _take_out(raw: Any, place: Place) -> None:
    """Remove what stands at `place`; of a list's item, the whole list, so that no other item changes its number."""
    while place and isinstance(place[-1], int):
        place = place[:-1]
    here = raw
    for part in place[:-1]:
        try:
            here = here[part]
        except (KeyError, IndexError, TypeError):
            return  # an earlier mistake took it out
    if isinstance(here, dict) and place:
        here.pop(place[-1], None)


def _syntax_mistake(name: str, text: str, message: str) -> Mistake:
    match = re.fullmatch(r"(.*?) \(at (?:line (\d+), column \d+|end of document)\)", message)
    if match is None:
        return Mistake(name, f"is not TOML: {message}", "mend the file")
    lines = text.splitlines()
    if match[2] is None:
        fix = "the last value is missing, or a list, table or text is not closed"
        return Mistake(f"{name}:{max(1, len(lines))}", f"is not TOML: {match[1]} at the end", fix)
    number = int(match[2])
    # The line may hold a key. Up to the equals sign it does not.
    written = lines[number - 1].partition("=")[0].strip() if number <= len(lines) else ""
    near = f', near "{written[:40]}"' if written else ""
    return Mistake(f"{name}:{number}", f"is not TOML: {match[1]}{near}", _SYNTAX_FIXES.get(match[1], "mend this line"))


_SYNTAX_FIXES: Final = {
    "Invalid value": 'write texts in quotes: "…"',
    "Cannot overwrite a value": "the key stands here a second time: keep one of them",
    "Cannot declare": "the table stands here a second time: keep one of them",
    "Unclosed array": 'close the list with "]"',
    "Unterminated string": "close the quotes",
    "Illegal character '\\n'": "close the quotes in the same line",
}


def _nearest_key(place: Place) -> str:
    table: type[_Table] | None = File
    inside = list(place[:-1])
    while inside and table is not None:
        below, many = _SUBTABLES.get((table, str(inside.pop(0))), (None, ""))
        table = below
        if many and inside:
            inside.pop(0)
    return nearest(str(place[-1]), list(table.model_fields)) if table is not None else "leave it out"


def _dotted(place: Place) -> str:
    """`routes[0].limits[1]`, `models."gpt-4o"`"""
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else json.dumps(part))
    return text


def undotted(text: str) -> Place:
    """The place that `_dotted` wrote, of plain names."""
    return tuple(int(number) if number else name for name, number in re.findall(r"([\w-]+)|\[(\d+)\]", text))


def name_of(place: Place) -> str:
    names = [part for part in place if isinstance(part, str)]
    return names[-1] if names else "the file"


def _variable(place: Place) -> str:
    return ENVIRONMENT_PREFIX + "__".join(str(part).upper() for part in place)


def shown(value: object, place: Place = ()) -> str:
    """A value as it may be shown: short, and never a secret."""
    if place and place[-1] in _SECRET_KEYS:
        return '"…"'
    if isinstance(value, str):
        value = re.sub(r"(://)[^@/\s]*@", r"\1…@", value)
        return f'"{value}"' if len(value) <= 60 else f'"{value[:57]}…"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return "a list"
    return str(value)[:60]
