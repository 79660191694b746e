"""How a limit is written: "$2/day per user", "40k tokens/minute per user burst 80k", or a table.

    AMOUNT UNIT / PERIOD per SCOPE [burst AMOUNT] [rolling]
    AMOUNT UNIT total per SCOPE
    N concurrent per SCOPE

docs/reference/limits.md is the description for users. What cannot be read is a `NotationError`, which lists every
piece that is wrong, since whoever mends a file wants to mend it once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from difflib import get_close_matches
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Final, cast
from zoneinfo import ZoneInfo, available_timezones

from llm_guard_mw.arithmetic import MS_PER_DAY, MS_PER_SECOND, Period
from llm_guard_mw.balances import BUDGET_UNITS, NOTHING, SCOPES, Budgets, Limit, without_implied
from llm_guard_mw.model import EXACT_MAX, NANOS_PER_DOLLAR, Kind, Unit

#: No budget or bucket may be larger: what is spent and what is held stay exact in a double, also beside a debt.
AMOUNT_MAX: Final = 2**52
#: A bucket's period in ticks: its square is the largest product of `arithmetic.drain`.
PERIOD_TICKS_MAX: Final = 94_906_265
#: What a `when` may ask for, besides `tag:NAME`.
CONDITIONS: Final = ("tier", "feature", "tenant", "user", "model", "experiment", "variant")
#: Names of `X-Metering-Tags` that are understood, and the scope to write instead of `tag:NAME`.
_UNDERSTOOD_TAGS: Final = {
    "tier": "tier",
    "user_tier": "tier",
    "feature": "feature",
    "workflow_id": "workflow",
    "session_id": "session",
}
#: The keys of a limit's table form.
LIMIT_KEYS: Final = ("limit", "when", "anchor", "timezone", "warning", "critical", "hard", "overdraft")


@dataclass(frozen=True, slots=True)
class Fault:
    """One piece of a limit that is wrong. `key` is the key of the table form it stands under, or empty."""

    problem: str
    fix: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.problem} ({self.fix})"


class NotationError(ValueError):
    """A limit that cannot be read. `.faults` are all the pieces that are wrong."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(str(fault) for fault in faults))


_EXAMPLES: Final = 'a limit looks like "20 requests/minute per user", "$2/day per user" or "2 concurrent per user"'
_NUMBER = re.compile(r"(?:\d+(?:_\d+)*)?(?:\.\d+)?")
_AMOUNT = re.compile(r"(?P<dollar>\$?)\s*(?P<number>[-+]?[0-9._,]+)(?P<suffix>[A-Za-z]*)(?:\s+(?P<unit>.+))?")
_RATE = re.compile(r"(?P<what>.+?)\s*(?:/|\s+per\s)\s*(?P<period>.+)", re.IGNORECASE)
_PERIOD = re.compile(r"(?:(?P<count>\d+)\s*)?(?P<name>[a-z]+)", re.IGNORECASE)
_SUFFIXES: Final = {"": 1, "k": 1000, "K": 1000, "M": 1_000_000}
_UNITS: Final = {
    "request": Unit.REQUESTS,
    "requests": Unit.REQUESTS,
    "token": Unit.TOKENS,
    "tokens": Unit.TOKENS,
    "input token": Unit.INPUT_TOKENS,
    "input tokens": Unit.INPUT_TOKENS,
    "output token": Unit.OUTPUT_TOKENS,
    "output tokens": Unit.OUTPUT_TOKENS,
    "credit": Unit.CREDITS,
    "credits": Unit.CREDITS,
}
_DOLLAR_WORDS: Final = frozenset({"usd", "dollar", "dollars", "us$", "eur", "euro", "euros"})
_PERIOD_SECONDS: Final = {
    "second": 1,
    "minute": 60,
    "hour": 3600,
    "day": 86_400,
    "week": 7 * 86_400,
    "month": 30 * 86_400,
}
_CALENDAR: Final = ("day", "week", "month")
_SHORT_PERIODS: Final = {
    "s": "second", "sec": "second", "secs": "second", "m": "minute", "min": "minute", "mins": "minute",
    "h": "hour", "hr": "hour", "hrs": "hour", "d": "day", "daily": "day", "w": "week", "wk": "week",
    "mo": "month", "mth": "month", "monthly": "month",
}  # fmt: skip
#: What others call our scopes.
_OTHER_NAMES: Final = {
    "customer": "tenant", "org": "tenant", "organization": "tenant", "organisation": "tenant", "account": "tenant",
    "workspace": "tenant", "team": "tag:team", "plan": "tier", "route": "feature", "all": "global", "total": "global",
}  # fmt: skip
_ANCHOR_MAX: Final = {"week": 7, "month": 31}


