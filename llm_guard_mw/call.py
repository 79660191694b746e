"""One call in flight: what a door opens, what captures add exchanges to, and what `current_call()` gives an app.

Rule 1. State lives here, decisions do not: `guard` plans and closes, this only remembers.
Rule 2. What belongs together is changed under the call's lock: captures may run in several threads at once.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from msgspec.structs import replace

from llm_guard_mw.balances import Limit
from llm_guard_mw.errors import GuardError
from llm_guard_mw.http import HttpRequest
from llm_guard_mw.metering import read_usage
from llm_guard_mw.model import Asked, Decision, Principal, Rates, Refusal, Tags, Usage, UsageEvent
from llm_guard_mw.policy import Route
from llm_guard_mw.stores.protocol import Granted, Standing

_current: ContextVar[Call | None] = ContextVar("llm_guard_call", default=None)

#: Tokens that one report may name: more are a mistake, and would leave the range of a balance.
RECORDED_MAX = 1_000_000_000

#: Free tags and outcomes a call may gather; more are dropped, since each is a column of the reports.
TAGS_MAX = 32


def current_call() -> Call | None:
    """The guarded call this code runs in, or None outside of one."""
    return _current.get()


def enter(call: Call | None) -> Any:
    """Make `call` the current one; give what comes back to `leave`."""
    return _current.set(call)


def leave(token: Any) -> None:
    # A generator may be closed in another context than the one it was opened in: then there is nothing to undo.
    with contextlib.suppress(ValueError):
        _current.reset(token)


# Ids have to be unique, not secret; asking the system for each would cost more than the rest of opening a call.
# Its own generator: an app that seeds the global one alike in all its workers must not make their ids alike.
_random = random.Random()  # noqa: S311 - unique, not secret
os.register_at_fork(after_in_child=_random.seed)


def new_call_id() -> str:
    """32 hex digits that sort by time: 48 bits of milliseconds, 80 random ones."""
    return f"{time.time_ns() // 1_000_000:012x}{_random.getrandbits(80):020x}"


@dataclass(frozen=True, slots=True)
class Record:
    """Usage that the app reported itself."""

    usage: Usage
    response_id: str | None
    provider: str | None = None


class Till(Protocol):
    """What a call needs of the guard when the app itself reports or spends something."""

    def charge(self, call: Call, credits: int, provider: str | None) -> None: ...

    def book(self, call: Call, record: Record) -> None: ...


@dataclass(slots=True)
class Exchange:
    """One conversation with a provider (or one charge), held open between reserve and settle.

    `model`, `cap` and `ask_usage` say what to write into the request before its bytes leave: None and False
    leave it as the caller made it.
    """

    id: str
    call: Call
    number: int
    asked: Asked
    limits: tuple[Limit, ...]  # in the order of the offer's demands
    granted: Granted
    rates: Rates
    draft: UsageEvent
    started: float  # time.monotonic()
    lease_end: int
    decision: Decision = "allow"
    model: str | None = None
    cap: int | None = None
    ask_usage: bool = False
    credits: int | None = None
    first_byte: float | None = None
    closed: bool = False
    alone: bool = False  # granted by this process itself, while the store was away

    @property
    def api(self) -> str | None:
        return self.asked.api

    @property
    def provider(self) -> str | None:
        return self.asked.provider

    @property
    def degraded(self) -> bool:
        return self.decision == "degrade"

    def saw_first_byte(self) -> None:
        """Note when the answer began; later calls change nothing."""
        if self.first_byte is None:
            self.first_byte = time.monotonic()


@dataclass(slots=True)
class Call:
    """One guarded request, or one `as_user` block."""

    id: str
    principal: Principal
    tags: Tags
    route: Route | None
    till: Till
    request: HttpRequest | None = None
    request_id: str | None = None
    parent_id: str | None = None
    identified: bool = True  # False: a late source may still answer at the first exchange
    answered: Principal | None = None  # ... and what it said while the app's framework still knew: `ask_now`
    alone: bool = False  # the store was away, and this process guarded by its own count
    unguarded: bool = False  # ... and while observing it could not even do that
    started: float = field(default_factory=time.monotonic)
    door: Exchange | None = None  # exchange 0, until it is taken or closed
    claimed: set[str] = field(default_factory=set)  # balances of requests and concurrency: once a call
    joined: bool = False  # it may have a place in a concurrency balance, which has to be left
    standings: dict[str, tuple[Limit, Standing]] = field(default_factory=dict)  # the latest seen, by limit slug
    captures: int = 0  # how often a capture asked, granted or refused
    refusal: Refusal | None = None  # the latest one a capture got
    failure: GuardError | None = None  # why a capture could not even be refused: nobody is known, the store is away
    would_refuse: Refusal | None = None  # observe mode: what enforce would have said
    decision: Decision = "allow"
    events: list[UsageEvent] = field(default_factory=list)  # settled so far, without those of refusals
    records: list[Record] = field(default_factory=list)
    outcomes: dict[str, float] = field(default_factory=dict)
    closed: bool = False
    detached: bool = False  # opened by a capture for itself: it ends with its exchange
    lock: threading.Lock = field(default_factory=threading.Lock)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _captured: set[str] = field(default_factory=set)
    _captured_usages: list[Usage] = field(default_factory=list)  # of answers that carry no id

    # -- what an app sees through current_call()

    @property
    def feature(self) -> str | None:
        return self.tags.feature

    def record(self, answer: Any, *, provider: str | None = None) -> None:
        """Report usage that no capture saw: a provider's response object, its dict, or `{"input_tokens": …}`.

        Of a response that was captured already it adds nothing. An object without usage is a ValueError.
        """
        record = _as_record(answer, provider)
        with self.lock:
            if not self.closed:
                self.records.append(record)
                return
        if not self.was_captured(record):
            self.till.book(self, record)

    def charge(self, *, credits: int, provider: str | None = None) -> None:
        """Spend credits on a paid API that is not a model's. Raises LimitExceeded, and then nothing was spent."""
        if isinstance(credits, bool) or not isinstance(credits, int) or credits < 0:
            raise ValueError(f"charge(credits={credits!r}): a whole number of credits, 0 or more, would be right")
        self.till.charge(self, credits, provider)

    def tag(self, **tags: str) -> None:
        """Add free tags: they stand on the events of exchanges that settle from now on."""
        wrong = [name for name, value in tags.items() if not isinstance(value, str)]
        if wrong:
            raise ValueError(f"tag({wrong[0]}={tags[wrong[0]]!r}): a string would be right")
        with self.lock:
            free = {**dict(self.tags.free), **{sayable(name): sayable(value) for name, value in tags.items()}}
            self.tags = replace(self.tags, free=tuple(sorted(free.items())[:TAGS_MAX]))

    def outcome(self, name: str, value: float = 1) -> None:
        """What came of the call ("ticket_solved"): in its log line, summed by name."""
        name = sayable(name)
        with self.lock:
            if name in self.outcomes or len(self.outcomes) < TAGS_MAX:
                self.outcomes[name] = self.outcomes.get(name, 0) + value

    # -- what doors and captures keep here

    def next_number(self) -> int:
        """The number of this call's next exchange: 0 for the door's."""
        return next(self._numbers)

    def note_captured(self, response_id: str | None, usage: Usage | None) -> None:
        with self.lock:
            if response_id is not None:
                self._captured.add(response_id)
            elif usage is not None:
                self._captured_usages.append(usage)

    def was_captured(self, record: Record) -> bool:
        """Whether a capture has metered this very answer. One without an id is known by its numbers, once each."""
        with self.lock:
            if record.response_id is not None:
                return record.response_id in self._captured
            for usage in self._captured_usages:
                if (usage.input_tokens, usage.output_tokens) == (record.usage.input_tokens, record.usage.output_tokens):
                    self._captured_usages.remove(usage)
                    return True
            return False

    def age_ms(self) -> int:
        return round((time.monotonic() - self.started) * 1000)

    @property
    def cost_nanos(self) -> int | None:
        """What the settled exchanges cost so far; None while nothing has settled, or where no price is known."""
        costs = [event.cost_nanos for event in self.events]
        return None if not costs or None in costs else sum(cost for cost in costs if cost is not None)


