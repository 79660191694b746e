"""The nouns: what the account is made of.

Everything here is a frozen value: a `msgspec.Struct`, since a request makes dozens of them and a dataclass of so
many fields costs ten times as much to make or amend (docs/decisions/0006); `Usage`, which apps see, is a dataclass.
Money is an `int` of nano-dollars, times are `int` milliseconds since the Unix epoch (UTC), and nothing does I/O. The
definitions are those of docs/explanation/accounting.md.

    Principal, Tags          who, and under which names the cost is reported
    Usage, Cost              what a provider says it did, and what that is worth
    Asked                    what a request to a provider asks for
    Demand, Offer            what a reserve wants from the balances, one Offer a way of serving the request
    Line                     what an exchange holds, or moved, on one balance
    UsageEvent, JournalEntry the books
    Refusal                  what a caller is told
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Literal

import msgspec

NANOS_PER_DOLLAR = 1_000_000_000

#: Integers beyond this are not exact in a double, which is all that Lua has.
EXACT_MAX = 2**53 - 1

#: The end of a window that never ends (totals).
FOREVER = EXACT_MAX


class Unit(StrEnum):
    """What a balance counts. USD is counted in nano-dollars."""

    USD = "usd"
    TOKENS = "tokens"
    INPUT_TOKENS = "input_tokens"
    OUTPUT_TOKENS = "output_tokens"
    CREDITS = "credits"
    REQUESTS = "requests"
    CONCURRENT = "concurrent"


class Kind(StrEnum):
    """How a balance comes back: a bucket drains, a calendar window ends, a total never, a concurrent call leaves."""

    BUCKET = "bucket"
    CALENDAR = "calendar"
    TOTAL = "total"
    CONCURRENT = "concurrent"


class Basis(StrEnum):
    """What a number rests on."""

    EXACT = "exact"  # the provider's own numbers
    COUNTED = "counted"  # our count of the text that was seen, with a margin
    HELD = "held"  # the hold itself, since nothing better is known
    ABANDONED = "abandoned"  # the hold of a process that went away


class EntryKind(StrEnum):
    """What a journal entry records."""

    SETTLE = "settle"
    RELEASE = "release"  # the bytes never left
    ABANDONED = "abandoned"  # the lease ran out
    CORRECTION = "correction"  # a late settle of an abandoned exchange: actual minus booked
    ORPHAN = "orphan"  # a settle that found neither hold nor tombstone: booked in full
    REPRICED = "repriced"
    REFUSED = "refused"


Decision = Literal["allow", "cache", "degrade", "reject"]
RefusalCode = Literal["rate_limited", "budget_spent", "concurrency", "never_fits"]


class Principal(msgspec.Struct, frozen=True, gc=False):
    """Who is calling, as far as the caller could prove it. None = not known; an empty string never occurs."""

    user: str | None = None
    tenant: str | None = None
    tier: str | None = None
    key_id: str | None = None
    anonymous: bool = False


class Tags(msgspec.Struct, frozen=True, gc=False):
    """The names under which a call is reported. `trusted` names may choose limits, the others are for reports only."""

    feature: str | None = None
    tier: str | None = None
    workflow_id: str | None = None
    session_id: str | None = None
    experiment: str | None = None
    variant: str | None = None
    free: tuple[tuple[str, str], ...] = ()  # sorted by name
    trusted: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """What a provider says an exchange used: inclusive totals, in tokens. None = not said, which is never 0.

    `input_tokens` contains cached reads and cache writes; `output_tokens` contains reasoning. `parts` are
    disjoint and each priced on its own: cache_write_5m, cache_write_1h, images, seconds, search_units,
    server_tools, ...
    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_input_tokens: int | None = None
    cache_write_tokens: int | None = None
    reasoning_tokens: int | None = None
    audio_input_tokens: int | None = None
    audio_output_tokens: int | None = None
    model: str | None = None
    exact: bool = True
    parts: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