def parse_limit(
    limit: str | Mapping[str, Any],  # the table form is foreign until it is checked here
    *,
    place: str = "all",
    timezone: str = "UTC",
    budgets: Budgets | None = None,
    tier: str | None = None,
) -> Limit:
    """The limit that `limit` says, as text or as a table. Raises NotationError with every piece that is wrong.

    parse_limit("$2/day per user", place="route chat")
    parse_limit({"limit": "$50/month per tenant", "anchor": 15, "hard": 1.1})
    """
    faults: list[Fault] = []
    table = {"limit": limit} if isinstance(limit, str) else limit
    _check_keys(table, faults)
    said = _read_text(table.get("limit"), faults)
    when = _read_when(table.get("when"), tier, faults)
    parts = _read_parts(table, budgets or Budgets(), said, faults)
    anchor = _read_anchor(table.get("anchor"), said, faults)
    zone = _read_timezone(table.get("timezone"), timezone, said, faults)
    if faults or said is None:
        raise NotationError(faults)
    read = Limit(
        text=said.text,
        slug=said.slug,
        kind=said.kind,
        unit=said.unit,
        amount=said.amount,
        capacity=said.capacity,
        scope=said.scope,
        place=place,
        period_ms=said.period_ms,
        tick_ms=MS_PER_SECOND if (said.period_ms or 0) > MS_PER_DAY else 1,
        period=said.period,
        anchor=anchor,
        timezone=zone,
        when=when,
        tier=tier,
        warning=parts.warning,
        critical=parts.critical,
        hard=parts.hard,
        overdraft=parts.overdraft,
    )
    if read.ceiling(degraded=True) > EXACT_MAX:
        problem = f'"{said.text}" with hard and overdraft is more than can be counted exactly'
        raise NotationError([Fault(problem, f"stay below {_shown(EXACT_MAX, said.unit)} altogether", "limit")])
    return read


@dataclass(frozen=True, slots=True)
class _Said:
    """What the text of a limit says."""

    text: str
    slug: str
    kind: Kind
    unit: Unit
    amount: int
    capacity: int
    scope: tuple[str, ...]
    period_ms: int | None
    period: Period | None


@dataclass(frozen=True, slots=True)
class _Length:
    """A period: so many of a unit of time."""

    count: int
    name: str

    @property
    def ms(self) -> int:
        return self.count * _PERIOD_SECONDS[self.name] * MS_PER_SECOND


def _read_text(text: object, faults: list[Fault]) -> _Said | None:
    if not isinstance(text, str) or not text.strip():
        if text is not None:
            faults.append(Fault(f"{_quoted(text)} is not a limit", _EXAMPLES, "limit"))
        return None
    before = len(faults)
    text = " ".join(text.split())
    rest, rolling, burst = _peel_tail(text)
    rest, scope_text = _peel_scope(rest)
    scope = _read_scope(scope_text, rest, faults)
    if (match := re.fullmatch(r"(.+?)\s+total", rest, re.IGNORECASE)) is not None:
        kind, what, length = Kind.TOTAL, match[1], None
    elif (match := re.fullmatch(r"(.+?)\s+concurrent", rest, re.IGNORECASE)) is not None:
        kind, what, length = Kind.CONCURRENT, match[1], None
    elif (match := _RATE.fullmatch(rest)) is not None:
        what = match["what"]
        length = _read_period(what, match["period"], rolling, faults)
        kind = Kind.CALENDAR if length and length.name in _CALENDAR and not rolling else Kind.BUCKET
    else:
        if scope_text is None and _AMOUNT.fullmatch(rest) is None:
            del faults[before:]  # the text is nothing like a limit: a missing scope is the least of it
        _explain_shapeless(text, rest, faults)
        return None
    exact, unit = _read_amount(what, kind, length, faults)
    capacity = _read_burst(burst, kind, unit, exact, faults)
    if rolling and length is None and kind is not Kind.BUCKET:
        faults.append(Fault(f'"rolling" makes no sense in "{text}"', 'leave "rolling" out', "limit"))
    if len(faults) > before or exact is None or unit is None or capacity is None:
        return None
    bucket = kind is Kind.BUCKET and length is not None
    return _Said(
        text=text,
        slug=_slug(kind, unit, length, scope),
        kind=kind,
        unit=unit,
        amount=exact,
        capacity=capacity,
        scope=scope,
        period_ms=length.ms if bucket and length else None,
        period=cast("Period", length.name) if kind is Kind.CALENDAR and length else None,
    )