def sayable(text: str) -> str:
    """Text that journal and log can carry: JSON from anywhere may hold half a character, which nothing can encode."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _as_record(answer: Any, provider: str | None) -> Record:
    """Read a response object (anything with `model_dump` or `to_dict`), a dict of one, or plain numbers."""
    if provider is not None and not isinstance(provider, str):
        raise ValueError(f'record(provider={provider!r:.80}): a provider\'s name, like "openai", would be right')
    dump: Callable[..., Any] | None = getattr(answer, "model_dump", None) or getattr(answer, "to_dict", None)
    body = dump() if dump is not None else answer
    if isinstance(body, Usage):
        return Record(body, None, provider)
    if not isinstance(body, Mapping):
        raise ValueError(
            f"record({type(answer).__name__}): a provider's response object, its dict,"
            ' or {"input_tokens": 10, "output_tokens": 20, "model": "gpt-4o"} would be right'
        )
    usage = _plain_numbers(body) or read_usage(
        "auto", msgspec.json.encode(body, enc_hook=str), content_type="application/json", provider=provider
    )
    if usage is None:
        raise ValueError("record(): no usage in it; pass the whole response, or its token counts")
    response_id = body.get("id") or body.get("responseId") or body.get("response_id")
    return Record(usage, response_id if isinstance(response_id, str) else None, provider)


_NUMBERS = (
    "input_tokens",
    "output_tokens",
    "cached_input_tokens",
    "cache_write_tokens",
    "reasoning_tokens",
    "audio_input_tokens",
    "audio_output_tokens",
)


def _plain_numbers(body: Mapping[str, Any]) -> Usage | None:
    numbers = {name: body[name] for name in _NUMBERS if body.get(name) is not None}
    if not numbers:
        return None
    wrong = [
        name
        for name, value in numbers.items()
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= RECORDED_MAX
    ]
    if wrong:
        raise ValueError(
            f"record({wrong[0]}={numbers[wrong[0]]!r}): a whole number of tokens, 0 or more, would be right"
        )
    model = body.get("model")
    return Usage(model=sayable(model) if isinstance(model, str) else None, **numbers)