class Reading(msgspec.Struct, frozen=True):
    """What a meter knows once the bytes have ended.

    `ended` says that the protocol's own end was seen (a closed JSON body, `[DONE]`, `message_stop`), so that
    `text` is all there was. `text` is what the model wrote as far as it was kept; it is counted and dropped,
    never logged or stored. `error` names an error inside a 2xx body, `broken` why the meter itself gave up, and
    `free` why the answer costs nothing: "counting" (it only counts tokens), "repeated" (its usage was metered before).
    """

    usage: Usage | None = None
    ended: bool = False
    text: str | None = None
    response_id: str | None = None
    service_tier: str | None = None
    error: str | None = None
    broken: str | None = None
    free: str | None = None


class Cost(msgspec.Struct, frozen=True, gc=False):
    """What a usage is worth. `nanos` is None where no price is known and the rules allow that."""

    nanos: int | None
    price_version: str
    flagged: str | None = None  # "ceiling": the provider's dearest price stood in; "unpriced"; None: a real price


class Rates(msgspec.Struct, frozen=True, gc=False):
    """Upper bounds for a hold: whole nano-dollars a token, rounded up, the dearest tier of the model."""

    model: str | None
    provider: str | None
    input_nanos: int
    output_nanos: int
    price_version: str
    request_nanos: int = 0  # a fixed price a request, where a provider has one
    flagged: str | None = None  # as in Cost
    context_window: int | None = None
    max_output: int | None = None
    hidden_output: bool = False  # it bills output that the caller never sees (reasoning)


class Asked(msgspec.Struct, frozen=True, gc=False):
    """What a request to a provider asks for, read off its bytes."""

    api: str | None = None  # "openai.chat", ...; None: not a shape we know
    provider: str | None = None
    model: str | None = None
    input_tokens: int = 0  # upper estimate
    cap: int | None = None  # the caller's own cap on output tokens, for one choice
    choices: int = 1
    stream: bool = False
    includes_usage: bool = True  # False: a stream that carries no usage unless asked to
    opaque: tuple[str, ...] = ()  # input that the body only refers to: "previous_response_id", "file_id", ...
    unbounded: str | None = None  # "batch", "realtime", ...: no bound can be told from the request
    counted: bool = True  # False: an endpoint that costs nothing (model lists, token counting)
    output: bool = True  # False: an endpoint without output tokens (embeddings)
    service_tier: str | None = None
    kinds: tuple[str, ...] | None = None  # what besides text it may be billed for (pricing.INPUT_KINDS); None: any
    thinks: bool = False  # it turns thinking on: output that the caller need not see
    cappable: bool = True  # False: no cap can be written into it; it has no place for one, or is not plain JSON


# ---------------------------------------------------------------- balances


class Window(msgspec.Struct, frozen=True, gc=False):
    """A stretch of time, `start <= t < end`, in ms since the epoch."""

    start: int
    end: int


class Demand(msgspec.Struct, frozen=True, gc=False):
    """What one offer wants from one balance.

    The amount claimed is `fixed + per_output * cap`, where the store may lower the cap (see `Offer`).
    `ceiling` is what `spent + held` may reach: a bucket's capacity, a budget's amount times hard (plus
    overdraft), a count of calls.
    """

    balance: str  # the balance's name, as `policy` writes it
    kind: Kind
    unit: Unit
    ceiling: int
    fixed: int
    per_output: int = 0
    rate: int = 0  # bucket only: so many units ...
    period: int = 0  # ... drain every so many ticks ...
    tick: int = 1  # ... of so many ms
    windows: tuple[Window, ...] = ()  # calendar only: the present and the next one, as the app sees them

    @property
    def spent_at_reserve(self) -> bool:
        """Requests are spent when they are granted: never held, never given back."""
        return self.unit is Unit.REQUESTS