def _peel_tail(text: str) -> tuple[str, bool, str | None]:
    """The text without `[burst AMOUNT] [rolling]`, which may stand in either order."""
    rolling, burst = False, None
    while True:
        if (match := re.fullmatch(r"(.+?)\s+rolling", text, re.IGNORECASE)) is not None and not rolling:
            text, rolling = match[1], True
        elif (match := re.fullmatch(r"(.+?)\s+rolling(\s+(?:per\s.+|global))", text, re.IGNORECASE)) is not None:
            text, rolling = match[1] + match[2], True
        elif (match := re.fullmatch(r"(.+?)\s+burst(?:\s+(.*))?", text, re.IGNORECASE)) is not None and burst is None:
            text, burst = match[1], match[2] or ""
            if (late := re.fullmatch(r"(.*?)\s+(per\s.+|global)", burst, re.IGNORECASE)) is not None:
                text, burst = f"{text} {late[2]}", late[1]  # "... burst 80k per user" reads just as well
        else:
            return text, rolling, burst


def _peel_scope(text: str) -> tuple[str, str | None]:
    if (match := re.fullmatch(r"(.+?)(?:\s+per)?\s+global", text, re.IGNORECASE)) is not None:
        return match[1], "global"
    head, per, scope = _rpartition_per(text)
    if not per or _names_a_period(scope):  # "20 requests per minute": that "per" stands for the slash
        return text, None
    while True:
        shorter, per, more = _rpartition_per(head)
        if not per or _names_a_period(more):
            return head, scope
        head, scope = shorter, f"{more} per {scope}"  # "per user per feature": the scope's reader explains it


def _rpartition_per(text: str) -> tuple[str, str, str]:
    match = re.fullmatch(r"(.+)\s+(per)\s+(.+)", text, re.IGNORECASE)
    return (match[1], match[2], match[3]) if match else (text, "", "")


def _names_a_period(words: str) -> bool:
    match = _PERIOD.fullmatch(words)
    return match is not None and match["name"].lower().removesuffix("s") in _PERIOD_SECONDS


def _read_scope(text: str | None, rest: str, faults: list[Fault]) -> tuple[str, ...]:
    if text is None:
        problem = f'"{rest}" does not say whose usage it counts'
        faults.append(Fault(problem, f'add a scope: "{rest} per user", or "{rest} global"', "limit"))
        return ()
    words = [word.strip() for word in text.split("+")]
    scope = [word if word.lower().startswith("tag:") else word.lower() for word in words]
    before = len(faults)
    for word in scope:
        if (fault := _scope_fault(word)) is not None:
            faults.append(fault)
    if len(faults) > before:
        return ()
    scope = ["tag:" + word[4:] if word.lower().startswith("tag:") else word for word in scope]
    if len(set(scope)) < len(scope):
        faults.append(
            Fault(f'scope "{text}" names one part twice', f'write "{"+".join(dict.fromkeys(scope))}"', "limit")
        )
    if "global" in scope and len(scope) > 1:
        others = "+".join(word for word in scope if word != "global")
        faults.append(Fault(f'"global" stands alone, not in "{text}"', f'write "per {others}" or "global"', "limit"))
    return without_implied(scope)


def _scope_fault(word: str) -> Fault | None:
    if word.lower().startswith("tag:"):
        name = word[4:]
        if not name or " " in name:
            return Fault(f'"{word}" names no tag', 'write the tag\'s name behind the colon: "tag:team"', "limit")
        if name in _UNDERSTOOD_TAGS:
            return Fault(f'"{word}" is not a free tag', f'write "per {_UNDERSTOOD_TAGS[name]}"', "limit")
        return None
    if word in SCOPES:
        return None
    if re.fullmatch(r"\w+(\s*(,|\band\b|\bper\b|\s)\s*\w+)+", word):
        joined = "+".join(part for part in re.split(r"[\s,]+", word) if part not in ("and", "per", ""))
        return Fault(f'scope "{word}" is not one word', f'join scopes with "+": "per {joined}"', "limit")
    fix = f'write "per {_OTHER_NAMES[word]}"' if word in _OTHER_NAMES else nearest(word, [*SCOPES, "tag:NAME"])
    return Fault(f'unknown scope "{word}"', fix, "limit")


def _read_period(what: str, text: str, rolling: bool, faults: list[Fault]) -> _Length | None:
    match = _PERIOD.fullmatch(text.strip())
    if match is None:
        faults.append(Fault(f'"{text}" is not a period', 'write "/minute", "/5 minutes" or "/day"', "limit"))
        return None
    name = match["name"].lower()
    count = int(match["count"][:12]) if match["count"] else 1
    if count == 0:
        faults.append(Fault(f'the period "{text}" is empty', f'write "/{name}"', "limit"))
        return None
    length = _plain_tail(what, text) or _own_tail(count, name)
    if length is None:
        faults.append(Fault(f'unknown period "{text}"', _period_fix(name, count), "limit"))
    elif length.name in _CALENDAR and not rolling and length.count != 1:
        fix = f'write "/{length.name}", or "/{text} …" with "rolling" at the end for a bucket of that length'
        faults.append(Fault(f'"{text}" is no calendar period: a budget spans one day, week or month', fix, "limit"))
    elif length.ms // (MS_PER_SECOND if length.ms > MS_PER_DAY else 1) > PERIOD_TICKS_MAX:
        days = PERIOD_TICKS_MAX // 86_400
        faults.append(Fault(f'the period "{text}" is too long', f"a bucket spans at most {days} days", "limit"))
        return None
    return length


def _plain_tail(what: str, text: str) -> _Length | None:
    """What the `limits` package makes of a plain `N/period`; None for what it cannot read."""
    from limits import parse  # its import costs more than this whole module

    number = re.match(r"[0-9]+(?![0-9._,A-Za-z])", what)
    if number is None:
        return None
    try:
        item = parse(f"{number[0]}/{text}")
    except ValueError:
        return None
    if item.GRANULARITY.name not in _PERIOD_SECONDS:  # its year has 360 days
        return None
    return _Length(item.multiples, item.GRANULARITY.name)


def _own_tail(count: int, name: str) -> _Length | None:
    singular = name if name in _PERIOD_SECONDS else name.removesuffix("s")
    return _Length(count, singular) if singular in _PERIOD_SECONDS else None


def _period_fix(name: str, count: int) -> str:
    if name in ("year", "years", "yearly", "annual"):
        return f'write "/{365 * count} days … rolling", or a monthly budget'
    if (full := _SHORT_PERIODS.get(name)) is not None:
        return f'write "/{full}"' if count == 1 else f'write "/{count} {full}s"'
    return nearest(name, list(_PERIOD_SECONDS))


def _read_amount(text: str, kind: Kind, length: _Length | None, faults: list[Fault]) -> tuple[int | None, Unit | None]:
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        faults.append(Fault(f'"{text}" does not begin with an amount', _EXAMPLES, "limit"))
        return None, None
    unit = _read_unit(match, kind, faults)
    exact = _read_number(match["number"], match["suffix"], faults)
    if exact is None or unit is None:
        return None, unit
    if unit is Unit.USD:
        exact *= NANOS_PER_DOLLAR
    written = f"{match['dollar']}{match['number']}{match['suffix']}"
    if exact <= 0:
        faults.append(Fault(f"the amount {written} allows nothing", "write an amount above 0", "limit"))
        return None, unit
    if exact.denominator != 1:
        faults.append(Fault(*_whole_fix(written, exact, unit, kind, length), "limit"))
        return None, unit
    if exact > AMOUNT_MAX:
        fix = f"the largest is {_shown(AMOUNT_MAX, unit)}"
        faults.append(Fault(f"the amount {written} is more than can be counted exactly", fix, "limit"))
        return None, unit
    return int(exact), unit