class Offer(msgspec.Struct, frozen=True, gc=False):
    """One way to serve the request. The store grants the first offer that all its balances can bear.

    It may lower the output cap, but not below `at_least`; `at_least == cap` forbids that.
    """

    decision: Decision
    model: str | None
    demands: tuple[Demand, ...]
    cap: int = 0
    at_least: int = 0


class Line(msgspec.Struct, frozen=True, gc=False):
    """What an exchange holds on one balance, or (in the journal) what it moved there.

    `window_start` is fixed at reserve; it is 0 for whatever is not a calendar budget. `spent` marks requests,
    which were spent at reserve.
    """

    balance: str
    kind: Kind
    unit: Unit
    window_start: int
    amount: int
    spent: bool = False


# ---------------------------------------------------------------- the books


class UsageEvent(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One exchange in the books, append-only. The names are the contract of `events --format jsonl`.

    `at` is UTC in microseconds since the epoch. `input_tokens` and `output_tokens` are what was billed,
    `estimated_*` what was held; a refused call has None for both. `attempt` is the exchange's number within
    its call; `(call_id, attempt, kind, price_version)` is unique.
    """

    call_id: str
    attempt: int
    kind: EntryKind
    at: int
    request_id: str | None = None
    parent_call_id: str | None = None
    tenant: str | None = None
    user: str | None = None
    tier: str | None = None
    key_id: str | None = None
    feature: str | None = None
    route: str | None = None
    workflow_id: str | None = None
    session_id: str | None = None
    experiment: str | None = None
    variant: str | None = None
    tags: Mapping[str, str] = msgspec.field(default_factory=dict)
    provider: str | None = None
    api: str | None = None
    requested_model: str | None = None
    model: str | None = None
    input_tokens: int | None = None
    cached_input_tokens: int | None = None
    cache_write_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None
    audio_input_tokens: int | None = None
    audio_output_tokens: int | None = None
    estimated_input_tokens: int | None = None
    estimated_output_tokens: int | None = None
    credits: int | None = None
    cost_nanos: int | None = None
    saved_nanos: int | None = None
    price_version: str = ""
    basis: Basis | None = None
    exact: bool = False
    duration_ms: int | None = None
    first_token_ms: int | None = None
    status: int | None = None
    success: bool | None = None
    error_type: str | None = None
    decision: Decision | None = None
    degraded: bool = False
    cache_hit: bool = False
    deduped_from: str | None = None
    count: int = 1  # how many refusals a `refused` row stands for


class JournalEntry(msgspec.Struct, frozen=True, gc=False):
    """One immutable entry of the journal: what moved, and the event that says why.

    `id` is `exchange/kind`, so that no exchange can be entered twice under one kind. `position` is the
    store's own order within `partition`.
    """

    id: str
    kind: EntryKind
    at: int  # ms, the store's clock
    lines: tuple[Line, ...]
    event: UsageEvent
    position: str = ""
    partition: str = ""


# ---------------------------------------------------------------- what a caller is told


class Shortfall(msgspec.Struct, frozen=True, gc=False):
    """One limit that stood in the way. Amounts are in the limit's unit (nano-dollars for USD)."""

    limit: str  # the notation, as written: "$2/day per user"
    name: str  # a short slug for `violated-policies` and RateLimit fields
    code: RefusalCode
    ceiling: int
    left: int  # ceiling - spent - held, never below 0
    wait_ms: int | None = None  # until a claim of this size fits; None: waiting does not help
    reset_at: int | None = None  # ms; when the window ends; None where nothing resets
    by_holds: bool = False  # `spent` alone would not have refused: others' holds did


class Refusal(msgspec.Struct, frozen=True, gc=False):
    """Why a call is refused, and what the caller can do about it."""

    shortfalls: tuple[Shortfall, ...]
    at: int  # ms, the store's clock
    call_id: str = ""
    api: str | None = None  # whose error shape the caller expects
    status: int = 429  # 429; 401 for an identity that stayed unknown
    code: str = ""
    message: str = ""