def _read_unit(match: re.Match[str], kind: Kind, faults: list[Fault]) -> Unit | None:
    number, suffix, word = match["number"], match["suffix"], (match["unit"] or "").lower()
    if suffix and suffix not in _SUFFIXES and not word and suffix.lower() in _UNITS:
        faults.append(Fault(f'"{number}{suffix}" needs a space', f'write "{number} {suffix}"', "limit"))
        return None
    if kind is Kind.CONCURRENT:
        if match["dollar"] or word:
            fix = f'write "{number}{suffix} concurrent per user"'
            faults.append(Fault(f'"{match[0]} concurrent": calls are counted there, nothing else', fix, "limit"))
            return None
        return Unit.CONCURRENT
    if match["dollar"]:
        if word:
            fix = f'write "${number}{suffix}", or "{number}{suffix} {word}"'
            faults.append(Fault(f'"${number}{suffix} {word}" has two units', fix, "limit"))
            return None
        return Unit.USD
    if not word:  # "20/minute", as the limits package has it
        return Unit.REQUESTS
    if word in _DOLLAR_WORDS:
        faults.append(Fault(f'unknown unit "{word}"', f'money is in US dollars: write "${number}{suffix}"', "limit"))
        return None
    if word not in _UNITS:
        names = ["requests", "tokens", "input tokens", "output tokens", "credits"]
        faults.append(Fault(f'unknown unit "{word}"', nearest(word, names, also="or a leading $"), "limit"))
        return None
    return _UNITS[word]


def _read_number(number: str, suffix: str, faults: list[Fault]) -> Fraction | None:
    if suffix not in _SUFFIXES:
        if suffix.lower() in _UNITS:  # reported as a missing space
            return None
        fix = f'write "{number}M" for millions' if suffix in ("m", "mio", "mn") else 'write "k" (1000) or "M" (1000000)'
        faults.append(Fault(f'unknown suffix "{suffix}" in "{number}{suffix}"', fix, "limit"))
        return None
    if number.startswith("-"):
        faults.append(Fault(f"the amount {number}{suffix} is negative", "write an amount above 0", "limit"))
        return None
    if not _NUMBER.fullmatch(number) or not any(character.isdigit() for character in number):
        fix = f'write "{number.replace(",", "_")}"' if "," in number else 'write "1000", "1_000", "0.5" or "40k"'
        faults.append(Fault(f'"{number}" is not a number', fix, "limit"))
        return None
    if len(number) > 40:
        faults.append(Fault(f'"{number[:12]}…" has too many digits', f"the largest is {AMOUNT_MAX}", "limit"))
        return None
    return Fraction(Decimal(number.replace("_", ""))) * _SUFFIXES[suffix]


def _whole_fix(written: str, exact: Fraction, unit: Unit, kind: Kind, length: _Length | None) -> tuple[str, str]:
    """Why a broken amount cannot be counted, and how to say the same in whole units."""
    if unit is Unit.USD:
        return f"the amount {written} is finer than a nano-dollar", "write at most nine decimals"
    names = _unit_names(unit)
    problem = f"{written} is not a whole number of {names}"
    if kind in (Kind.TOTAL, Kind.CONCURRENT) or length is None:
        return problem, f"write {int(exact) or 1} or {int(exact) + 1}"
    many, every = exact.numerator, exact.denominator * length.count
    count = f"{many} {names.removesuffix('s') if many == 1 else names}"
    rolling = " … rolling" if length.name in _CALENDAR else ""
    return problem, f'write "{count}/{every} {length.name}s{rolling}"'


def _read_burst(text: str | None, kind: Kind, unit: Unit | None, amount: int | None, faults: list[Fault]) -> int | None:
    """A bucket's capacity: its burst, or its amount."""
    if text is None:
        return amount
    if kind is not Kind.BUCKET:
        fix = 'leave "burst" out, or write a period of seconds, minutes or hours, or "rolling"'
        faults.append(Fault('"burst" is for buckets only', fix, "limit"))
        return None
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        faults.append(Fault(f'"burst {text}" says no amount', 'write "burst 80k" or "burst $5"', "limit"))
        return None
    named = _UNITS.get((match["unit"] or "").lower()) if match["unit"] else unit
    if unit is not None and (bool(match["dollar"]) != (unit is Unit.USD) or named is not unit):
        written = f"{match['number']}{match['suffix']}"
        fix = f'write "burst {"$" if unit is Unit.USD else ""}{written}"'
        faults.append(Fault(f'"burst {text}" has another unit than its limit', fix, "limit"))
        return None
    exact = _read_number(match["number"], match["suffix"], faults)
    if exact is None:
        return None
    exact *= NANOS_PER_DOLLAR if unit is Unit.USD else 1
    if exact <= 0 or exact.denominator != 1 or exact > AMOUNT_MAX:
        fix = f"write a whole amount above 0, at most {_shown(AMOUNT_MAX, unit or Unit.REQUESTS)}"
        faults.append(Fault(f'"burst {text}" is no capacity', fix, "limit"))
        return None
    return int(exact)


def _explain_shapeless(text: str, rest: str, faults: list[Fault]) -> None:
    match = _AMOUNT.fullmatch(rest)
    if match is None:
        faults.append(Fault(f'"{text}" is not a limit', _EXAMPLES, "limit"))
    elif "concurrent" in (match["unit"] or ""):
        fix = f'write "{match["number"]} concurrent per user"'
        faults.append(Fault(f'"{rest}" is not how concurrency is written', fix, "limit"))
    else:
        unit_free = f"{match['dollar']}{match['number']}{match['suffix']} {match['unit'] or ''}".strip()
        fix = f'add one: "{unit_free}/day", or "{unit_free} total" for a prepaid amount'
        faults.append(Fault(f'"{rest}" says no period', fix, "limit"))


def _slug(kind: Kind, unit: Unit, length: _Length | None, scope: tuple[str, ...]) -> str:
    """What the limit is called in header fields: without its amount, so that an edit keeps the name."""
    words = [str(unit)]
    if kind is Kind.TOTAL:
        words.append("total")
    if length is not None:
        words.append(length.name if length.count == 1 else f"{length.count}-{length.name}s")
        if kind is Kind.BUCKET and length.name in _CALENDAR:
            words.append("rolling")
    return slugged(" ".join([*words, *scope]))


def slugged(text: str) -> str:
    """`text` in lower case, with everything but letters and digits turned to single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:60].strip("-") or "limit"


# -- the table form


def _check_keys(table: Mapping[str, Any], faults: list[Fault]) -> None:
    for key in table:
        if key not in LIMIT_KEYS:
            faults.append(Fault(f'unknown key "{key}"', nearest(str(key), list(LIMIT_KEYS)), str(key)))
    if "limit" not in table:
        faults.append(Fault('the table has no "limit"', 'write { limit = "$2/day per user", … }'))


def _read_when(when: object, tier: str | None, faults: list[Fault]) -> Mapping[str, tuple[str, ...]]:
    if when is None:
        return NOTHING
    if not isinstance(when, Mapping) or not when:
        faults.append(Fault(f"when = {_quoted(when)} is not a condition", 'write when = { tier = "free" }', "when"))
        return NOTHING
    conditions: dict[str, tuple[str, ...]] = {}
    for key, wanted in when.items():
        values = tuple(wanted) if isinstance(wanted, list | tuple) else (wanted,)
        if key not in CONDITIONS and not (str(key).startswith("tag:") and len(key) > 4):
            fix = nearest(str(key), [*CONDITIONS, "tag:NAME"])
            faults.append(Fault(f'unknown condition "{key}"', fix, "when"))
        elif str(key)[4:] in _UNDERSTOOD_TAGS and str(key).startswith("tag:"):
            instead = _UNDERSTOOD_TAGS[str(key)[4:]]
            fix = f"write when = {{ {instead} = … }}" if instead in CONDITIONS else "this tag cannot be a condition"
            faults.append(Fault(f'"{key}" is not a free tag', fix, "when"))
        elif not values or not all(isinstance(value, str) and value for value in values):
            fix = f'write {key} = "…", or a list of texts'
            faults.append(Fault(f"{key} = {_quoted(wanted)} is not a text", fix, "when"))
        elif key == "tier" and tier is not None and tier not in values:
            fix = f"leave the condition out: the limit stands under [tiers.{tier}]"
            faults.append(Fault(f"tier = {_quoted(wanted)} can never hold here", fix, "when"))
        else:
            conditions[str(key)] = values
    return MappingProxyType(conditions)


def _read_parts(table: Mapping[str, Any], budgets: Budgets, said: _Said | None, faults: list[Fault]) -> Budgets:
    given: dict[str, Fraction] = {}
    is_budget = said is None or (said.kind in (Kind.CALENDAR, Kind.TOTAL) and said.unit in BUDGET_UNITS)
    for key in ("warning", "critical", "hard", "overdraft"):
        if key not in table:
            continue
        part = as_part(table[key])
        if not is_budget:
            fix = 'leave it out, or make the limit one of $, tokens or credits a day, week or month, or "total"'
            faults.append(Fault(f'"{key}" is for budgets, and "{said.text if said else ""}" is none', fix, key))
        elif part is None or part > 10 or (part == 0 and key != "overdraft"):
            fix = "write a part of the amount: 0.9 is 90 %, 10 the most"
            faults.append(Fault(f"{key} = {_quoted(table[key])} is no part of an amount", fix, key))
        else:
            given[key] = part
    parts = replace(budgets, **given)
    if given and parts.hard < parts.critical:
        problem = f"hard = {_decimal_text(parts.hard)} is below critical = {_decimal_text(parts.critical)}"
        key = "hard" if "hard" in given else "critical"
        faults.append(
            Fault(problem, "the budget would end before it is called critical: raise hard or lower critical", key)
        )
    return parts


def as_part(value: object) -> Fraction | None:
    """A number from outside (int, float, Decimal) as the exact fraction that was written; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | Fraction):
        return None
    if isinstance(value, float):
        value = Decimal(repr(value))  # the digits somebody wrote, not the double next to them
    if isinstance(value, Decimal) and not value.is_finite():
        return None
    part = Fraction(value)
    return part if part >= 0 else None


def _read_anchor(anchor: object, said: _Said | None, faults: list[Fault]) -> int:
    most = _ANCHOR_MAX.get(said.period or "", 0) if said else 31
    if anchor is None:
        return 1 if said and most else 0
    if not most:
        fix = 'leave it out: it is the first day of a "/month" (1 to 31) or "/week" budget (1 is Monday)'
        faults.append(
            Fault(f'anchor = {_quoted(anchor)} means nothing in "{said.text if said else ""}"', fix, "anchor")
        )
        return 0
    if isinstance(anchor, bool) or not isinstance(anchor, int) or not 1 <= anchor <= most:
        faults.append(Fault(f"anchor = {_quoted(anchor)} is no day of its period", f"write 1 to {most}", "anchor"))
        return 0
    return anchor


def _read_timezone(timezone: object, default: str, said: _Said | None, faults: list[Fault]) -> str:
    calendar = said is None or said.kind is Kind.CALENDAR
    if timezone is None:
        return default if calendar else ""
    if not calendar:
        fix = "leave it out: only budgets of a day, week or month look at the calendar"
        faults.append(
            Fault(f'timezone = {_quoted(timezone)} means nothing in "{said.text if said else ""}"', fix, "timezone")
        )
    elif not isinstance(timezone, str) or not known_timezone(timezone):
        fix = nearest_timezone(timezone) if isinstance(timezone, str) else 'write "Europe/Berlin"'
        faults.append(Fault(f"unknown timezone {_quoted(timezone)}", fix, "timezone"))
    else:
        return timezone
    return ""


def known_timezone(name: str) -> bool:
    """Whether the timezone database has `name`."""
    try:
        ZoneInfo(name)
    except (ValueError, OSError):  # OSError: no such zone, but a folder of zones ("Europe"), or a name too long
        return False
    except KeyError:  # ZoneInfoNotFoundError
        return False
    return True


def nearest_timezone(name: str) -> str:
    return nearest(name, sorted(available_timezones()), also='names look like "Europe/Berlin"')


# -- words for people


def nearest(word: str, options: Sequence[str], *, also: str = "") -> str:
    """The advice for a misspelt word: the closest option, or all of them where there are few."""
    lowered = {option.lower(): option for option in options}
    close = get_close_matches(word.lower(), list(lowered), n=1, cutoff=0.6)
    if close:
        return f'did you mean "{lowered[close[0]]}"?'
    if len(options) > 24:
        return also
    listed = ", ".join(options)
    return f"write one of {listed}{', ' + also if also else ''}"


def _quoted(value: object) -> str:
    text = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _decimal_text(part: Fraction) -> str:
    return str(Decimal(part.numerator) / Decimal(part.denominator))


def _unit_names(unit: Unit) -> str:
    return "concurrent calls" if unit is Unit.CONCURRENT else str(unit).replace("_", " ")


def _shown(amount: int, unit: Unit) -> str:
    return f"${amount // NANOS_PER_DOLLAR:_}" if unit is Unit.USD else f"{amount:_} {_unit_names(unit)}"
